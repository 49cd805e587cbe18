"""The packages that the course makes from the reference: cut off after a chapter, and starters."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from chapters.machine.manifest import PACKAGE, ROOF_BELOW, Course, CourseError, Task
from chapters.machine.source import SourceError, blanked, replaced, text_of

ASSETS = f"{PACKAGE}/assets"


def cut_off(course: Course, number: int) -> dict[str, str]:
    """The reference after chapter ``number``: path -> text. Assets are left to :func:`write`."""
    names = [name for name in course.files(0) if name.startswith(ROOF_BELOW)]
    for below in range(1, number + 1):
        names += course.files(below)
    return {name: course.read(name) for name in names if not name.startswith(ASSETS)}


def starter(course: Course, number: int) -> dict[str, str]:
    """:func:`cut_off`, with the exercises of chapter ``number`` left blank."""
    return with_blanks(cut_off(course, number), course.chapter(number).tasks)


def with_blanks(files: Mapping[str, str], tasks: Iterable[Task]) -> dict[str, str]:
    """``files`` with every target of ``tasks`` blank."""
    result = dict(files)
    for task in tasks:
        for target in task.targets:
            if target.file not in result:
                raise CourseError(f"{task.label}: {target.file} is in no chapter up to its own")
            note = f"{task.label}: {task.task}"
            try:
                result[target.file] = blanked(result[target.file], target.name, note, task.message)
            except SourceError as error:
                raise CourseError(f"{task.label}: {target.file}: {error}") from None
    return result


def with_solutions(
    course: Course, files: Mapping[str, str], tasks: Iterable[Task]
) -> dict[str, str]:
    """``files`` with every target of ``tasks`` replaced by the reference's text."""
    result = dict(files)
    for task in tasks:
        for target in task.targets:
            if target.file not in result:
                raise CourseError(f"{target.file} is missing")
            solution = text_of(course.read(target.file), target.name)
            try:
                result[target.file] = replaced(result[target.file], target.name, solution)
            except SourceError as error:
                raise CourseError(f"{target.file}: {error}") from None
    return result


def write(course: Course, files: Mapping[str, str], parent: Path, *, link: bool = False) -> None:
    """Write ``files`` below ``parent``, and the assets beside them, linked if ``link``."""
    for name, text in files.items():
        write_file(parent / name, text)
    assets, copy = course.root / ASSETS, parent / ASSETS
    if not assets.is_dir() or copy.exists():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    if link:
        copy.symlink_to(assets, target_is_directory=True)
    else:
        shutil.copytree(assets, copy, ignore=shutil.ignore_patterns("__pycache__"))


def write_file(file: Path, text: str) -> None:
    """Write ``text`` so that ``file`` is never seen half-written, its line ends untouched."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_bytes(text.encode("utf-8"))
    fresh.replace(file)
