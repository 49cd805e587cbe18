"""Every notebook runs from its first cell to its last, and was stored executed, with pictures."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from background import Background

nbformat = pytest.importorskip("nbformat", reason="needs jupyter, which the dev group brings")
nbclient = pytest.importorskip("nbclient", reason="needs jupyter, which the dev group brings")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Far more than any cell needs on a quiet machine: a busy one must not fail the test.
CELL_TIMEOUT_SECONDS = 600
RUNS = pytest.StashKey[dict[Path, "Future[Any]"]]()


def begin(session: pytest.Session, background: Background) -> None:
    """Notebooks take minutes, mostly of another process: they begin before the first test."""
    wanted = [item for item in session.items if getattr(item, "originalname", "") == "test_runs"]
    files = [item.callspec.params["file"] for item in wanted if item.path == Path(__file__)]
    session.config.stash[RUNS] = {file: background.submit(execute, file) for file in files}


def execute(file: Path) -> Any:
    """Run a notebook from its first cell to its last; CellExecutionError shows a cell that fails.

    Returns the executed notebook.
    """
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(file.parent)}}
    nbclient.NotebookClient(notebook, timeout=CELL_TIMEOUT_SECONDS, resources=resources).execute()
    return notebook


def _outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_stored_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    outputs = _outputs(notebook)
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [o for o in outputs if {"image/png", "image/svg+xml"} & set(o.get("data", {}))]
    assert len(pictures) >= 3, "run it and store it with its pictures"
    counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "stored after cells ran out of order"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_runs(file, request):
    notebook = request.config.stash[RUNS][file].result()
    kinds = {kind for output in _outputs(notebook) for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/svg+xml"}
