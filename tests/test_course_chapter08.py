"""Chapter 8's text shows what its programs print, its files hold, and its code draws."""

import re
from pathlib import Path

import pytest
from course_helpers import chapter_folder, check_blocks, check_figures

from chapters.chapter08_cuda_graphs import halves, launches, results, rows, waste

TEXT = (chapter_folder(8) / "README.md").read_text(encoding="utf-8")


def test_rows_print_what_the_text_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows.main([]) == 0
    printed = capsys.readouterr().out
    shown = re.search(r"chapter08_cuda_graphs\.rows\n(.*?)```", TEXT, re.DOTALL)
    assert shown
    pieces = [piece.strip("\n") for piece in shown[1].split("...\n")]
    assert len(pieces) >= 2 and all(piece in printed for piece in pieces)


def test_the_count_of_operations() -> None:
    found = launches.count(repeats=1)
    assert f"plain form    {found.operations} operations, each a kernel on a GPU" in TEXT
    # Each layer adds the same.
    few, fewer = launches.count(3, repeats=1), launches.count(2, repeats=1)
    a_layer = few.operations - fewer.operations
    assert found.operations == fewer.operations + 26 * a_layer


def test_the_waste_of_ladders(capsys: pytest.CaptureFixture[str]) -> None:
    assert waste.main() == 0
    assert capsys.readouterr().out in TEXT
    assert waste.waste_of([1, 2, 4]).padding == [0, 0, 1, 0]
    assert waste.waste_of([1, 2, 4]).share == 1 / 11


def test_the_bytes_that_are_sent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts, the same on every machine."""
    half = halves.measure(32, steps=40)
    row = re.search(r"^ +32 .* ([\d,]+) +([\d.]+)$", TEXT, re.MULTILINE)
    assert row, "the text has no row for batch 32"
    assert (f"{half.plain_bytes:,.0f}", f"{half.sent_bytes:.1f}") == row.groups()
    assert half.prepare > 0 and half.plain > 0 and half.schedule > 0
    monkeypatch.setattr(halves, "BATCHES", (1,))
    assert halves.main() == 0 and "laid out" in capsys.readouterr().out


def test_measured_blocks_are_those_of_the_reports() -> None:
    blocks = {mark: block() for mark, block in results.BLOCKS.items()}
    check_blocks(TEXT, blocks, f"run `python -m {results.__name__}`")


def test_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    check_figures(8, tmp_path)


def test_a_host_that_is_a_step_ahead_is_never_waited_for() -> None:
    figures = pytest.importorskip("chapters.chapter08_cuda_graphs.figures")

    def end(*, overlap: bool) -> float:
        bars = figures.replayed(5.0, 0.9, 0.1, 4, overlap=overlap)
        return max(bar.start + bar.length for bar in bars)

    assert end(overlap=False) == pytest.approx(4 * 6.0)
    assert end(overlap=True) == pytest.approx(1.0 + 4 * 5.0)
    apart = figures.one_by_one(10, 1.0, 3.0)
    assert max(bar.start + bar.length for bar in apart) == pytest.approx(31.0)
