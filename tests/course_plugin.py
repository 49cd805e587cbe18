"""Chooses the package that the tests run on: the reference, or the learner's workspace.

``pytest`` tests the reference, ``minivllm/`` in the repository. ``pytest --workspace`` or
``MINIVLLM_WORKSPACE=1 pytest`` tests the learner's ``workspace/minivllm/``; another value of the
variable names a folder that contains some other ``minivllm/``. The chosen folder goes to the front
of ``sys.path`` and, for processes that tests start, of ``PYTHONPATH``.
"""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

VARIABLE = "MINIVLLM_WORKSPACE"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--workspace",
        action="store_true",
        help="test the learner's workspace/minivllm instead of the reference",
    )


def pytest_configure(config: pytest.Config) -> None:
    folder = _chosen_folder(config)
    root = config.rootpath.resolve()
    loaded = getattr(sys.modules.get("minivllm"), "__file__", None)
    if loaded is not None and Path(loaded).resolve().parents[1] != folder:
        raise pytest.UsageError(f"{loaded} was imported before a package could be chosen")
    _put_first(folder, root)
    found = importlib.util.find_spec("minivllm")
    origin = Path(found.origin).resolve() if found and found.origin else None
    if origin is None or origin.parents[1] != folder:
        raise pytest.UsageError(f"wanted minivllm from {folder}, but Python finds {origin}")
    config.stash[_FOLDER] = folder


_FOLDER = pytest.StashKey[Path]()


def _chosen_folder(config: pytest.Config) -> Path:
    value = os.environ.get(VARIABLE, "")
    if config.getoption("--workspace") and value in ("", "0"):
        value = "1"
    root = config.rootpath.resolve()
    if value in ("", "0"):
        return root
    folder = root / "workspace" if value == "1" else Path(value).resolve()
    if not (folder / "minivllm" / "__init__.py").is_file():
        remedy = "begin with `python -m chapters start 1`" if value == "1" else f"see {VARIABLE}"
        raise pytest.UsageError(f"there is no package in {folder / 'minivllm'}; {remedy}")
    return folder


def _put_first(folder: Path, root: Path) -> None:
    """Let ``folder`` win over every other place that has a minivllm, here and in subprocesses."""
    first = list(dict.fromkeys([str(folder), str(root)]))
    sys.path[:] = [*first, *(path for path in sys.path if path not in first)]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    rest = [path for path in inherited if path and path not in first]
    os.environ["PYTHONPATH"] = os.pathsep.join([*first, *rest])
    if folder != root:
        # Without this, `python -c` and `python -m` put the current folder before PYTHONPATH.
        os.environ["PYTHONSAFEPATH"] = "1"


def _chapter(folder: Path) -> int | None:
    """The chapter at which a workspace stands, as the course machine noted it."""
    try:
        return int(json.loads((folder / ".progress.json").read_text(encoding="utf-8"))["chapter"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _header(config: pytest.Config) -> str:
    folder, root = config.stash[_FOLDER], config.rootpath.resolve()
    if folder == root:
        return "package under test: reference (minivllm)"
    package = (folder.relative_to(root) if folder.is_relative_to(root) else folder) / "minivllm"
    chapter = _chapter(folder)
    return f"package under test: {package.as_posix()}" + (f" (chapter {chapter})" * bool(chapter))


def pytest_report_header(config: pytest.Config) -> str:
    return _header(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    # `-q` suppresses the header; which package is tested is worth a line all the same.
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and session.config.get_verbosity() == -1:
        reporter.write_line(_header(session.config))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of a workspace, test the chapters up to its own: it has nothing later, and no machine."""
    folder = config.stash[_FOLDER]
    chapter = _chapter(folder)
    if folder == config.rootpath.resolve() or chapter is None:
        return None
    if collection_path.suffix != ".py" or _named(collection_path, config):
        return None
    number = re.match(r"test_chapter(\d+)_", collection_path.name)
    return None if number and int(number[1]) <= chapter else True


def _named(path: Path, config: pytest.Config) -> bool:
    given = (config.invocation_params.dir / arg.split("::")[0] for arg in config.args)
    return any(candidate.resolve() == path.resolve() for candidate in given)
