"""Chapter 7's text shows what its programs print, its file holds, and its code draws."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from course_helpers import chapter_folder, check_blocks, check_figures, check_transcripts

from chapters.chapter07_scheduler import counts, gantt, results

TEXT = (chapter_folder(7) / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("program", [gantt.main, counts.main])
def test_transcripts(program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    check_transcripts(TEXT, program, capsys)


def test_event_lines(tmp_path: Path) -> None:
    assert gantt.main(["--events", str(tmp_path / "toy.jsonl")]) == 0
    written = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    shown = [json.loads(line) for line in TEXT.split("\n") if line.startswith('{"step"')]
    assert len(shown) >= 2
    for line in written + shown:
        del line["time"]
    assert all(line in written for line in shown)


def test_measured_tables_are_those_of_the_file() -> None:
    check_blocks(TEXT, results.tables(), f"run `python -m {results.__name__}`")


def test_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    check_figures(7, tmp_path)
