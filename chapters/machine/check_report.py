"""What ``check`` prints: each task red or green, what failed first, and why it works."""

import re
import textwrap
from collections.abc import Container, Sequence

from chapters.machine.manifest import Chapter
from chapters.machine.runner import Report
from chapters.machine.screen import Screen
from chapters.machine.standing import Standing, is_green
from chapters.machine.workspace import FOLDER

LINES = 6  # of a failure's message
_COLOUR = {"green": "green", "red": "red", "skipped": "yellow"}


def print_check(
    screen: Screen,
    chapter: Chapter,
    standings: Sequence[Standing],
    report: Report,
    explained: Container[str],
    following: int | None,
    *,
    only: bool = False,
) -> None:
    """Print how the tasks of ``chapter`` stand.

    explained: ids of tasks that were green before; their paragraph is not printed again.
    following: the chapter to go on with, None if it is begun already or this is the last one.
    only: the tests of one task ran, and no others.
    """
    title = screen.paint(f"Chapter {chapter.number}: {chapter.title}", "bold")
    screen.line(f"{title}, tested on {FOLDER}/minivllm")
    if report.broken:
        screen.line()
        screen.line(screen.paint("The tests could not run:", "red"))
        for row in report.broken.splitlines():
            screen.line(f"  {row}")
        if "No module named" in report.broken and "minivllm" not in report.broken:
            screen.paragraph("This Python lacks what the course needs: put `uv run` in front.", 2)
    screen.line()
    width = max((len(found.task.title) for found in standings), default=0)
    after_paragraph = False
    for found in standings:
        if after_paragraph:
            screen.line()
        after_paragraph = found.status == "green" and found.task.id not in explained
        status = screen.paint(found.status, _COLOUR[found.status])
        screen.line(f"  {found.task.id}  {found.task.title:<{width}}  {status}")
        if after_paragraph:
            screen.paragraph(found.task.why, 7)
        elif found.status == "skipped":
            screen.paragraph(found.message, 7)
        elif found.status == "red" and not report.broken:
            if found.test:
                screen.line(f"       {found.test}")
            for row in short(found.message, screen.width - 9, found.text):
                screen.line(f"         {row}")
            if found.blank and len(found.task.targets) > 1:
                names = ", ".join(target.name for target in found.blank)
                screen.paragraph(f"still blank: {names}", 7)
        if found.status == "red":
            screen.line(f"       python -m chapters hint {found.task.id}")
    _print_others(screen, standings, report)
    _print_summary(screen, chapter, standings, report, following, only=only)


def short(message: str, width: int, text: str = "") -> list[str]:
    """The first lines of a failure, wrapped to ``width``, without the exception's frame.

    text: all of the failure. If it is no assertion, the learner's line in it is shown as well.
    """
    # What a blank says needs no exception around it.
    blank = re.search(r"Task \d+\.\d+ \(.*?\): not written yet", message)
    if blank:
        return [blank[0]]
    where = "" if message.startswith(("AssertionError", "assert ")) else _place(text)
    message = re.sub(r"^AssertionError: ", "", message)
    # pytest explains an assertion's values below what the test itself says; that is enough.
    message = re.split(r"\nassert |\n\s*\+  where ", message)[0]
    # The folder of the checkout says nothing, nor does pytest's remark on what it left out.
    message = re.sub(r"[^\s'\"]*/(?=workspace/minivllm/)", "", message)
    rows = [row.rstrip() for row in message.splitlines() if row.strip()]
    rows = [row for row in rows if "full report in element text" not in row]
    result = []
    for row in rows[:LINES]:
        margin = " " * (len(row) - len(row.lstrip()))
        result += textwrap.wrap(row, width, subsequent_indent=margin + "  ")[:LINES]
    if len(rows) > LINES or len(result) > LINES:
        result = [*result[: LINES - 1], "..."]
    return result + ([f"at {where}"] if where and where not in message else [])


def _place(text: str) -> str:
    """The last line of the learner's package in a traceback: ``file:line``."""
    found = re.findall(r'File "[^"]*?(workspace/minivllm/[^"]+)", line (\d+)', text)
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""


def _print_others(screen: Screen, standings: Sequence[Standing], report: Report) -> None:
    """Red tests that belong to no task, unless they only meet a blank."""
    ours = {name for found in standings for name in found.task.tests}
    others = [
        outcome
        for outcome in report.outcomes
        if outcome.status == "failed" and outcome.name not in ours
    ]
    if not others or any(found.status == "red" for found in standings):
        return
    screen.line("  other tests of the chapter are red:")
    for outcome in others[:3]:
        screen.line(f"       {outcome.name}")
        for row in short(outcome.message, screen.width - 9, outcome.text):
            screen.line(f"         {row}")


def _print_summary(
    screen: Screen,
    chapter: Chapter,
    standings: Sequence[Standing],
    report: Report,
    following: int | None,
    *,
    only: bool,
) -> None:
    passed = sum(outcome.status == "passed" for outcome in report.outcomes)
    ran = sum(outcome.status != "skipped" for outcome in report.outcomes)
    green = sum(found.status != "red" for found in standings)
    tests = f"{passed} of {ran} tests pass"
    if standings:
        tests = f"{green} of {len(standings)} tasks green, {tests}"
    screen.line()
    if only:
        screen.line(f"{passed} of {ran} tests of this task pass.")
        screen.line(f"All of the chapter:  python -m chapters check {chapter.number}")
    elif is_green(standings, report):
        done = screen.paint(f"Chapter {chapter.number} is done", "green", "bold")
        screen.line(f"{done}: {tests}.")
        if following is not None:
            screen.line(f"Next:  python -m chapters start {following}")
    else:
        screen.line(f"{tests}.")
