"""Given code that the course has changed since: brought up to date where the learner left it alone.

What the course gives of a file is all of it but its exercises. A digest of that, the file's frame,
is noted whenever a file is given. As long as the learner's file has the noted frame, the rest of it
can be exchanged for today's, and the learner's exercises stay word for word.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from chapters.machine.manifest import Course, Target, Task
from chapters.machine.package import cut_off, starter, with_blanks
from chapters.machine.progress import Progress
from chapters.machine.source import SourceError, find, is_blank, replaced, text_of


@dataclass
class Refresh:
    """files: path -> today's text, with the learner's exercises in it.

    kept: given files that differ from today's, and in which the learner has changed more than the
    exercises (or nobody noted how they were given).
    """

    files: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def tasks_in(course: Course, file: str) -> list[Task]:
    """The tasks that have a target in ``file``."""
    return [
        task
        for chapter in course.chapters.values()
        for task in chapter.tasks
        if any(target.file == file for target in task.targets)
    ]


def frame(text: str, exercises: Iterable[str]) -> str:
    """A digest of a file without the definitions in ``exercises``; SourceError if one is not there.

    Blank lines at the file's end do not count.
    """
    for name in exercises:
        found = find(text, name)
        lines = text.split("\n")
        lines[found.first - 1 : found.last] = [f"exercise {name}"]
        # A placeholder is no Python, but a definition that is none either can hold its place.
        indent = " " * found.node.col_offset
        lines[found.first - 1] = f"{indent}def {name.split('.')[-1]}(): ..."
        text = "\n".join(lines)
    return hashlib.sha256(text.rstrip().encode()).hexdigest()


def frame_in(course: Course, file: str, text: str) -> str | None:
    """The frame of the learner's, or anybody's, ``file``; None if it cannot be told."""
    try:
        return frame(text, _exercises(course, file))
    except SourceError:
        return None


def note(course: Course, progress: Progress, files: Mapping[str, str]) -> None:
    """Note the frames of those ``files`` that are as the course gives them today."""
    for file, text in files.items():
        if file not in course.package_files:
            continue
        today = frame_in(course, file, course.read(file))
        if today is not None and frame_in(course, file, text) == today:
            progress.frames[file] = today


def plan(course: Course, files: Mapping[str, str], progress: Progress) -> Refresh:
    """What is to be exchanged in ``files`` up to the chapter at which the workspace stands."""
    result = Refresh()
    below = set(cut_off(course, progress.chapter))
    for number in range(progress.chapter + 1):
        for file in course.files(number):
            if file not in below:
                continue
            if file not in files:
                # Nobody lost it: the course has it only now. A lost one is for `start` to tell.
                if progress.frames and file not in progress.frames:
                    given = starter(course, number) if number else cut_off(course, 0)
                    result.files[file] = given[file]
                continue
            today = frame_in(course, file, course.read(file))
            mine = frame_in(course, file, files[file])
            if mine is None or mine == today:
                continue
            if mine == progress.frames.get(file):
                result.files[file] = _today(course, file, files[file], progress.chapter)
            else:
                result.kept.append(file)
    return result


def _exercises(course: Course, file: str) -> list[str]:
    if not file.endswith(".py"):
        return []
    targets = (target for task in tasks_in(course, file) for target in task.targets)
    return [target.name for target in targets if target.file == file]


def _today(course: Course, file: str, mine: str, chapter: int) -> str:
    """Today's ``file`` with the exercises up to ``chapter`` as they stand in ``mine``.

    What is blank there is blanked anew.
    """
    text = course.read(file)
    for task in tasks_in(course, file):
        if int(task.id.split(".")[0]) > chapter:
            continue
        blank: list[Target] = []
        for target in task.targets:
            if target.file != file:
                continue
            if is_blank(mine, target.name, task.id):
                blank.append(target)
            else:
                text = replaced(text, target.name, text_of(mine, target.name))
        text = with_blanks({file: text}, [replace(task, targets=tuple(blank))])[file]
    return text
