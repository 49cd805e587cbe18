"""How a task stands: what its tests said, and whether anything was written at all."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from chapters.machine.manifest import Target, Task
from chapters.machine.runner import Report
from chapters.machine.source import SourceError, is_blank


@dataclass(frozen=True)
class Standing:
    """How a task stands: green, red or skipped, and the test that says so.

    blank: the targets that are still as the course gave them. message: what the test said in short;
    text: all of it.
    """

    task: Task
    status: str
    blank: tuple[Target, ...]
    test: str = ""
    message: str = ""
    text: str = ""


def standing(files: Mapping[str, str], task: Task, report: Report) -> Standing:
    """How ``task`` stands by its tests; a target that is still blank is red whatever they say."""
    blank = blank_targets(files, task)
    outcomes = report.of(task.tests)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    named = [outcome for outcome in failed if f"Task {task.id} (" in outcome.text]
    if failed or report.broken:
        first = (named or failed or [None])[0]
        message = first.message if first else report.broken
        if first is None:
            return Standing(task, "red", blank, "", message)
        return Standing(task, "red", blank, first.name, message, first.text)
    if blank or not outcomes:
        return Standing(task, "red", blank, "", task.message if blank else "its tests did not run")
    if all(outcome.status == "skipped" for outcome in outcomes):
        return Standing(task, "skipped", blank, outcomes[0].name, outcomes[0].message)
    return Standing(task, "green", blank)


def blank_targets(files: Mapping[str, str], task: Task) -> tuple[Target, ...]:
    """The targets of ``task`` that are still the blanks that the course gave."""
    blank = []
    for target in task.targets:
        # Where the target is gone or the file half-written, something was written.
        with contextlib.suppress(SourceError):
            if is_blank(files.get(target.file, ""), target.name, task.id):
                blank.append(target)
    return tuple(blank)


def is_green(standings: Iterable[Standing], report: Report) -> bool:
    """Whether a chapter is finished: no red task and no other red test."""
    return report.green and all(found.status != "red" for found in standings)
