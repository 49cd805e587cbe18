"""Every notebook runs from its first cell to its last, and was stored executed, with pictures."""

from pathlib import Path

import pytest
from notebook_runs import NOTEBOOK_RUNS, NotebookRuns

nbformat = pytest.importorskip("nbformat", reason="needs jupyter, which the dev group brings")
pytest.importorskip("nbclient", reason="needs jupyter, which the dev group brings")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


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
    runs: NotebookRuns = request.config.stash[NOTEBOOK_RUNS]
    notebook = runs.result(file)
    kinds = {kind for output in _outputs(notebook) for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/svg+xml"}
