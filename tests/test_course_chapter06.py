"""Chapter 6's text shows what its programs print, its file holds, and its code draws."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from course_helpers import chapter_folder, check_blocks, check_figures, check_transcripts

from chapters.chapter06_block_manager import film, memory, results

TEXT = (chapter_folder(6) / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("program", [film.main, memory.main])
def test_transcripts(program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    check_transcripts(TEXT, program, capsys, empty=True)


def test_event_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = film.main(["--events", str(tmp_path / "toy.jsonl")])
    assert code == 0, capsys.readouterr().err
    untimed = re.compile(r'"time": [\d.e-]+, ')
    written = [untimed.sub("", line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    shown = [line for line in TEXT.split("\n") if line.startswith('{"step"')]
    assert len(shown) == 2
    assert all(untimed.sub("", line) in written for line in shown)


def test_table_of_first_tokens_is_that_of_the_file() -> None:
    check_blocks(TEXT, {results.MARK: results.table()}, f"run `python -m {results.__name__}`")


def test_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    check_figures(6, tmp_path)
