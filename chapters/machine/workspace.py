"""The learner's own package in ``workspace/``: what is there, checked, reset, backed up."""

import datetime
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chapters.machine.manifest import PACKAGE, Course, CourseError, Task
from chapters.machine.package import ASSETS, starter, with_blanks, with_solutions, write
from chapters.machine.progress import FILE, Progress
from chapters.machine.refresh import note, tasks_in
from chapters.machine.runner import Report, node_ids, run_tests
from chapters.machine.source import SourceError, find, parse
from chapters.machine.standing import Standing, is_green, standing

FOLDER = "workspace"
BACKUPS = ".backups"


@dataclass
class Change:
    """What a command did. written, removed: files, by their path in the workspace.

    refreshed: files of which the given code was brought up to date.
    given: tasks filled in from the reference; backup: the folder that keeps what was there before.
    """

    written: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refreshed: list[str] = field(default_factory=list)
    given: list[Task] = field(default_factory=list)
    backup: Path | None = None


class Workspace:
    """``workspace/`` of a course.

    Every method that changes it plans first and writes last: what is refused leaves it as it was.
    """

    def __init__(self, course: Course) -> None:
        self.course = course
        self.folder = course.root / FOLDER

    @property
    def exists(self) -> bool:
        return (self.folder / PACKAGE).is_dir()

    def progress(self) -> Progress:
        """The notes of the workspace; CourseError if there is no workspace."""
        if not self.exists:
            raise CourseError("there is no workspace yet; begin with `python -m chapters start 1`")
        progress = Progress.load(self.folder)
        if progress is None:
            raise CourseError(
                f"{FOLDER}/{FILE} is missing; say `python -m chapters start N` with the chapter "
                "you were at: your code stays as it is"
            )
        return progress

    def files(self) -> dict[str, str]:
        """The learner's files: path -> text. CourseError names a Python file that is no text."""
        result = {}
        for file in sorted((self.folder / PACKAGE).rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            if "__pycache__" in name or name.startswith(f"{ASSETS}/") or not file.is_file():
                continue
            try:
                result[name] = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                if file.suffix == ".py":
                    raise CourseError(f"{FOLDER}/{name} is not UTF-8 text: {error}") from None
        return result

    def refuse_broken_files(self, files: Mapping[str, str], up_to: int, stands_at: int) -> None:
        """CourseError for the first file up to chapter ``up_to`` that is missing or unfinished."""
        for number in range(1, up_to + 1):
            for name in self.course.files(number):
                if name not in files:
                    raise CourseError(
                        f"{FOLDER}/{name} is missing; `python -m chapters start {stands_at}` puts "
                        "it back as its chapter gives it"
                    )
                if name.endswith(".py"):
                    self.refuse_unfinished_file(files, name)

    def refuse_unfinished_file(self, files: Mapping[str, str], name: str) -> None:
        """CourseError with line and reason if a Python file does not parse."""
        try:
            parse(files[name])
        except SourceError as error:
            tasks = tasks_in(self.course, name)
            way_out = (
                f", or let `python -m chapters reset {tasks[0].id} --force` give the file anew "
                "(a backup is kept)"
            )
            raise CourseError(
                f"{FOLDER}/{name}, {error}; mend it{way_out if tasks else ''}"
            ) from None

    def tasks(self, number: int) -> tuple[Task, ...]:
        """The tasks of a chapter; none where there is no such chapter."""
        return self.course.chapters[number].tasks if number in self.course.chapters else ()

    def check(self, number: int, only: Task | None = None) -> tuple[list[Standing], Report]:
        """Run the tests of chapter ``number`` on the workspace, and note what is green.

        only: run the tests of this task alone.
        """
        chapter = self.course.chapter(number)
        progress = self.progress()
        if number > progress.chapter:
            raise CourseError(
                f"the workspace stands at chapter {progress.chapter}; "
                f"`python -m chapters start {number}` comes first"
            )
        files = self.files()
        self.refuse_broken_files(files, number, progress.chapter)
        tests = chapter.tests if only is None else node_ids(self.course, chapter, only.tests)
        report = run_tests(self.course, self.folder, tests)
        tasks = chapter.tasks if only is None else (only,)
        standings = [standing(files, task, report) for task in tasks]
        today = datetime.date.today().isoformat()
        for found in standings:
            if found.status == "red":
                progress.green.pop(found.task.id, None)
            else:
                progress.green.setdefault(found.task.id, today)
        if only is None:
            progress.finished.pop(str(number), None)
            if is_green(standings, report):
                progress.finished[str(number)] = self.digest(files, number)
        progress.save(self.folder)
        return standings, report

    def digest(self, files: Mapping[str, str], number: int) -> str:
        """Changes whenever the code up to chapter ``number``, or that chapter's tests, change."""
        names = [name for below in range(number + 1) for name in self.course.files(below)]
        parts = [name + "\n" + files[name] for name in names if name in files]
        parts += [self.course.read(test) for test in self.course.chapter(number).tests]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def reset(self, task_id: str, *, force: bool = False) -> Change:
        """Make one task blank again; forced, give its whole files anew. A backup is kept."""
        chapter, task = self.course.task(task_id)
        progress = self.progress()
        if chapter.number > progress.chapter:
            raise CourseError(f"the workspace has no chapter {chapter.number} yet")
        files = self.files()
        names = list(dict.fromkeys(target.file for target in task.targets))
        again = [task]
        if force:
            planned = starter(self.course, chapter.number)
            again = [found for name in names for found in tasks_in(self.course, name)]
        else:
            self._refuse_lost_targets(files, task)
            planned = with_blanks(with_solutions(self.course, files, [task]), [task])
        change = Change(written=names, backup=self.back_up())
        fresh = {name: planned[name] for name in names}
        write(self.course, fresh, self.folder)
        note(self.course, progress, fresh)
        for lost in again:
            progress.green.pop(lost.id, None)
            if lost.id in progress.given:
                progress.given.remove(lost.id)
        progress.finished.pop(str(chapter.number), None)
        progress.save(self.folder)
        return change

    def _refuse_lost_targets(self, files: Mapping[str, str], task: Task) -> None:
        anew = f"`python -m chapters reset {task.id} --force`"
        for target in task.targets:
            if target.file not in files:
                raise CourseError(f"{FOLDER}/{target.file} is missing; {anew} gives it anew")
            self.refuse_unfinished_file(files, target.file)
            try:
                find(files[target.file], target.name)
            except SourceError as error:
                raise CourseError(
                    f"{FOLDER}/{target.file}: {error}; write its `def` line again, or let {anew} "
                    "give the file anew (a backup is kept)"
                ) from None

    def back_up(self) -> Path:
        """Copy the learner's package and notes to a dated folder; returns it."""
        stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder, copies = self.folder / BACKUPS / stamp, 1
        while folder.exists():
            copies += 1
            folder = self.folder / BACKUPS / f"{stamp}_{copies}"
        ignore = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(self.folder / PACKAGE, folder / PACKAGE, ignore=ignore)
        if (self.folder / FILE).exists():
            shutil.copy2(self.folder / FILE, folder / FILE)
        return folder
