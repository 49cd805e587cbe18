"""Chapter 4's text, figures and scripts say what the code does."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from course_helpers import chapter_folder, check_figures

from chapters.chapter04_flash_attention import prefill, results, toy

FOLDER = chapter_folder(4)
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
REMEDY = "run python -m chapters.chapter04_flash_attention.results --write"


def test_table_of_the_text_is_that_of_the_file() -> None:
    table = results.speed_table(results.measured())
    assert f"<!-- measured speed -->\n{table}\n<!-- end of measured -->" in TEXT, REMEDY
    assert results.filled(TEXT, results.measured()) == TEXT, REMEDY


def test_what_the_text_says_of_the_measured_memory() -> None:
    result = results.measured()
    peaks = {(r["form"], r["length"]): r["peak_bytes"] for r in result["memory"]}
    assert round(peaks["PyTorch, all scores", 16384] / 2**30) == 48
    shape = result["shape"]
    for length in (1024, 4096, 16384, 32768, 65536, 131072):
        output = 2 * length * shape["num_heads"] * shape["head_size"]
        assert peaks["Triton, tiles", length] == output, "the kernel's line is the output"
    assert output == 512 * 2**20
    rates = {(r["form"], r["length"]): r["tflop_per_s"] for r in result["records"]}
    for length in (1024, 4096, 16384):
        assert rates["SDPA flash", length] < rates["Triton, tiles", length]
        assert rates["Triton, tiles", length] < rates["Hopper", length]


def test_what_the_text_says_of_the_memory_on_a_cpu() -> None:
    """The columns of bytes do not depend on the machine."""
    rows = re.findall(r"^ *([\d,]+) +([\d.,]+) +[\d,]+ +([\d.]+) +[\d,]+  \de-07$", TEXT, re.M)
    assert [row[0] for row in rows] == ["512", "1,024", "2,048", "4,096"]
    for length, naive, tiles in rows[:2]:
        calls = prefill.forms(int(length.replace(",", "")), torch.device("cpu"))
        for name, shown in (("naive", naive), ("tiles", tiles)):
            peak = prefill.peak_bytes(calls[name], torch.device("cpu"))
            assert f"{peak / 2**20:,.1f}" == shown, f"{name}, {length} tokens"


def test_live_bytes_of_something_easy_to_count() -> None:
    with prefill.LiveBytes() as live:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a.view(10, 100) + 1  # a view costs nothing; 4,000 more
        a.add_(1)
        del a
        c = torch.ones(250)  # 1,000
    assert (live.peak, live.now) == (8000, 5000)
    del b, c
    assert live.now == 0


def test_prefill_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    file = tmp_path / "prefill.json"
    assert prefill.main(["--lengths", "3", "200", "--json", str(file)]) == 0
    assert prefill.main(["--lengths", "0"]) == 2
    torch.set_num_threads(threads)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["form"], row["length"]) for row in rows] == [
        ("naive", 3),
        ("tiles", 3),
        ("naive", 200),
        ("tiles", 200),
    ]
    assert all(row["off_by"] < 1e-5 and row["peak_bytes"] > 0 for row in rows)
    assert "--lengths must be at least 1" in capsys.readouterr().err


def test_say_answers_through_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    """The transcript of the text, from whichever tile size."""
    say = importlib.import_module("chapters.chapter04_flash_attention.say")
    answers = []
    for tile in ("16", "128"):
        assert say.main(["--tile", tile, "--max-tokens", "10"]) == 0
        printed = capsys.readouterr().out
        answers.append(printed.splitlines()[0])
        assert f"96 prompt tokens through tiles of {tile} in 4 layers" in printed
    assert answers[0] == answers[1]
    shown = re.search(r"--tile 16\n(.*?) \.\.\.\n", TEXT)
    assert shown and shown[1].startswith(answers[0])


def test_bugs_show_what_their_texts_say() -> None:
    """The toy's last token under bug 4.a (acc never shrinks) and 4.b (2 for e)."""
    acc = (toy.WEIGHTS.flatten()[:, None] * toy.VALUES).sum(dim=0)
    assert acc.tolist() == [22, 28] and (acc / toy.SUM[-1]).tolist() == [5.5, 7]
    wrong = 2 ** (toy.SCALE * toy.DOTS.flatten())
    out = (wrong @ toy.VALUES / wrong.sum()).tolist()
    assert [round(x, 2) for x in out] == [4.11, 4.35]


def test_recorded_toy_is_the_table_of_the_text() -> None:
    triton = pytest.importorskip("triton", reason="the recorder needs Triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("the recorder needs the interpreter, which is off where there is a GPU")
    pytest.importorskip("matplotlib")
    figures = importlib.import_module("chapters.chapter04_flash_attention.figures")
    rec = figures.record_toy()
    held = figures.steps(rec, (0, 0, 0))
    assert len(held) == 3
    for tile, step in enumerate(held):
        last = torch.tensor(step.scores[-1]), torch.tensor(step.weights[-1])
        assert torch.equal(last[0], toy.DOTS[tile]) and torch.allclose(last[1], toy.WEIGHTS[tile])
        for name, expected in (("row_max", toy.MAX), ("shrink", toy.SHRINK), ("row_sum", toy.SUM)):
            assert float(getattr(step, name)[-1]) == pytest.approx(float(expected[tile]), abs=1e-5)
        assert torch.allclose(torch.tensor(step.acc[-1, :2]), toy.ACC[tile], atol=1e-4)
    visited = figures.visits(rec)
    assert sum(len(visit.tiles) for visit in visited) == toy.VISITED[0]
    assert [visit.rows for visit in visited] == [range(4, 6), range(2, 4), range(0, 2)]


def test_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    check_figures(4, tmp_path, recorded=True)
