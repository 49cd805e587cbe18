"""The import graph is the table of contents: a storey stands only on the storeys below it.

The modules are read, not imported, so imports inside functions count too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "minivllm"

# Module -> storey, the first pattern that fits. Storey N is what chapter N adds.
STOREYS = {
    "minivllm.layers": 1,
    "minivllm.layers.*": 1,
    "minivllm.models": 2,
    "minivllm.models.*": 2,
    "minivllm.attention": 3,
    "minivllm.attention.naive*": 3,
    "minivllm.attention.flash*": 4,
    "minivllm.attention.paged*": 5,
    "minivllm.engine": 6,
    "minivllm.engine.sampling_params": 6,
    "minivllm.engine.sequence": 6,
    "minivllm.engine.block_manager": 6,
    "minivllm.engine.events": 6,
    "minivllm.engine.cuda_graphs*": 8,
    "minivllm.engine.graph_runner": 8,
    "minivllm.engine.row_table": 8,
    "minivllm.engine.step_forms": 8,
    "minivllm.engine.pending_tokens": 8,
    "minivllm.engine.prompt_graphs": 8,
    "minivllm.engine.step_message": 8,
    "minivllm.engine.fused_forward": 8,
    "minivllm.engine.folded_forward": 8,
    "minivllm.engine.device_rows": 8,
    "minivllm.engine.step_kernels": 8,
    "minivllm.engine.fused_kernels": 8,
    "minivllm.engine.fused_heads_kernels": 8,
    "minivllm.engine.sampler_kernels": 8,
    "minivllm.engine.skinny*": 8,
    "minivllm.engine.*": 7,
    "minivllm.distributed": 9,
    "minivllm.distributed.*": 9,
}
# All that lies directly in minivllm/ puts storeys together, and so do the benchmarks.
ROOF = 10
# These run on a laptop without torch, and so must all that they import.
PURE_PYTHON = (
    "minivllm.engine.sequence",
    "minivllm.engine.block_manager",
    "minivllm.engine.scheduler",
)


def storey(module: str) -> int | None:
    """1 to 9, ``ROOF``, or None for a module that has no place in the house."""
    for pattern, number in STOREYS.items():
        if fnmatch(module, pattern):
            return number
    in_roof = module.count(".") <= 1 or module.startswith("minivllm.benchmarks.")
    return ROOF if in_roof and module.partition(".")[0] == "minivllm" else None


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module below ``package``."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(
    file: Path, module: str, known: dict[str, Path], *, at_import: bool = False
) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that ``file`` imports.

    at_import: leave out what is imported inside functions and for type checkers only, which costs
    nothing when the module is imported. ``from a.b import c`` is ``a.b.c`` if that is a module.
    """
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in _walk(ast.parse(file.read_text(encoding="utf-8")), at_import):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, *base.split(".")]).rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known else base
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _walk(tree: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (inner for part in node.orelse for inner in (part, *_walk(part, at_import)))
            continue
        yield node
        yield from _walk(node, at_import)


def reaching_up(package: Path) -> list[str]:
    """Every import of ``package`` that goes to a higher storey, said in words."""
    modules = modules_of(package)
    found = []
    for module, file in modules.items():
        floor = storey(module)
        for line, name in imports_of(file, module, modules):
            if floor is None or name.partition(".")[0] != package.name:
                continue
            ceiling = storey(name)
            if ceiling is None or ceiling > floor:
                where = "no storey" if ceiling is None else f"storey {ceiling}"
                found.append(
                    f"{file.name}:{line}: {module} (storey {floor}) imports {name} ({where})"
                )
    return found


def importing(package: Path, forbidden: str, *, at_import: bool) -> dict[str, list[str]]:
    """Module -> what it imports of the library ``forbidden``."""
    modules = modules_of(package)
    found: dict[str, list[str]] = {}
    for module, file in modules.items():
        for line, name in imports_of(file, module, modules, at_import=at_import):
            if name.partition(".")[0] == forbidden:
                found.setdefault(module, []).append(f"line {line}: {name}")
    return found


def test_every_module_has_a_storey() -> None:
    homeless = [module for module in modules_of(PACKAGE) if storey(module) is None]
    assert not homeless, f"{homeless} belong to no chapter: give them a place in STOREYS"


def test_no_storey_reaches_up() -> None:
    assert not (found := reaching_up(PACKAGE)), "\n".join(found)


def test_the_scheduler_is_pure_python() -> None:
    """Neither the three modules nor anything of ours that they import knows torch."""
    modules = modules_of(PACKAGE)
    queue = [module for module in PURE_PYTHON if module in modules]
    seen = set(queue)
    while queue:
        module = queue.pop()
        for line, name in imports_of(modules[module], module, modules):
            library = name.partition(".")[0]
            assert library not in ("torch", "triton", "numpy", "transformers"), (
                f"{module}, line {line}, imports {name}; a scheduler must run without it"
            )
            if name in modules and name not in seen:
                seen.add(name)
                queue.append(name)


def test_the_scheduler_imports_where_there_is_no_torch() -> None:
    names = [name for name in PURE_PYTHON if name in modules_of(PACKAGE)]
    run_python(
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'triton', 'numpy', 'transformers')))\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )


def test_only_kernel_modules_import_triton() -> None:
    """Triton has wheels for Linux alone, and the package must import without it."""
    for module, names in importing(PACKAGE, "triton", at_import=True).items():
        assert module.endswith("_kernels"), (
            f"{module} imports triton at its top ({'; '.join(names)}); put kernels into a module "
            "named *_kernels and import that where it is switched on"
        )


def test_kernel_modules_are_imported_lazily() -> None:
    modules = modules_of(PACKAGE)
    for module, file in modules.items():
        if module.endswith("_kernels"):
            continue
        for line, name in imports_of(file, module, modules, at_import=True):
            assert not name.endswith("_kernels"), (
                f"{module}, line {line}, imports {name} at its top; do it inside the function "
                "that switches the kernels on"
            )


def test_chapters_test_only_their_own_and_lower_storeys() -> None:
    """A learner's package that is cut off after chapter N must pass chapter N's tests."""
    modules = modules_of(PACKAGE)
    tests = sorted((REPOSITORY / "tests").glob("test_chapter[0-9][0-9]_*.py"))
    assert len(tests) >= 3
    for file in tests:
        chapter = int(file.name[len("test_chapter") :][:2])
        for line, name in imports_of(file, file.stem, modules):
            floor = storey(name)
            assert floor is None or floor <= chapter, (
                f"{file.name}:{line} imports {name}, which chapter {floor} adds"
            )
    helpers = REPOSITORY / "tests" / "helpers.py"
    assert not [name for _, name in imports_of(helpers, "helpers", modules) if storey(name)], (
        "helpers.py serves the tests of every chapter and may import nothing of minivllm"
    )


def run_python(program: str) -> str:
    """What ``program`` prints in a process of its own, started in the repository."""
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


HEAVY = ("transformers", "triton", "matplotlib", "numba", "sympy", "safetensors")


def test_import_minivllm_is_light() -> None:
    """torch aside, the package brings no large library along until it is needed."""
    brought = run_python(
        "import sys, torch; before = set(sys.modules); import minivllm; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    ).split()
    assert "minivllm" in brought
    assert not (heavy := set(brought) & set(HEAVY)), f"import minivllm also imports {heavy}"


def test_the_package_imports_without_triton() -> None:
    """Every module but the kernels', in one process in which triton cannot be found."""
    names = [n for n in modules_of(PACKAGE) if not n.endswith(("_kernels", "__main__"))]
    run_python(
        "import importlib, sys\n"
        "sys.modules['triton'] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )


# The walk itself, on a house with known faults.


@pytest.fixture
def crooked_house(tmp_path: Path) -> Path:
    package = tmp_path / "minivllm"
    files = {
        "__init__.py": "",
        "layers/__init__.py": "",
        "layers/linear.py": "import torch\nfrom . import activation\n",
        "layers/activation.py": "def f():\n    from ..models import config\n",
        "models/__init__.py": "",
        "models/config.py": "from minivllm.layers import linear\nimport minivllm.engine.sequence\n",
        "models/loader.py": "__import__('minivllm.attention.naive')\n",
        "models/odd.py": "import minivllm.attention.paged as a\nimport minivllm.odd.odd\n",
        "engine/sequence.py": "from minivllm import LLM\n",
        "llm.py": "from minivllm.engine import sequence\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


def test_the_walk_finds_every_import_that_reaches_up(crooked_house: Path) -> None:
    found = sorted(line.partition(": ")[2] for line in reaching_up(crooked_house))
    assert found == [
        "minivllm.engine.sequence (storey 6) imports minivllm (storey 10)",
        "minivllm.layers.activation (storey 1) imports minivllm.models.config (storey 2)",
        "minivllm.models.config (storey 2) imports minivllm.engine.sequence (storey 6)",
        "minivllm.models.loader (storey 2) imports minivllm.attention.naive (storey 3)",
        "minivllm.models.odd (storey 2) imports minivllm.attention.paged (storey 5)",
        "minivllm.models.odd (storey 2) imports minivllm.odd.odd (no storey)",
    ]


def test_the_walk_tells_lazy_imports_from_others(tmp_path: Path) -> None:
    package = tmp_path / "minivllm"
    package.mkdir()
    (package / "eager.py").write_text("try:\n    import triton\nexcept ImportError:\n    pass\n")
    (package / "in_class.py").write_text("class A:\n    import triton.language as tl\n")
    (package / "lazy.py").write_text("def f():\n    import triton\n")
    (package / "typed.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton\n"
    )
    assert set(importing(package, "triton", at_import=True)) == {
        "minivllm.eager",
        "minivllm.in_class",
    }
    assert len(importing(package, "triton", at_import=False)) == 4
