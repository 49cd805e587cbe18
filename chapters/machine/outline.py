"""The public names of a source file, for ``diff N``."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Defined:
    """A definition: its dotted path in the file, how it is shown, and how deep it lies."""

    path: str
    label: str
    depth: int = 0


def public_names(source: str) -> Iterator[Defined]:
    """Functions and classes in the order of the file, methods under their class."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _public(node.name):
            yield Defined(node.name, f"{node.name}()")
        elif isinstance(node, ast.ClassDef) and _public(node.name):
            yield Defined(node.name, f"class {node.name}")
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and _public(item.name):
                    yield Defined(f"{node.name}.{item.name}", f"{item.name}()", 1)


def _public(name: str) -> bool:
    return not name.startswith("_") or name in ("__call__", "__post_init__")
