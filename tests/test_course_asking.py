"""The programs of chapters 2 to 5 that put a question to a model."""

import importlib

import pytest

ANSWER = "A block table lists the KV blocks of"  # the embedded model's first 8 tokens


def said(
    chapter: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    code = importlib.import_module(f"chapters.{chapter}.say").main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("chapter", ["chapter02_qwen3_model", "chapter03_naive_attention"])
def test_the_embedded_model_answers(chapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(chapter, ["--max-tokens", "8"], capsys)
    assert code == 0, err
    assert out.startswith(ANSWER + "\n") and "96 prompt tokens, 8 new ones" in out


def test_questions_are_answered_from_pages(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said("chapter05_paged_attention", ["--max-tokens", "8"], capsys)
    assert code == 0, err
    assert f"What is a block table?\n  {ANSWER}\n  103 tokens in 7 blocks of 16" in out
    code, _, err = said("chapter05_paged_attention", ["--block-size", "65"], capsys)
    assert code == 2 and "--block-size must be from 1 to 64" in err


def test_the_toy_of_chapter_2_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """It has 16 positions, fewer than the tokens that are asked for if nothing is said."""
    code, out, err = said("chapter02_qwen3_model", ["--toy", "?"], capsys)
    assert code == 0, err
    assert out.startswith("abcd.\n")
    code, _, err = said("chapter02_qwen3_model", ["--toy", "z"], capsys)
    assert code == 2 and "the toy knows only" in err
