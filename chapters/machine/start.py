"""``start N``: make the workspace, or bring it to chapter N without losing a line of it."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chapters.machine.manifest import CourseError
from chapters.machine.package import cut_off, starter, with_solutions, write
from chapters.machine.progress import Progress
from chapters.machine.runner import Report, run_tests
from chapters.machine.standing import blank_targets, is_green, standing
from chapters.machine.workspace import FOLDER, Change, Workspace


@dataclass(frozen=True)
class Start:
    """``start`` with its options.

    solved: fill what is missing of earlier chapters from the reference, and keep the rest.
    force: overwrite what stands in the way; a dated backup is kept.
    """

    workspace: Workspace
    number: int
    solved: bool = False
    force: bool = False

    def run(self) -> Change:
        """Do it. CourseError says why not, and then nothing was written."""
        course, folder = self.workspace.course, self.workspace.folder
        course.chapter(self.number)
        if not self.workspace.exists:
            return self._make()
        progress = Progress.load(folder)
        if progress is None:
            progress = Progress(self._last_chapter_there())
            progress.save(folder)
        if self.number > progress.chapter:
            return self._advance(progress)
        if self.number < progress.chapter and not self.force:
            raise CourseError(
                f"the workspace already stands at chapter {progress.chapter}, and `check "
                f"{self.number}` works there; `start {self.number} --force` begins chapter "
                f"{self.number} anew and takes the later files away (a backup is kept)"
            )
        return self._again(progress)

    def _make(self) -> Change:
        """No workspace yet: the starter, with the chapters below from the reference."""
        files = starter(self.workspace.course, self.number)
        below = range(1, self.number)
        given = [task for number in below for task in self.workspace.tasks(number)]
        write(self.workspace.course, files, self.workspace.folder)
        progress = Progress(self.number, given=[task.id for task in given])
        progress.save(self.workspace.folder)
        return Change(written=list(files), given=given)

    def _last_chapter_there(self) -> int:
        """Where a workspace without notes stands: at the last chapter of which it has files."""
        course, files = self.workspace.course, self.workspace.files()
        there = [
            number
            for number in course.chapters
            if any(name in files for name in course.files(number))
        ]
        return max(there, default=self.number)

    def _again(self, progress: Progress) -> Change:
        """The chapter once more: put back what is missing, or, forced, all of it."""
        workspace, course, change = self.workspace, self.workspace.course, Change()
        files = workspace.files()
        planned: dict[str, str] = {}
        # A lost file of an earlier chapter comes back as that chapter gave it, exercises blank.
        for number in range(self.number + 1):
            given = starter(course, number) if number in course.chapters else cut_off(course, 0)
            anew = self.force and number == self.number
            for name in course.files(number):
                if name in given and (anew or name not in files):
                    planned[name] = given[name]
        if self.force:
            change.backup = workspace.back_up()
            for number in course.chapters:
                if number >= self.number:
                    progress.forget(number)
                if number > self.number:
                    change.removed += [name for name in course.files(number) if name in files]
        for name in change.removed:
            (workspace.folder / name).unlink()
        change.written = list(planned)
        write(course, planned, workspace.folder)
        progress.chapter = self.number
        progress.save(workspace.folder)
        return change

    def _advance(self, progress: Progress) -> Change:
        """Add the chapter to a workspace whose earlier chapters are green."""
        workspace, course, change = self.workspace, self.workspace.course, Change()
        files = workspace.files()
        planned = dict(files)
        for number in range(1, self.number):
            if number > progress.chapter:
                self._plan_left_out(number, planned, change)
            elif not self._is_finished(number, files, progress):
                self._plan_unfinished(number, planned, change)
        fresh = starter(course, self.number)
        for name in course.files(self.number):
            if files.get(name, fresh[name]) != fresh[name] and not self.force:
                raise CourseError(
                    f"{FOLDER}/{name} is already there, and not as the chapter gives it; move it "
                    f"away, or `start {self.number} --force` replaces it (a backup is kept)"
                )
            planned[name] = fresh[name]
        for name in course.files(0):
            if name in fresh:
                planned.setdefault(name, fresh[name])
        change.written = [name for name, text in planned.items() if files.get(name) != text]
        if self.force:
            change.backup = workspace.back_up()
        write(course, {name: planned[name] for name in change.written}, workspace.folder)
        progress.given = sorted({*progress.given, *(task.id for task in change.given)})
        progress.chapter = self.number
        progress.save(workspace.folder)
        return change

    def _is_finished(self, number: int, files: Mapping[str, str], progress: Progress) -> bool:
        """Whether chapter ``number`` is green: as the reference, by the notes, or by its tests."""
        workspace, course = self.workspace, self.workspace.course
        names = course.files(number)
        if all(files.get(name) == course.read(name) for name in names):
            return True
        if progress.finished.get(str(number)) == workspace.digest(files, number):
            return True
        try:
            workspace.refuse_broken_files(files, number, progress.chapter)
        except CourseError:
            if not self.force:
                raise
            return False
        if any(blank_targets(files, task) for task in workspace.tasks(number)):
            return False
        standings, report = workspace.check(number)
        noted = workspace.progress()
        progress.green, progress.finished = noted.green, noted.finished
        return is_green(standings, report)

    def _plan_left_out(self, number: int, planned: dict[str, str], change: Change) -> None:
        """A chapter that was never started: the reference's, if that was asked for."""
        if not (self.solved or self.force):
            raise CourseError(
                f"chapter {number} was not started yet; `start {number}` begins it, and `start "
                f"{self.number} --solved` takes what is missing from the reference"
            )
        for name in self.workspace.course.files(number):
            planned.setdefault(name, self.workspace.course.read(name))
        change.given += self.workspace.tasks(number)

    def _plan_unfinished(self, number: int, planned: dict[str, str], change: Change) -> None:
        """A chapter that is not green: fill its blanks if that was asked for, else refuse."""
        workspace, course = self.workspace, self.workspace.course
        tasks = workspace.tasks(number)
        if self.force:
            planned.update({name: course.read(name) for name in course.files(number)})
            change.given += tasks
            return
        blank = [task for task in tasks if blank_targets(planned, task)]
        if not self.solved:
            missing = f"{', '.join(task.id for task in blank)} to write" if blank else "red tests"
            raise CourseError(
                f"chapter {number} is not green yet ({missing}); finish it, or `start "
                f"{self.number} --solved` fills the blanks from the reference and keeps the rest"
            )
        filled = with_solutions(course, planned, blank)
        report = self._try(filled, number)
        if not report.green:
            found = [standing(filled, task, report) for task in tasks]
            red = ", ".join(item.task.id for item in found if item.status == "red")
            raise CourseError(
                f"with its blanks filled chapter {number} is still red "
                f"({red or report.broken or 'other tests'}), and that code is yours; mend it, or "
                f"`start {self.number} --force` takes the whole chapter from the reference (a "
                "backup is kept)"
            )
        planned.update(filled)
        change.given += blank

    def _try(self, files: Mapping[str, str], number: int) -> Report:
        """The tests of chapter ``number`` on ``files``, written somewhere else."""
        with tempfile.TemporaryDirectory() as scratch:
            write(self.workspace.course, files, Path(scratch))
            tests = self.workspace.course.chapter(number).tests
            return run_tests(self.workspace.course, Path(scratch), tests)
