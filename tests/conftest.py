"""Shared by all tests: the interpreter switch, small random checkpoints, the gpu marker."""

import gc
import os
import signal
import sys
from pathlib import Path

import bytecode_cache  # noqa: F401

# isort: split
import pytest
import torch
from background import BACKGROUND, Background

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
# Started in the background, by a script or CI, a process is born deaf to interrupts, and so are its
# children; tests that interrupt would wait forever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    """A module's ``begin`` starts what is better done beside the tests; see ``background``."""
    # An engine that shuts down collects garbage, and need not search all that was imported here.
    gc.freeze()
    if session.config.option.collectonly:
        return
    background = session.config.stash[BACKGROUND] = Background()
    for module in dict.fromkeys(getattr(item, "module", None) for item in session.items):
        if hasattr(module, "begin"):
            module.begin(session, background)


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()
    if BACKGROUND in session.config.stash:
        session.config.stash[BACKGROUND].cancel()
