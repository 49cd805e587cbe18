"""What the tests of the texts share: is what a text shows what the code prints, or draws?"""

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from chapters import ROOT


def chapter_folder(number: int) -> Path:
    """The folder of chapter ``number``."""
    (folder,) = (ROOT / "chapters").glob(f"chapter{number:02d}_*")
    return folder


def check_transcripts(
    text: str,
    program: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
    *,
    empty: bool = False,
) -> None:
    """Every line that the text shows of a program is one that it prints, in that order.

    empty: the text may also name the program without showing what it prints.
    """
    call = rf"^\$ uv run python -m {re.escape(program.__module__)}(?: --workspace)?\n(.*?)^```"
    shown = re.findall(call, text, re.MULTILINE | re.DOTALL)
    assert shown, f"the text does not show {program.__module__}"
    code = program([])
    out, err = capsys.readouterr()
    assert code == 0, err
    for block in shown:
        lines = [line for line in block.split("\n") if line]
        assert lines or empty, f"the text shows nothing that {program.__module__} prints"
        printed = iter(out.split("\n"))
        missing = [line for line in lines if line not in printed]
        assert not missing, f"not printed, or not there: {missing}"


def check_blocks(text: str, blocks: Mapping[str, str], remedy: str) -> None:
    """The text holds each of ``blocks``, name -> content, between marks of that name."""
    for mark, content in blocks.items():
        assert f"<!-- {mark} -->\n{content}\n<!-- end of {mark} -->" in text, remedy


def check_figures(number: int, tmp_path: Path, *, recorded: bool = False) -> None:
    """The figures of chapter ``number`` are those that its code draws, and its text shows each.

    recorded: they are drawn from kernels that ran in Triton's interpreter.
    """
    triton = pytest.importorskip("triton", reason="the recorder needs Triton")
    if recorded and not triton.knobs.runtime.interpret:
        pytest.skip("the recorder needs the interpreter, which is off where there is a GPU")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    folder = chapter_folder(number)
    module = f"chapters.{folder.name}.figures"
    figures = importlib.import_module(module)
    with matplotlib.rc_context():
        figures.main(tmp_path)
    text = (folder / "README.md").read_text(encoding="utf-8")
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == sorted(file.name for file in (folder / "figures").iterdir())
    for name in drawn:
        assert f"](figures/{name})" in text, f"the text does not show {name}"
        old, new = (
            (place / name).read_text(encoding="utf-8") for place in (folder / "figures", tmp_path)
        )
        # Other versions of Matplotlib draw the same words and numbers a little differently.
        if f"Matplotlib v{matplotlib.__version__}" not in old:
            old, new = (re.findall(r">([^<>\n]+)</text>", picture) for picture in (old, new))
        assert new == old, f"{name} is out of date: run python -m {module}"
