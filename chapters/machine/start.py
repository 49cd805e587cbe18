"""``start N``: make the workspace, or bring it to chapter N without losing a line of it."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chapters.machine import refresh
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

    Before anything else, given code that the course has changed since is brought up to date where
    the learner has left it alone.
    """

    workspace: Workspace
    number: int
    solved: bool = False
    force: bool = False

    def run(self) -> Change:
        """Do it. CourseError says why not; then nothing but given code was brought up to date."""
        course, folder = self.workspace.course, self.workspace.folder
        course.chapter(self.number)
        if not self.workspace.exists:
            return self._make()
        progress = Progress.load(folder)
        if progress is None:
            progress = Progress(self._last_chapter_there())
            progress.save(folder)
        if self.number < progress.chapter and not self.force:
            raise CourseError(
                f"the workspace already stands at chapter {progress.chapter}, and `check "
                f"{self.number}` works there; `start {self.number} --force` begins chapter "
                f"{self.number} anew and takes the later files away (a backup is kept)"
            )
        first = self._refresh(progress)
        try:
            change = (self._advance if self.number > progress.chapter else self._again)(progress)
        except CourseError as error:
            if not first.refreshed:
                raise
            files = ", ".join(first.refreshed)
            raise CourseError(f"{error}. (Brought up to date with the course: {files})") from None
        change.refreshed = first.refreshed
        change.backup = change.backup or first.backup
        return change

    def _refresh(self, progress: Progress) -> Change:
        """Bring given code up to date. A backup is kept, for exercises move along with it."""
        course, workspace, change = self.workspace.course, self.workspace, Change()
        files = workspace.files()
        refresh.note(course, progress, files)
        planned = refresh.plan(course, files, progress).files
        if planned:
            change.backup = workspace.back_up()
            change.refreshed = list(planned)
            write(course, planned, workspace.folder)
            refresh.note(course, progress, planned)
        progress.save(workspace.folder)
        return change

    def _make(self) -> Change:
        """No workspace yet: the starter, with the chapters below from the reference."""
        files = starter(self.workspace.course, self.number)
        below = range(1, self.number)
        given = [task for number in below for task in self.workspace.tasks(number)]
        write(self.workspace.course, files, self.workspace.folder)
        progress = Progress(self.number, given=[task.id for task in given])
        refresh.note(self.workspace.course, progress, files)
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
        refresh.note(course, progress, planned)
        progress.chapter = self.number
        progress.save(workspace.folder)
        return change

    def _advance(self, progress: Progress) -> Change:
        """Add the chapter to a workspace whose earlier chapters are green."""
        workspace, course, change = self.workspace, self.workspace.course, Change()
        files = workspace.files()
        planned = dict(files)
        reports: dict[int, Report] = {}
        for number in range(1, self.number):
            if number > progress.chapter:
                self._plan_left_out(number, planned, change)
            elif not self._is_finished(number, files, progress, reports):
                self._plan_unfinished(number, planned, change, reports.get(number))
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
        fresh_files = {name: planned[name] for name in change.written}
        write(course, fresh_files, workspace.folder)
        refresh.note(course, progress, fresh_files)
        progress.given = sorted({*progress.given, *(task.id for task in change.given)})
        progress.chapter = self.number
        progress.save(workspace.folder)
        return change

    def _is_finished(
        self,
        number: int,
        files: Mapping[str, str],
        progress: Progress,
        reports: dict[int, Report],
    ) -> bool:
        """Whether chapter ``number`` is green: as the reference, by the notes, or by its tests.

        What the tests said, if they ran, is put into ``reports``.
        """
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
        reports[number] = report
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

    def _plan_unfinished(
        self, number: int, planned: dict[str, str], change: Change, report: Report | None
    ) -> None:
        """A chapter that is not green: fill its blanks if that was asked for, else refuse."""
        workspace, course = self.workspace, self.workspace.course
        tasks = workspace.tasks(number)
        if self.force:
            planned.update({name: course.read(name) for name in course.files(number)})
            change.given += tasks
            return
        blank = [task for task in tasks if blank_targets(planned, task)]
        if not self.solved:
            if not blank and report is not None:
                raise CourseError(self._why_red(number, planned, report))
            missing = f"{', '.join(task.id for task in blank)} to write"
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

    def _why_red(self, number: int, files: Mapping[str, str], report: Report) -> str:
        """Which tests of chapter ``number`` are red although no exercise is blank; what to do."""
        tasks = self.workspace.tasks(number)
        of_task = {name: task.id for task in reversed(tasks) for name in task.tests}
        names = list(dict.fromkeys(o.name for o in report.outcomes if o.status == "failed"))
        found = [f"{name} ({of_task[name]})" if name in of_task else name for name in names]
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        what = ", ".join(found[:3]) + more or report.broken
        text = (
            f"chapter {number} is not green yet; red: {what}. `check {number}` says why; mend it, "
            f"or make a task blank with `reset {number}.K`, or take the whole chapter from the "
            f"reference with `start {self.number} --force` (a backup is kept)"
        )
        progress = Progress.load(self.workspace.folder)
        kept = refresh.plan(self.workspace.course, files, progress).kept if progress else []
        if kept:
            text += (
                ". Not as the course gives it today, apart from its exercises: "
                f"{', '.join(f'{FOLDER}/{name}' for name in kept)}; to get such a file anew, "
                f"delete it and say `start {progress.chapter}`"
            )
        return text

    def _try(self, files: Mapping[str, str], number: int) -> Report:
        """The tests of chapter ``number`` on ``files``, written somewhere else."""
        with tempfile.TemporaryDirectory() as scratch:
            write(self.workspace.course, files, Path(scratch))
            tests = self.workspace.course.chapter(number).tests
            return run_tests(self.workspace.course, Path(scratch), tests)
