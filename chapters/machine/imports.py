"""Which modules a source file imports, read without running it."""

import ast
import re
from collections.abc import Iterator, Mapping

from chapters.machine.manifest import PACKAGE


def module_of(file: str) -> str:
    """``minivllm/layers/linear.py`` -> ``minivllm.layers.linear``; a package by its folder."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def unresolved(files: Mapping[str, str], file: str) -> list[str]:
    """The package's modules that ``file`` imports but ``files`` lacks, as ``line: module``.

    Imports inside functions count, as do strings that are the dotted name of a module, for these
    are imported by name. The roof (``minivllm/__init__.py``) stands on whatever is there: of it
    only what runs when it is imported counts.
    """
    modules = {module_of(name) for name in files if name.endswith(".py")}
    tree = ast.parse(files[file])
    if file == f"{PACKAGE}/__init__.py":
        nodes = [node for node in _when_imported(tree) if not isinstance(node, ast.Constant)]
    else:
        nodes = list(ast.walk(tree))
    missing = []
    for node in nodes:
        for candidates in _imported(node, file):
            # ``from a.b import c``: c may be a module, or a name inside a.b.
            if not any(name in modules for name in candidates):
                missing.append(f"{getattr(node, 'lineno', 1)}: {candidates[0]}")
    return missing


def _when_imported(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function, nothing for type checkers."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield from _when_imported(child)


def _imported(node: ast.AST, file: str) -> Iterator[list[str]]:
    """For each import of the package: the module names of which one must exist."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if _inside(alias.name):
                yield [alias.name]
    elif isinstance(node, ast.ImportFrom):
        base = _base(node, file)
        if _inside(base):
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                # Names taken from the package itself are modules: its __init__ is the roof.
                yield [whole] if base == PACKAGE else [whole, base]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        if re.fullmatch(rf"{PACKAGE}(\.[a-z_][a-z0-9_]*)+", node.value):
            yield [node.value]


def _inside(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def _base(node: ast.ImportFrom, file: str) -> str:
    if not node.level:
        return node.module or ""
    package = file.removesuffix("/__init__.py").split("/")
    if not file.endswith("/__init__.py"):
        package.pop()
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, node.module] if node.module else package)
