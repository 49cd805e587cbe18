"""What can go stale in a text: its links, its figures and its shell lines."""

import ast
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from chapters.machine.cli import build_parser, chapter_number
from chapters.machine.manifest import Course, CourseError
from chapters.machine.texts import opened_fence, quoted

_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_ATTRIBUTE = re.compile(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"\s]+)\"")
_REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
# Commands that a text may use and whose arguments are no matter of this repository.
_ELSEWHERE = {"git", "cd", "curl", "export", "ls", "cat", "nvidia-smi", "torchrun", "wget"}
_UV = {"run", "sync", "venv", "pip", "tool", "build"}
_JUPYTER = {"lab", "notebook", "nbconvert", "execute"}


def link_problems(course: Course, file: Path) -> Iterator[str]:
    """Relative links and figures of a Markdown file that lead nowhere, anchors included."""
    text = _without_code(file.read_text(encoding="utf-8"))
    found = [
        match[1] for pattern in (_LINK, _ATTRIBUTE, _REFERENCE) for match in pattern.finditer(text)
    ]
    for link in found:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file.resolve()
        if not target.exists():
            yield f"link to {link}: there is no {path}"
        elif not target.is_relative_to(course.root.resolve()):
            yield f"link to {link} leaves the repository"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"link to {link}: {target.name} has no heading #{anchor}"


def anchors(file: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub names them."""
    text = _without_code(file.read_text(encoding="utf-8"), inline=False)
    found: dict[str, int] = {}
    result = set(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        result.add(f"{slug}-{count}" if count else slug)
    return result


def _without_code(text: str, *, inline: bool = True) -> str:
    lines, fence = [], ""
    for line in text.split("\n"):
        if fence:
            fence = "" if line.strip() == fence else fence
            continue
        fence = opened_fence(line)
        if not fence:
            lines.append(re.sub(r"`[^`]*`", "``", line) if inline else line)
    return "\n".join(lines)


def shell_lines(text: str) -> Iterator[tuple[int, str]]:
    """The commands in ```console blocks, with their line numbers; they begin with ``$ ``."""
    fence, language, continued = "", "", ""
    for number, line in enumerate(text.split("\n"), start=1):
        if fence:
            if line.strip() == fence:
                fence = ""
            elif language == "console" and (line.startswith("$ ") or continued):
                command = continued + line.removeprefix("$ ")
                continued = command[:-1] if command.endswith("\\") else ""
                if not continued:
                    yield number, command
            continue
        fence = opened_fence(line)
        language = line.strip().strip("`").strip() if fence else ""


def shell_problem(course: Course, line: str) -> str | None:
    """Why a shell line of a text cannot work, or None."""
    for command in re.split(r"\s(?:&&|\|)\s", line):
        try:
            words = shlex.split(command, comments=True)
        except ValueError as error:
            return f"not a shell line: {error}"
        while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
            words = words[1:]
        problem = _command_problem(course, words)
        if problem:
            return problem
    return None


def _command_problem(course: Course, words: Sequence[str]) -> str | None:
    if not words:
        return "an empty command"
    name, rest = words[0], list(words[1:])
    if name == "uv":
        if not rest or rest[0] not in _UV:
            return f"uv {rest[0] if rest else ''} is not known"
        if rest[0] != "run":
            return None
        rest = rest[1:]
        while rest and rest[0].startswith("-"):
            rest = rest[1:]
        return _command_problem(course, rest)
    if name in ("python", "python3"):
        return _python_problem(course, rest)
    if name == "pytest":
        return _pytest_problem(course, rest)
    if name == "minivllm":
        return _cli_problem(course, rest)
    if name == "jupyter":
        if not rest or rest[0] not in _JUPYTER:
            return f"jupyter {rest[0] if rest else ''} is not known"
        return _missing_paths(course, rest[1:])
    return None if name in _ELSEWHERE else f"{name} is no command of this course"


def _python_problem(course: Course, words: list[str]) -> str | None:
    if words[:2] == ["-m", "chapters"]:
        return _chapters_problem(course, words[2:])
    if words[:2] == ["-m", "pytest"]:
        return _pytest_problem(course, words[2:])
    if words[:2] == ["-m", "minivllm"]:
        return _cli_problem(course, words[2:])
    if words and words[0] == "-m":
        base = course.root / "/".join(words[1:2]).replace(".", "/")
        file = base / "__main__.py" if base.is_dir() else base.with_suffix(".py")
        if not file.is_file():
            return f"there is no module {' '.join(words[1:2])}"
        files = [file]
        if "ask_parser(" in file.read_text(encoding="utf-8"):  # it has the shared options, too
            files.append(course.root / "chapters/machine/asking.py")
        return _unknown_options(files, words[2:])
    if words and words[0] == "-c":
        return None
    return _missing_paths(course, words[:1])


def _chapters_problem(course: Course, words: list[str]) -> str | None:
    if words in (["--help"], ["-h"]):
        return None
    try:
        arguments = build_parser().parse_args(words)
        chapter = getattr(arguments, "chapter", None)
        if chapter is not None and arguments.command == "check" and "." in chapter:
            course.task(chapter)
        elif chapter is not None:
            course.chapter(chapter_number(chapter))
        if getattr(arguments, "task", None) is not None:
            course.task(arguments.task)
    except CourseError as error:
        return str(error)
    return None


def _pytest_problem(course: Course, words: list[str]) -> str | None:
    flags = {"--workspace", "-x", "-q", "-v", "-s", "-rs", "--lf", "--co"}
    words = list(words)
    while words:
        word = words.pop(0)
        if word in ("-k", "-m", "-n"):
            value = words.pop(0) if words else ""
            if word == "-k" and not _selects(course, value):
                return f"pytest -k {value} selects no test"
        elif word.startswith("-"):
            if word not in flags:
                return f"pytest {word} is not known to the texts' check"
        elif not (course.root / word.split("::")[0]).exists():
            return f"there is no {word}"
    return None


def _selects(course: Course, expression: str) -> bool:
    """Whether every word of a ``-k`` expression occurs in a test's file or function name."""
    names = []
    for file in (course.root / "tests").glob("test_*.py"):
        functions = re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
        names += [file.name, *functions]
    wanted = [word for word in re.findall(r"\w+", expression) if word not in ("and", "or", "not")]
    return bool(wanted) and all(any(word in name for name in names) for word in wanted)


def _cli_problem(course: Course, words: list[str]) -> str | None:
    """Subcommands and options of ``minivllm`` must stand as strings in its parser."""
    names = ("cli.py", "cli_flags.py", "demo.py")
    files = [course.root / "minivllm" / name for name in names]
    files += (course.root / "minivllm/benchmarks").rglob("*.py")
    files = [file for file in files if file.is_file()]
    known = {text for file in files for text in _strings(file)}
    if words and not words[0].startswith("-") and words[0] not in known:
        return f"minivllm has no command {words[0]}"
    return _unknown_options(files, words)


def _unknown_options(files: Sequence[Path], words: Sequence[str]) -> str | None:
    known = {text for file in files for text in _strings(file)} | {"-h", "--help"}
    for word in words:
        option = word.split("=")[0]
        if option.startswith("--") and option not in known:
            return f"{option} is no option of {', '.join(file.name for file in files) or 'it'}"
    return None


def _strings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _missing_paths(course: Course, words: Sequence[str]) -> str | None:
    for word in words:
        if not word.startswith("-") and not (course.root / word).exists():
            return f"there is no {word}"
    return None


def notebook_problems(course: Course, file: Path) -> Iterator[str]:
    """Quotes of a notebook that name nothing."""
    cells = json.loads(file.read_text(encoding="utf-8")).get("cells", [])
    for cell in cells:
        if cell.get("cell_type") != "code":
            continue
        for ref in re.findall(r"quote\(\s*[\"']([^\"']+)[\"']", "".join(cell["source"])):
            try:
                quoted(course.root, ref)
            except ValueError as error:
                yield str(error)
