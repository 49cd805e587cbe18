"""What the course's texts take from the code: quotes, the table of chapters, package maps.

A marker line stands before the block that :func:`filled` writes; the rest of the text is left
alone. ``python -m chapters sync`` fills all texts, and a test compares.

    <!-- quote minivllm/layers/layernorm.py:rms_norm -->            followed by a fenced block
    <!-- quote minivllm/layers/layernorm.py:rms_norm signature -->  also: body
    <!-- quote minivllm/layers/activation.py -->                    a whole file
    <!-- map 3 -->              the package after chapter 3, new files marked; a fenced block
    <!-- table of chapters -->  followed by a Markdown table
    <!-- hints 3.2 -->          the task's hints, folded; up to <!-- end of hints -->
    <!-- bug 3.a -->            symptom, how to plant it, diagnosis; up to <!-- end of bug -->
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from chapters.machine.manifest import Course, CourseError
from chapters.machine.source import SourceError, quoted_part

PARTS = ("all", "signature", "body")
_MARKER = re.compile(r"\s*<!--\s*(quote|map|table of chapters|hints|bug)\b(.*?)-->\s*$")
_ENDED = ("hints", "bug")  # their blocks are prose, which needs a line that says where it ends


def course_texts(root: Path) -> list[Path]:
    """Every Markdown text of the course."""
    chapters = sorted((root / "chapters").rglob("*.md"))
    return [*sorted(root.glob("*.md")), *chapters]


def quoted(root: Path, ref: str, part: str = "all") -> str:
    """The source text that ``ref`` names; ValueError if there is none. See ``chapters.quote``."""
    if part not in PARTS:
        raise ValueError(f"part={part!r} is unknown; use one of {', '.join(PARTS)}")
    file, _, name = ref.partition(":")
    path = root / file
    if not path.is_file():
        raise ValueError(f"{ref}: there is no file {file} in the repository")
    source = path.read_text(encoding="utf-8")
    if not name:
        return source.rstrip("\n")
    try:
        return quoted_part(source, name, part)
    except SourceError as error:
        raise ValueError(f"{ref}: {error}") from None


def filled(course: Course, text: str) -> str:
    """``text`` with the block behind every marker made anew; CourseError says what is wrong."""
    lines = text.split("\n")
    result: list[str] = []
    index, fence = 0, ""
    while index < len(lines):
        line = lines[index]
        index += 1
        result.append(line)
        if fence:
            fence = "" if line.strip() == fence else fence
            continue
        fence = opened_fence(line)
        marker = _MARKER.match(line)
        if "<!-- quote" in line and not marker:
            raise CourseError(f"line {index}: a quote marker needs a line of its own: {line}")
        if fence or not marker:
            continue
        if line != line.strip():
            raise CourseError(f"line {index}: a marker must begin at the margin: {line}")
        kind, argument = marker[1], marker[2].strip()
        try:
            result += _block(course, kind, argument)
            index = _end_of_block(lines, index, kind)
        except (ValueError, CourseError) as error:
            raise CourseError(f"line {index}: {error}") from None
    return "\n".join(result)


def opened_fence(line: str) -> str:
    """The backticks of a fenced block that begins on this line, or nothing."""
    match = re.match(r"\s*(`{3,})[^`]*$", line)
    return match[1] if match else ""


def _block(course: Course, kind: str, argument: str) -> list[str]:
    if kind == "quote":
        ref, _, part = argument.partition(" ")
        return _fenced(quoted(course.root, ref, part.strip() or "all"), "python")
    if kind == "map":
        if not argument.isdigit() or int(argument) not in course.chapters:
            raise ValueError(f"map {argument!r} must name a chapter")
        return _fenced("\n".join(package_map(course, int(argument))), "text")
    if kind == "hints":
        return [*folded_hints(course, argument), f"<!-- end of {kind} -->"]
    if kind == "bug":
        return [*bug_report(course, argument), f"<!-- end of {kind} -->"]
    return list(chapter_table(course))


def _fenced(code: str, language: str) -> list[str]:
    longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
    fence = "`" * (longest + 1)
    return [fence + language, *code.split("\n"), fence]


def _end_of_block(lines: list[str], index: int, kind: str) -> int:
    """The line behind the block that follows a marker, or ``index`` if none follows."""
    start = index
    if kind in _ENDED:
        for end in range(start, len(lines)):
            if lines[end].strip() == f"<!-- end of {kind} -->":
                return end + 1
            if _MARKER.match(lines[end]):
                break
        return index
    while start < len(lines) and not lines[start].strip():
        start += 1
    if kind == "table of chapters":
        while start < len(lines) and lines[start].startswith("|"):
            start, index = start + 1, start + 1
        return index
    fence = opened_fence(lines[start]) if start < len(lines) else ""
    if not fence:
        return index
    for end in range(start + 1, len(lines)):
        if lines[end].strip() == fence:
            return end + 1
    raise ValueError("the fenced block that follows is never closed")


def folded_hints(course: Course, task_id: str) -> Iterator[str]:
    """A task's hints, each to be unfolded by itself."""
    _, task = course.task(task_id)
    for step, hint in enumerate(task.hints, start=1):
        yield from _folded(f"Hint {step}", [hint])


def bug_report(course: Course, bug_id: str) -> Iterator[str]:
    """A planted bug: what the reader sees, and folded, how to plant it and what it is."""
    bugs = [bug for chapter in course.chapters.values() for bug in chapter.bugs]
    bug = next((bug for bug in bugs if bug.id == bug_id), None)
    if bug is None:
        raise ValueError(f"there is no bug {bug_id!r}; there are {', '.join(b.id for b in bugs)}")
    yield f"**{bug.id} {bug.title}.** {bug.symptom}"
    yield ""
    changed = [
        sign + row
        for sign, text in (("-", bug.find), ("+", bug.replace))
        for row in textwrap.dedent(text.strip("\n")).split("\n")
    ]
    patch = [f"In `workspace/{bug.file}`:", "", *_fenced("\n".join(changed), "diff")]
    yield from _folded("Plant it", patch)
    yield from _folded("Diagnosis", [bug.answer])


def _folded(title: str, rows: list[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *rows, "", "</details>"]


def replace_block(file: Path, mark: str, content: str) -> None:
    """Write ``content`` between ``<!-- mark -->`` and ``<!-- end of (its first word) -->``.

    Raises ValueError if ``file`` has no such block. For what a measurement puts into a text.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark.split()[0]} -->"
    text = file.read_text(encoding="utf-8")
    before, found, rest = text.partition(f"{begin}\n")
    _, closed, after = rest.partition(f"\n{end}")
    if not found or not closed:
        raise ValueError(f"{file.name} has no block from {begin} to {end}")
    file.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")


def chapter_table(course: Course) -> Iterator[str]:
    """The Markdown table of the chapters."""
    yield "| | chapter | adds | at its end you can | tasks |"
    yield "|---|---|---|---|---|"
    for chapter in course.chapters.values():
        title = chapter.title
        if chapter.text.exists():
            title = f"[{title}]({chapter.text.relative_to(course.root).as_posix()})"
        adds = ", ".join(f"`{path.removeprefix('minivllm/')}`" for path in chapter.adds)
        tasks = len(chapter.tasks) or ""
        yield f"| {chapter.number} | {title} | {adds} | {chapter.brings} | {tasks} |"


def package_map(course: Course, number: int) -> Iterator[str]:
    """The package after chapter ``number``: a tree, each file with its subject, new ones marked."""
    rows: list[tuple[str, str, bool]] = []
    seen: set[PurePosixPath] = set()
    names = [(below, name) for below in range(1, number + 1) for name in course.files(below)]
    # Folders in the order in which the chapters bring them, which is from the ground up.
    first = {PurePosixPath(name).parent: below for below, name in reversed(names)}
    names.sort(key=lambda item: (first[PurePosixPath(item[1]).parent], item[1]))
    for below, name in names:
        path = PurePosixPath(name)
        for folder in reversed(path.parents[:-1]):
            if folder not in seen:
                seen.add(folder)
                rows.append(("  " * (len(folder.parts) - 1) + f"{folder.name}/", "", False))
        if path.name != "__init__.py":
            label = "  " * (len(path.parts) - 1) + path.name
            rows.append((label, _subject(course, name), below == number))
    width = max((len(label) for label, _, _ in rows), default=0)
    for label, subject, new in rows:
        yield f"{'+' if new else ' '} {label:<{width}}  {subject}".rstrip()


def _subject(course: Course, name: str) -> str:
    """The first sentence of a module's docstring, as far as it fits on a line."""
    if not name.endswith(".py"):
        return ""
    docstring = ast.get_docstring(ast.parse(course.read(name))) or ""
    prose = re.sub(r"\s*\([^)]*\)", "", docstring.replace("\n", " "))
    sentence = re.split(r"[.:;](?:\s|$)", prose)[0]
    return sentence if len(sentence) <= 60 else sentence[:57].rsplit(" ", 1)[0] + " ..."


def sync(course: Course, *, write: bool = True) -> list[Path]:
    """The texts whose generated blocks were out of date; they are rewritten if ``write``."""
    changed = []
    for file in course_texts(course.root):
        old = file.read_bytes().decode("utf-8")
        try:
            new = filled(course, old.replace("\r\n", "\n"))
        except CourseError as error:
            raise CourseError(f"{file.relative_to(course.root).as_posix()}, {error}") from None
        if new != old.replace("\r\n", "\n"):
            changed.append(file)
            if write:
                file.write_bytes(new.encode("utf-8"))
    return changed
