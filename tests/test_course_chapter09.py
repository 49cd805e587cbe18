"""What chapter 9's text prints, shows and computes is what its code prints, draws and computes."""

import importlib
import re
from pathlib import Path

import pytest

from chapters.chapter09_tensor_parallelism import results, shares, toy, traffic

FOLDER = Path(results.__file__).parent
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_shares_print_what_the_text_shows(capsys):
    assert shares.main([]) == 0
    shown = re.search(r"chapter09_tensor_parallelism\.shares\n(.*?)```", TEXT, re.DOTALL)
    assert shown and capsys.readouterr().out.startswith(shown[1])


def test_traffic_prints_what_the_text_shows(capsys):
    assert traffic.main([]) == 0
    assert capsys.readouterr().out in TEXT


def test_the_toy_is_the_text_s():
    whole, _ = toy.run_mlp(1)
    parts, _ = toy.run_mlp(2)
    assert whole[0].out == parts[0].out == parts[1].out == [9, 6]
    assert [part.summand for part in parts] == [[1, 3], [8, 3]]
    assert toy.choose(2)[0][0].chosen == 4


def test_the_sums_to_predict():
    def says(*numbers: str) -> None:
        answers = " ".join(re.findall(r"<summary>Answer</summary>(.*?)</details>", TEXT, re.DOTALL))
        missing = [number for number in numbers if number not in answers]
        assert not missing

    name = results.LARGE
    one, four = results.least_ms(name), results.least_ms(name, 4)
    waits = results.exchanges(name) * 0.01
    says(f"{one:.1f} ms", f"{four:.1f} ms", f"129 × 10 µs = {waits:.1f} ms", f"{four + waits:.1f}")
    assert results.exchanges(name) == 129 and round(one / (four + waits)) == 3
    nbytes = results.exchange_bytes(name, 32)
    sent = 129 * nbytes * 2 * 3 / 4
    says(f"{nbytes / 1e3:.0f} KB", f"{sent / 1e6:.0f} MB", f"{1e3 * sent / 450e9:.2f} ms")
    says(f"{1e3 * sent / 50e9:.1f} ms")


@pytest.mark.parametrize("mark", results.BLOCKS)
def test_tables_are_those_of_the_reports(mark):
    block = f"<!-- {mark} -->\n{results.BLOCKS[mark]()}\n<!-- end of {mark} -->"
    assert block in TEXT, "run `python -m chapters.chapter09_tensor_parallelism.results`"


def test_the_gpus_report_may_hold_several_models(monkeypatch):
    """Under any key; each number of ranks and batch becomes a row."""
    facts = {"ready_seconds": 1.0, "1": {"ms_per_token": 6.0}, "32": {"ms_per_token": 9.0}}
    facts["throughput"] = {"requests": 64, "output_tokens_per_s": 1000.0}
    faster = {"1": {"ms_per_token": 2.0, "communication_ms": 0.5, "limit_ms": 1.25}}
    faster["throughput"] = {"requests": 64, "output_tokens_per_s": 3500.0}
    us = [12.0, 13.0], [4.0, 5.0], [2.0, 3.0]
    report = {
        "device": "A GPU",
        "date": "2026-11-21 01:02 UTC",
        "copy_bytes_per_s": 4e12,
        "others": {"Qwen3-32B": {"ranks": {"4": faster, "1": facts}}},
        "model": "Qwen3-8B",
        "ranks": {"2": facts, "1": facts},
        "exchange": {"4": {"us": {"rows": [1, 8], **dict(zip(results.SUMS, us, strict=True))}}},
    }
    monkeypatch.setattr(results, "read", lambda file: report)
    assert [part["model"] for part in results.reports()] == ["Qwen3-8B", "Qwen3-32B"]
    table = results.gpu_table()
    assert ": 12.0, 4.0, 2.0 µs on 4 GPUs." in table
    rows = [row for row in table.split("\n") if row.startswith("|")][2:]
    assert len(rows) == 4 + 3 + 2 + 4
    assert rows[-2:] == ["| Qwen3-32B | 64 | 1 | 1,000 | 1.00 |", "|  |  | 4 | 3,500 | 3.50 |"]
    assert rows[4:6] == [
        "| Qwen3-32B | 1 | 1 | 6.00 | 1.00 |  |  |",
        "|  |  | 4 | 2.00 | 3.00 | 0.50 | 1.25 |",
    ]


def test_what_does_not_fit_is_not_compared(monkeypatch):
    """One sequence that takes longer than 32 says something of our kernels, not of GPUs."""
    odd = {"1": {"ms_per_token": 45.0}, "32": {"ms_per_token": 18.0}}
    well = {"1": {"ms_per_token": 10.0}, "32": {"ms_per_token": 11.0}}
    report = {"model": "Qwen3-32B", "ranks": {"1": odd, "2": well}, "copy_bytes_per_s": 4e12}
    whole = {"device": "A GPU", "date": "2026-11-21 01:02 UTC", **report}
    monkeypatch.setattr(results, "read", lambda file: whole)
    rows = [row for row in results.gpu_table().split("\n") if row.startswith("|")][2:]
    assert rows[:2] == ["| Qwen3-32B | 1 | 1 | 45.00 ¹ |  |  |  |", "|  |  | 2 | 10.00 |  |  |  |"]
    assert "| 1.64 |" in rows[3] and "¹ Not to be compared" in results.gpu_table()


def test_figures_are_those_that_the_code_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("triton", reason="the notebooks' drawing needs the recorder")
    matplotlib.use("agg")
    figures = importlib.import_module("chapters.chapter09_tensor_parallelism.figures")
    with matplotlib.rc_context():
        figures.main(tmp_path)
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == sorted(file.name for file in (FOLDER / "figures").iterdir())
    for name in drawn:
        assert f"](figures/{name})" in TEXT, f"the text does not show {name}"
        words = [
            re.findall(r">([^<>\n]+)</text>", (folder / name).read_text(encoding="utf-8"))
            for folder in (FOLDER / "figures", tmp_path)
        ]
        assert words[0] == words[1], "run `python -m chapters.chapter09_tensor_parallelism.figures`"


def test_heads_are_drawn_as_the_layers_hold_them():
    figures = pytest.importorskip("chapters.chapter09_tensor_parallelism.figures")
    assert figures.heads_of(4, 2, 4) == [([0], [0]), ([1], [0]), ([2], [1]), ([3], [1])]
    assert figures.heads_of(4, 2, 2) == [([0, 1], [0]), ([2, 3], [1])]
