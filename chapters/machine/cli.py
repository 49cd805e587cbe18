"""The commands of ``python -m chapters``."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from chapters import ROOT
from chapters.machine.check_report import print_check
from chapters.machine.manifest import Chapter, Course, CourseError
from chapters.machine.outline import public_names
from chapters.machine.progress import Progress
from chapters.machine.refresh import plan
from chapters.machine.screen import Screen
from chapters.machine.source import find, text_of
from chapters.machine.standing import is_green
from chapters.machine.start import Start
from chapters.machine.texts import sync
from chapters.machine.workspace import FOLDER, Change, Workspace

ABOUT = """\
Learn how an inference engine works by building one, chapter by chapter.

  python -m chapters start 1      make your own workspace/ with chapter 1's exercises
  python -m chapters check        test what you wrote; check 1.1: one task of it
  python -m chapters hint 1.1     a first hint for task 1.1; again for the next
"""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise CourseError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = OneLineParser(
        prog="python -m chapters",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("list", help="the chapters, and what you have done of them")

    start = commands.add_parser(
        "start", help="make or advance your workspace to chapter N, bring given code up to date"
    )
    start.add_argument("chapter", metavar="N")
    start.add_argument(
        "--solved", action="store_true", help="fill earlier exercises that are still blank"
    )
    start.add_argument(
        "--force", action="store_true", help="overwrite what stands in the way, with a backup"
    )

    check = commands.add_parser("check", help="run a chapter's tests on your workspace")
    check.add_argument("chapter", metavar="N", nargs="?", help="a chapter, or one task of it: N.K")
    check.add_argument("--why", action="store_true", help="explain every green task once more")

    hint = commands.add_parser("hint", help="a hint for a task; each call says more")
    hint.add_argument("task", metavar="N.K")
    hint.add_argument("--step", type=int, choices=(1, 2, 3), help="this hint only")

    solution = commands.add_parser("solution", help="how the reference solves a task")
    solution.add_argument("task", metavar="N.K")

    diff = commands.add_parser("diff", help="what a chapter adds to the package")
    diff.add_argument("chapter", metavar="N")
    diff.add_argument("--patch", action="store_true", help="the code itself, as a patch")

    reset = commands.add_parser("reset", help="make a task blank again, with a backup")
    reset.add_argument("task", metavar="N.K")
    reset.add_argument("--force", action="store_true", help="give the task's whole files anew")

    texts = commands.add_parser("sync", help="for authors: fill the quotes in the texts")
    texts.add_argument("--check", action="store_true", help="only say what is out of date")
    return parser


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run one command. Returns 0, 1 if tests are red or texts out of date, 2 for a mistake."""
    screen = Screen()
    try:
        # Somebody who types nothing more wants to know what there is.
        words = sys.argv[1:] if argv is None else list(argv)
        arguments = build_parser().parse_args(words or ["list"])
        course = Course.load(root)
        return _COMMANDS[arguments.command](course, screen, arguments)
    except CourseError as error:
        print(f"{Screen(sys.stderr).paint('error:', 'red')} {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, had enough
        sys.stdout = open(os.devnull, "w")
        return 0
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        return 130


def _list(course: Course, screen: Screen, arguments: argparse.Namespace) -> int:
    workspace = Workspace(course)
    progress = workspace.progress() if workspace.exists else None
    width = max((len(chapter.title) for chapter in course.chapters.values()), default=0)
    for number, chapter in course.chapters.items():
        here = progress is not None and progress.chapter == number
        title = screen.paint(f"{chapter.title:<{width}}", "bold")
        state = _state(course, chapter, progress)
        screen.line(f"{'>' if here else ' '} {number:>2}  {title}  {state}".rstrip())
        screen.paragraph(chapter.brings, 6, "dim")
    screen.line()
    if progress is None:
        screen.line("Begin with: python -m chapters start 1")
    else:
        screen.line(f"Your code is in {FOLDER}/minivllm; test it with: python -m chapters check")
    return 0


def _state(course: Course, chapter: Chapter, progress: Progress | None) -> str:
    if not course.files(chapter.number):
        return "not written yet"
    count = len(chapter.tasks)
    if not count:
        return "no tasks yet"
    if progress is None:
        return _count(count, "task")
    given = sum(task.id in progress.given for task in chapter.tasks)
    green = sum(task.id in progress.green or task.id in progress.given for task in chapter.tasks)
    return f"{green} of {_count(count, 'task')}" + (f" ({given} given)" if given else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _start(course: Course, screen: Screen, arguments: argparse.Namespace) -> int:
    workspace = Workspace(course)
    chapter = course.chapter(chapter_number(arguments.chapter, "start {0} begins its chapter"))
    change = Start(workspace, chapter.number, arguments.solved, arguments.force).run()
    screen.line(screen.paint(f"Chapter {chapter.number}: {chapter.title}", "bold"))
    if not change.written and not change.removed and not change.refreshed:
        screen.line("Everything is there already; nothing was changed.")
    _print_change(screen, change)
    if change.given:
        ids = ", ".join(task.id for task in change.given)
        screen.paragraph(f"Filled in from the reference: {ids}.")
    if chapter.tasks:
        screen.line()
        for task in chapter.tasks:
            screen.line(f"  {task.id}  {task.title}")
            for target in task.targets:
                screen.line("       " + screen.paint(f"{FOLDER}/{target}", "dim"))
    screen.line()
    if chapter.text.exists():
        screen.line(f"Read:  {chapter.text.relative_to(course.root).as_posix()}")
    screen.line("Test:  python -m chapters check")
    return 0


def _print_change(screen: Screen, change: Change) -> None:
    for name in change.refreshed:
        screen.line(f"  brought up to date with the course  {FOLDER}/{name}")
    for name in change.written:
        screen.line(f"  wrote    {FOLDER}/{name}")
    for name in change.removed:
        screen.line(f"  removed  {FOLDER}/{name}")
    if change.backup is not None:
        # The path from the repository: .../workspace/.backups/DATE.
        screen.line(f"What was there before is kept in {'/'.join(change.backup.parts[-3:])}")


def _check(course: Course, screen: Screen, arguments: argparse.Namespace) -> int:
    workspace = Workspace(course)
    before = workspace.progress()
    asked, only = arguments.chapter, None
    if asked is None:
        chapter = course.chapter(before.chapter)
    elif "." in asked:
        chapter, only = course.task(asked)
    else:
        chapter = course.chapter(chapter_number(asked))
    number = chapter.number
    if screen.is_terminal:
        print("running the tests ...", end="\r", flush=True)
    standings, report = workspace.check(number, only)
    explained = {} if arguments.why else before.green
    following = number + 1 if course.files(number + 1) and number == before.chapter else None
    print_check(screen, chapter, standings, report, explained, following, only=only is not None)
    if plan(course, workspace.files(), before).files:
        screen.paragraph(
            "The course has changed some of the code that it gave you; `python -m chapters start "
            f"{before.chapter}` brings it up to date and leaves your exercises as they are."
        )
    return 0 if is_green(standings, report) else 1


def chapter_number(text: str, remedy: str = "") -> int:
    """The chapter that a word on the command line names; CourseError with the way out if none.

    remedy: what to say to a task, {0} its chapter and {1} its id.
    """
    if re.fullmatch(r"\d+", text):
        return int(text)
    task = re.fullmatch(r"(\d+)\.\d+", text)
    if task and remedy:
        raise CourseError(f"{text} is a task; {remedy.format(task[1], text)}")
    raise CourseError(f"{text!r} is no chapter; a chapter is written like 4, a task like 4.1")


def _hint(course: Course, screen: Screen, arguments: argparse.Namespace) -> int:
    _, task = course.task(arguments.task)
    workspace = Workspace(course)
    progress = workspace.progress() if workspace.exists else None
    screen.line(screen.paint(f"{task.id} {task.title}", "bold"))
    if arguments.step:
        shown = [arguments.step]
    else:
        read = progress.hints.get(task.id, 0) if progress else 0
        shown = list(range(1, min(read + 1, len(task.hints)) + 1))
    for step in shown:
        screen.line()
        screen.line(f"hint {step} of {len(task.hints)}")
        screen.paragraph(task.hints[step - 1], 2)
    if progress is not None:
        progress.hints[task.id] = max(shown[-1], progress.hints.get(task.id, 0))
        progress.save(workspace.folder)
    screen.line()
    if shown[-1] < len(task.hints):
        again = f"hint {task.id}" if progress is not None and not arguments.step else ""
        more = again or f"hint {task.id} --step {shown[-1] + 1}"
        screen.line(f"More: python -m chapters {more}")
    else:
        screen.line(f"The answer: python -m chapters solution {task.id}")
    return 0


def _solution(course: Course, screen: Screen, arguments: argparse.Namespace) -> int:
    _, task = course.task(arguments.task)
    screen.line(screen.paint(f"{task.id} {task.title}", "bold"))
    for target in task.targets:
        source = course.read(target.file)
        place = f"{target.file}, line {find(source, target.name).first}"
        screen.line(screen.paint(place, "dim"))
        screen.line()
        screen.line(text_of(source, target.name))
        screen.line()
    return 0


def _diff(course: Course, screen: Screen, arguments: argparse.Namespace) -> int:
    remedy = "diff {0} shows what its chapter adds, solution {1} how the reference solves it"
    chapter = course.chapter(chapter_number(arguments.chapter, remedy))
    names = course.files(chapter.number)
    if arguments.patch:
        for name in names:
            lines = course.read(name).splitlines(keepends=True)
            screen.stream.writelines(difflib.unified_diff([], lines, "/dev/null", f"b/{name}"))
        return 0
    counts = {name: course.read(name).count("\n") for name in names}
    screen.line(
        screen.paint(f"Chapter {chapter.number}: {chapter.title}", "bold")
        + f" adds {sum(counts.values())} lines in {_count(len(names), 'file')}"
    )
    tasks = {(target.file, target.name): task for task in chapter.tasks for target in task.targets}
    for name in names:
        screen.line()
        screen.line(f"+ {name}  ({counts[name]} lines)")
        for defined in public_names(course.read(name)) if name.endswith(".py") else ():
            task = tasks.pop((name, defined.path), None)
            label = f"    {'  ' * defined.depth}{defined.label}"
            screen.line(f"{label:<52}task {task.id}" if task else label)
    for (name, path), task in tasks.items():
        screen.line(f"    {name}:{path}  task {task.id}")
    return 0


def _reset(course: Course, screen: Screen, arguments: argparse.Namespace) -> int:
    change = Workspace(course).reset(arguments.task, force=arguments.force)
    _, task = course.task(arguments.task)
    what = "given anew" if arguments.force else "blank again"
    screen.line(f"{task.id} {task.title} is {what}.")
    _print_change(screen, change)
    return 0


def _sync(course: Course, screen: Screen, arguments: argparse.Namespace) -> int:
    changed = sync(course, write=not arguments.check)
    for file in changed:
        verb = "out of date" if arguments.check else "filled"
        screen.line(f"{verb}: {file.relative_to(course.root).as_posix()}")
    if not changed:
        screen.line("every text is up to date")
    return 1 if changed and arguments.check else 0


_COMMANDS = {
    "list": _list,
    "start": _start,
    "check": _check,
    "hint": _hint,
    "solution": _solution,
    "diff": _diff,
    "reset": _reset,
    "sync": _sync,
}
