"""Shared by all tests: the interpreter switch, small random checkpoints, the gpu marker."""

import os
import sys
from pathlib import Path

import pytest
import torch
from notebook_runs import NOTEBOOK_RUNS, NotebookRuns

# Chooses the package under test: the reference, or a learner's workspace.
pytest_plugins = ["course_plugin"]

ROOT = Path(__file__).parent.parent
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads this once, when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A test never reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors of a few hundred numbers gain nothing from threads, and lose much on a busy machine.
torch.set_num_threads(1)
# Tests use the notebooks' recorder and what the chapters compute.
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "notebooks")) if path not in sys.path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def interpreter_on_new_numpy() -> None:
    """Triton 3.6's interpreter needs mending on numpy 2.4 and later."""
    try:
        from recorder import patch_interpreter

        patch_interpreter()
    except ImportError:
        # No Triton for this platform: the tests that need it skip themselves.
        pass


def pytest_collection_finish(session: pytest.Session) -> None:
    """Notebooks take minutes, mostly of another process: they begin at once, in the background."""
    wanted = [item for item in session.items if item.name.startswith("test_runs[")]
    files = [item.callspec.params["file"] for item in wanted if "test_notebooks" in item.nodeid]
    if files and not session.config.option.collectonly:
        session.config.stash[NOTEBOOK_RUNS] = NotebookRuns(files)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if NOTEBOOK_RUNS in session.config.stash:
        session.config.stash[NOTEBOOK_RUNS].cancel()
