"""The manifests: what each chapter adds to the package, its exercises and its planted bugs."""

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

PACKAGE = "minivllm"
# Paths of the package that only put chapters together, and so belong to none.
ROOF = (
    "minivllm/__init__.py",
    "minivllm/__main__.py",
    "minivllm/llm.py",
    "minivllm/cli.py",
    "minivllm/cli_flags.py",
    "minivllm/chat.py",
    "minivllm/demo.py",
    "minivllm/prompts.py",
    "minivllm/py.typed",
    "minivllm/benchmarks/",
    "minivllm/assets/",
)
# What of the roof a package cut off after any chapter keeps.
ROOF_BELOW = ("minivllm/__init__.py", "minivllm/assets/")


class CourseError(Exception):
    """Something the reader or an author must put right; its text is one clear line."""


@dataclass(frozen=True)
class Target:
    """A function, method or kernel that a task leaves blank: ``file:name``."""

    file: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


@dataclass(frozen=True)
class Task:
    """An exercise: the targets it leaves blank and the tests that gate it."""

    id: str
    title: str
    targets: tuple[Target, ...]
    task: str
    tests: tuple[str, ...]
    hints: tuple[str, ...]
    why: str

    @property
    def label(self) -> str:
        """How failures name the task."""
        return f"Task {self.id} ({self.title})"

    @property
    def message(self) -> str:
        """What the blank of this task fails with."""
        return f"{self.label}: not written yet -> python -m chapters hint {self.id}"


@dataclass(frozen=True)
class Bug:
    """A planted bug: one exact replacement in the reference, and the test that kills it."""

    id: str
    title: str
    file: str
    find: str
    replace: str
    symptom: str
    answer: str
    test: str


@dataclass(frozen=True)
class Chapter:
    """One manifest. ``adds`` and ``tests`` are paths or patterns from the root."""

    number: int
    title: str
    brings: str
    adds: tuple[str, ...]
    tests: tuple[str, ...]
    notebook: str | None
    tasks: tuple[Task, ...]
    bugs: tuple[Bug, ...]
    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "README.md"


@dataclass(frozen=True)
class Course:
    """All chapters of the repository at ``root``."""

    root: Path
    chapters: Mapping[int, Chapter]

    @classmethod
    def load(cls, root: Path) -> "Course":
        """Read every manifest; CourseError names the file and the entry that is wrong."""
        chapters: dict[int, Chapter] = {}
        for file in sorted((root / "chapters").glob("chapter[0-9]*/chapter.toml")):
            chapter = _read(file)
            chapter = replace(chapter, tests=tuple(_expanded(root, chapter.tests)))
            if chapter.number in chapters:
                raise CourseError(f"{_short(file)}: there are two chapters {chapter.number}")
            chapters[chapter.number] = chapter
        return cls(root, dict(sorted(chapters.items())))

    def chapter(self, number: int) -> Chapter:
        """Chapter ``number``, if it exists and its code is in the package."""
        chapter = self.chapters.get(number)
        if chapter is None:
            raise CourseError(f"there is no chapter {number}; {self._range()}")
        if not self.files(number):
            raise CourseError(f"chapter {number} ({chapter.title}) is not written yet")
        return chapter

    def task(self, task_id: str) -> tuple[Chapter, Task]:
        """The task with this id and its chapter."""
        if not re.fullmatch(r"\d+\.\d+", task_id):
            number = int(task_id) if re.fullmatch(r"\d+", task_id) else 0
            if number not in self.chapters:
                raise CourseError(f"{task_id!r} is no task; a task is written like 1.2")
            tasks = ", ".join(task.id for task in self.chapter(number).tasks) or "no tasks yet"
            raise CourseError(f"{task_id} is a chapter; name one of its tasks: {tasks}")
        chapter = self.chapter(int(task_id.split(".")[0]))
        for task in chapter.tasks:
            if task.id == task_id:
                return chapter, task
        there = ", ".join(task.id for task in chapter.tasks) or "none yet"
        raise CourseError(f"there is no task {task_id}; chapter {chapter.number} has {there}")

    def _range(self) -> str:
        written = [number for number in self.chapters if self.files(number)]
        if not written:
            return "the course has no chapters yet"
        return f"chapters {written[0]} to {written[-1]} are written"

    @cached_property
    def package_files(self) -> tuple[str, ...]:
        """Every file of the reference package, as paths from the root, with forward slashes."""
        found = (self.root / PACKAGE).rglob("*")
        names = (file.relative_to(self.root).as_posix() for file in found if file.is_file())
        return tuple(sorted(name for name in names if "__pycache__" not in name))

    def owners(self, file: str) -> list[int]:
        """The chapters that claim ``file`` most closely; 0 is the roof. One, unless it is wrong.

        A claim by name goes before a claim by pattern, and that before a claim by folder: so a
        chapter can take one file out of another chapter's folder.
        """
        claims = [(_closeness(file, path), 0) for path in ROOF]
        for chapter in self.chapters.values():
            claims += [(_closeness(file, path), chapter.number) for path in chapter.adds]
        best = max(closeness for closeness, _ in claims)
        if best == (0, 0):
            return []
        return sorted({number for closeness, number in claims if closeness == best})

    def files(self, number: int) -> list[str]:
        """The files that chapter ``number`` adds; 0 is the roof."""
        return list(self._files_by_chapter.get(number, []))

    @cached_property
    def _files_by_chapter(self) -> dict[int, list[str]]:
        by_chapter: dict[int, list[str]] = {}
        for file in self.package_files:
            owners = self.owners(file)
            if len(owners) == 1:
                by_chapter.setdefault(owners[0], []).append(file)
        return by_chapter

    def read(self, file: str) -> str:
        """The text of a file of the repository, its line ends untouched."""
        return (self.root / file).read_bytes().decode("utf-8")


def _expanded(root: Path, patterns: Iterable[str]) -> Iterator[str]:
    """Paths as they are, patterns as the files that they match; unmatched ones stay."""
    for pattern in patterns:
        files = sorted(root.glob(pattern)) if "*" in pattern else []
        yield from [file.relative_to(root).as_posix() for file in files] or [pattern]


def _closeness(file: str, claim: str) -> tuple[int, int]:
    """How closely a claim fits: (3, _) by name, (2, _) by pattern, (1, depth) by folder."""
    if file == claim:
        return 3, 0
    if claim.endswith("/"):
        return (1, len(claim)) if file.startswith(claim) else (0, 0)
    return (2, 0) if "*" in claim and fnmatch.fnmatchcase(file, claim) else (0, 0)


def _read(file: Path) -> Chapter:
    where = _short(file)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CourseError(f"{where} is not valid TOML: {error}") from None
    top = _Table(where, content)
    head = _Table(f"{where} [chapter]", top.take("chapter", dict))
    number = head.take("number", int)
    if not file.parent.name.startswith(f"chapter{number:02d}_"):
        raise CourseError(f"{where}: number = {number}, but the folder is {file.parent.name}")
    chapter = Chapter(
        number=number,
        title=head.take("title", str),
        brings=head.take("brings", str),
        adds=head.strings("adds"),
        tests=head.strings("tests"),
        notebook=head.take("notebook", str, None),
        tasks=tuple(_tasks(where, number, top.take("task", list, []))),
        bugs=tuple(_bugs(where, number, top.take("bug", list, []))),
        folder=file.parent,
    )
    head.finish()
    top.finish()
    return chapter


def _tasks(where: str, number: int, entries: list[dict[str, Any]]) -> Iterator[Task]:
    for position, entry in enumerate(entries, start=1):
        table = _Table(f"{where} task {position}", entry)
        task = Task(
            id=table.take("id", str),
            title=table.take("title", str),
            targets=tuple(_target(table.where, text) for text in table.strings("targets")),
            task=table.take("task", str),
            tests=table.strings("tests"),
            hints=table.strings("hints"),
            why=table.take("why", str),
        )
        table.finish()
        if task.id != f"{number}.{position}":
            raise CourseError(f"{table.where} has id {task.id!r}; it must be {number}.{position}")
        if len(task.hints) != 3:
            raise CourseError(f"{table.where} has {len(task.hints)} hints; it must have 3")
        if not task.targets or not task.tests:
            raise CourseError(f"{table.where} needs at least one target and one test")
        yield task


def _bugs(where: str, number: int, entries: list[dict[str, Any]]) -> Iterator[Bug]:
    for position, entry in enumerate(entries):
        table = _Table(f"{where} bug {position + 1}", entry)
        names = ("id", "title", "file", "find", "replace", "symptom", "answer", "test")
        bug = Bug(**{name: table.take(name, str) for name in names})
        table.finish()
        expected = f"{number}.{'abcdefghij'[position]}"
        if bug.id != expected:
            raise CourseError(f"{table.where} has id {bug.id!r}; it must be {expected}")
        yield bug


def _target(where: str, text: str) -> Target:
    file, _, name = text.partition(":")
    if not name or not file.endswith(".py"):
        raise CourseError(f"{where}: target {text!r} must be written like folder/file.py:name")
    return Target(file, name)


_REQUIRED = object()


class _Table:
    """A TOML table whose entries are taken out one by one, so that a misspelt one is noticed."""

    def __init__(self, where: str, content: dict[str, Any]) -> None:
        self.where = where
        self._left = dict(content)

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            raise CourseError(f"{self.where} has no {name!r}")
        if value is not default and not isinstance(value, kind):
            raise CourseError(f"{self.where}: {name} must be a {kind.__name__}, not {value!r}")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.take(name, list)
        if not all(isinstance(item, str) for item in value):
            raise CourseError(f"{self.where}: {name} must be a list of strings")
        return tuple(value)

    def finish(self) -> None:
        if self._left:
            raise CourseError(f"{self.where} has unknown entries: {', '.join(self._left)}")


def _short(file: Path) -> str:
    return "/".join(file.parts[-3:])
