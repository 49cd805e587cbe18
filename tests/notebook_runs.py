"""Notebooks run beside the other tests: each has a process of its own, which the rest can spare."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# Far more than any cell needs on a quiet machine: a busy one must not fail the test.
CELL_TIMEOUT_SECONDS = 600


def execute(file: Path) -> Any:
    """Run a notebook from its first cell to its last; CellExecutionError shows a cell that fails.

    Returns the executed notebook.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(file.parent)}}
    nbclient.NotebookClient(notebook, timeout=CELL_TIMEOUT_SECONDS, resources=resources).execute()
    return notebook


class NotebookRuns:
    """Runs some notebooks one after the other in the background."""

    def __init__(self, files: list[Path]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._runs: dict[Path, Future[Any]] = {
            file: self._pool.submit(execute, file) for file in files
        }

    def result(self, file: Path) -> Any:
        """The executed notebook; waits for it, and raises what it raised."""
        return self._runs[file].result()

    def cancel(self) -> None:
        """Drop those that have not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


NOTEBOOK_RUNS = pytest.StashKey[NotebookRuns]()
