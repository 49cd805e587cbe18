"""Find a definition in a source file, blank its body, put it back.

Everything works on spans of lines: ``ast`` says where a definition begins and ends, the text itself
is never regenerated, so comments and formatting survive and a round trip gives the same bytes.
"""

import ast
import io
import json
import textwrap
import tokenize
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef


class SourceError(ValueError):
    """A file that cannot be parsed, or that lacks the definition asked for."""


@dataclass(frozen=True)
class Definition:
    """A function, class or assignment: its node, and its first and last line (from 1).

    The span begins at the first decorator and ends after comments that still belong to the body.
    """

    node: ast.stmt
    first: int
    last: int


def parse(source: str) -> ast.Module:
    """The tree of ``source``; SourceError with line and reason if it is half-written."""
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise SourceError(f"line {error.lineno}: {error.msg}") from None
    except ValueError as error:  # null bytes
        raise SourceError(str(error)) from None


def find(source: str, name: str) -> Definition:
    """The definition called ``name``: ``function``, ``Class``, ``Class.method`` or ``CONSTANT``."""
    body: list[ast.stmt] = parse(source).body
    node: ast.stmt | None = None
    for step in name.split("."):
        named = [statement for statement in body if step in _names(statement)]
        if not named:
            raise SourceError(f"there is no definition of {name}")
        if len(named) > 1:
            raise SourceError(f"there are {len(named)} definitions of {name}")
        node = named[0]
        body = node.body if isinstance(node, ast.ClassDef) else []
    assert node is not None and node.end_lineno is not None
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return Definition(node, first, _last_line(source, node))


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, Function | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


def _last_line(source: str, node: ast.stmt) -> int:
    """The node's last line, or that of the comments behind it which are indented as its body."""
    last = node.end_lineno or node.lineno
    if not isinstance(node, Function | ast.ClassDef):
        return last
    lines = source.split("\n")
    for number in range(last, len(lines)):
        line = lines[number].rstrip()
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("#") and indent > node.col_offset:
            last = number + 1
        elif line:
            break
    return last


def text_of(source: str, name: str) -> str:
    """The lines of ``name`` as they stand in ``source``, indentation included."""
    found = find(source, name)
    return "\n".join(source.split("\n")[found.first - 1 : found.last])


def replaced(source: str, name: str, text: str) -> str:
    """``source`` with the lines of ``name`` replaced by ``text``, which :func:`text_of` gave."""
    found = find(source, name)
    lines = source.split("\n")
    lines[found.first - 1 : found.last] = text.split("\n")
    return "\n".join(lines)


def quoted_part(source: str, name: str, part: str) -> str:
    """``name`` without its indentation: ``all`` of it, its ``signature`` or its ``body``."""
    found = find(source, name)
    lines = source.split("\n")
    first, last = found.first, found.last
    if part != "all":
        if not isinstance(found.node, Function):
            raise SourceError(f"{name} is no function, so it has no {part}")
        head = _head_end(source, found.node)
        first, last = (first, head) if part == "signature" else (head + 1, last)
    return textwrap.dedent("\n".join(line.rstrip() for line in lines[first - 1 : last])).strip("\n")


def blanked(source: str, name: str, note: str, message: str) -> str:
    """``source`` with the body of the function ``name`` replaced by a failing line.

    Decorators, signature and docstring stay. ``note`` becomes a comment. ``message`` is raised as
    NotImplementedError, or, since a Triton kernel cannot raise, asserted at compile time:
    ``tl.static_assert`` fails with it in the compiler and in the interpreter alike.
    """
    found = find(source, name)
    node = found.node
    if not isinstance(node, Function):
        raise SourceError(f"{name} is no function or method")
    lines = source.split("\n")
    newline = "\r" if lines[0].endswith("\r") else ""
    head_end = _head_end(source, node)
    head = lines[found.first - 1 : head_end]
    body = _statements(node)
    if not body:
        raise SourceError(f"{name} has no body to blank")
    if body[0].lineno == head_end:
        if body[0] is not node.body[0]:
            raise SourceError(f"{name}: its docstring and its body share a line")
        cut = lines[head_end - 1].encode()[: body[0].col_offset].decode()
        head[-1] = cut.rstrip() + newline
    indent = " " * (node.col_offset + 4)
    comment = textwrap.wrap(
        note, 100, initial_indent=indent + "# ", subsequent_indent=indent + "# "
    )
    literal = json.dumps(message, ensure_ascii=False)
    if is_kernel(node):
        call, arguments = f"{_language(source)}.static_assert", ["False", literal]
    else:
        call, arguments = "raise NotImplementedError", [literal]
    failing = [f"{indent}{call}({', '.join(arguments)})"]
    if len(failing[0]) > 100:
        inner = [f"{indent}    {argument}," for argument in arguments]
        failing = [f"{indent}{call}(", *inner, f"{indent})"]
    blank = [line + newline for line in (*comment, *failing)]
    return "\n".join([*lines[: found.first - 1], *head, *blank, *lines[found.last :]])


def is_blank(source: str, name: str, task_id: str) -> bool:
    """Whether the body of ``name`` is still nothing but the blank of this task."""
    node = find(source, name).node
    body = _statements(node) if isinstance(node, Function) else []
    if len(body) != 1 or not isinstance(body[0], ast.Raise | ast.Expr):
        return False
    texts = [
        constant.value
        for constant in ast.walk(body[0])
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    ]
    return any(text.startswith(f"Task {task_id} (") for text in texts)


def is_kernel(node: ast.stmt) -> bool:
    """Whether a function is a Triton kernel: one of its decorators is ``...jit``."""
    for decorator in getattr(node, "decorator_list", []):
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        if getattr(target, "attr", getattr(target, "id", None)) == "jit":
            return True
    return False


def _statements(node: Function) -> list[ast.stmt]:
    """The body without the docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def _head_end(source: str, node: Function) -> int:
    """The last line of the docstring, or of the signature where there is none."""
    if ast.get_docstring(node, clean=False) is not None:
        return node.body[0].end_lineno or node.body[0].lineno
    depth = 0
    text = "\n".join(source.split("\n")[node.lineno - 1 :])
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
            if token.string == ":" and depth == 0:
                return node.lineno + token.start[0] - 1
    raise AssertionError(f"{node.name} parsed, but its signature has no end")


def _language(source: str) -> str:
    """The name under which the file imported Triton's language, usually ``tl``."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "triton.language":
                    return alias.asname or alias.name
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton"):
            for alias in node.names:
                if alias.name == "language":
                    return alias.asname or alias.name
    raise SourceError("the file has a kernel but does not import triton.language")
