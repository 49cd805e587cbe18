"""Chapter 5's tables and figures are those of its files and its code."""

from pathlib import Path

from course_helpers import check_figures

from chapters.chapter05_paged_attention import results


def test_measured_table_in_the_text_is_that_of_the_file() -> None:
    text = results.TEXT.read_text(encoding="utf-8")
    assert results.filled(text, results.read()) == text, (
        "run `python -m chapters.chapter05_paged_attention.results --write`"
    )


def test_measured_table_has_every_figure() -> None:
    """A point or a form that a new measurement calls by another name would leave a gap."""
    rows = results.table(results.read()).split("\n")[2 : 2 + len(results.POINTS)]
    for row in rows:
        each, shares = (cell.strip() for cell in row.split("|")[4:6])
        assert each and shares, f"no figure in {row}"


def test_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    check_figures(5, tmp_path, recorded=True)
