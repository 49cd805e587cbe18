"""``bench throughput`` and ``latency`` on a small model: reports, pictures, and --help."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_helpers import read_report, small_model, texts_of
from helpers import random_prompt

from minivllm.benchmarks import throughput
from minivllm.benchmarks.svg import Bar, Line, bar_chart, line_charts
from minivllm.benchmarks.throughput import draw
from minivllm.benchmarks.workload import float32_logits
from minivllm.cli import main
from minivllm.distributed.host_memory import peak_host_bytes
from minivllm.models.generate import borrowed_attention
from minivllm.models.loader import load_model

SMALL = ["--device", "cpu", "--max-num-seqs", "4", "--num-kv-blocks", "64"]
FIGURES = {"copy_bytes_per_s": 1e10, "matmul_flop_per_s": 1e11}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("throughput") / "model")


def test_throughput_reports_loading_memory_and_peers(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "ceilings", lambda device: FIGURES)
    seen = {}

    def fake_peers(workload, **place):
        seen.update(place, requests=len(workload.prompts))
        measured = {"output_tokens_per_s": 321.0, "requests": 3, "version": "1.2"}
        return {"one": measured, "two": {"skipped": "two is not installed"}}

    monkeypatch.setattr(throughput, "run_peers", fake_peers)
    what = ["--model", model, "--requests", "6", "--most", "12", "--rounds", "2", "--peers"]
    files = ["--output", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.svg")]
    assert main(["bench", "throughput", *what, *files, *SMALL]) == 0
    report = read_report(tmp_path / "t.json")
    assert report["output_tokens"] == 72 and len(report["rounds"]) == 2
    assert 0 < report["loading_seconds"] <= report["ready_seconds"]
    assert report["peak_host_bytes"] > 2**20
    assert report["check"]["agrees"]
    limit = report["limit_output_tokens_per_s"]
    work = report["work"]
    least = (work["kv_bytes"] + work["weight_bytes"]) / 1e10 + work["flop"] / 1e11
    assert limit == pytest.approx(72 / least)
    first = report["rounds"][0]["output_tokens_per_s"]
    assert report["first_share_of_limit"] == pytest.approx(first / limit)
    assert seen == {
        "requests": 6,
        "folder": seen["folder"],
        "dummy": False,
        "dtype": "float32",
        "device": "cpu",
        "rounds": 2,
    }
    assert str(seen["folder"]) == model
    texts = texts_of((tmp_path / "t.svg").read_text(encoding="utf-8"))
    # A peer is drawn only if it was measured.
    assert "one 1.2" in texts and "3 requests" in texts and "two" not in texts
    assert report["device"] in texts and report["date"] in texts
    assert "peak host memory" in capsys.readouterr().out


def test_without_peers_the_picture_has_none(model, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "ceilings", lambda device: FIGURES)
    monkeypatch.setattr(throughput, "run_peers", lambda *_, **__: pytest.fail("not asked for"))
    arguments = ["--requests", "3", "--most", "5", "--rounds", "1"]
    file = tmp_path / "t.json"
    main(["bench", "throughput", "--model", model, *arguments, "--output", str(file), *SMALL])
    report = read_report(file)
    assert "peers" not in report and texts_of(draw(report)).count("minivllm") == 2


def test_latency_has_its_report(model, tmp_path, capsys):
    file = tmp_path / "latency.json"
    sizes = ["--batch", "1", "3", "--input", "8", "--tokens", "6"]
    assert main(["bench", "latency", "--model", model, *sizes, "--output", str(file), *SMALL]) == 0
    report = read_report(file)
    assert set(report["batches"]) == {"1", "3"} and report["check"]["agrees"]
    for facts in report["batches"].values():
        assert 0 < facts["between_tokens_ms"]["p50"] <= facts["between_tokens_ms"]["p99"]
        expected = report["weights"]["ms"] / facts["between_tokens_ms"]["p50"]
        assert 0 < facts["step_share_of_weight_limit"] == pytest.approx(expected)
    weights = report["weights"]
    assert weights["ms"] == pytest.approx(1e3 * weights["bytes"] / weights["copy_bytes_per_s"])
    assert "first token" in capsys.readouterr().out


def test_the_plain_model_in_float32_a_layer_at_a_time(model):
    plain = load_model(Path(model), dtype=torch.bfloat16)
    config = plain.config
    whole = type(plain)(config, dtype=torch.float32)
    whole.load_state_dict(plain.state_dict())
    ids = torch.tensor(random_prompt(23, seed=1))
    positions = torch.arange(23)
    with torch.inference_mode():
        hidden = whole(ids, positions, borrowed_attention(config.head_size**-0.5))
        expected = whole.compute_logits(hidden)
    torch.testing.assert_close(float32_logits(plain, ids, positions, 5), expected[5:])
    assert all(parameter.dtype == torch.bfloat16 for parameter in plain.parameters())


@pytest.mark.parametrize("command", ["ladder", "serve-sim", "throughput", "latency"])
def test_help_tells_the_flags(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"minivllm bench {command}" in text and "--shapes" in text and "--output" in text
    assert ("--plot" in text) == (command != "latency")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["latency", "--batch", "0"], "argument --batch: '0' must be an integer of at least 1"),
        (["offline", "--repeat", "x"], "argument --repeat: 'x' must be an integer of at least 1"),
        (["tensor-parallel", "--ranks", "0"], "argument --ranks: '0' must be an integer"),
        (["tensor-parallel", "--device", "gpu"], "argument --device: 'gpu' is no device; give cpu"),
        (["check", "--device", "gpu"], "argument --device: 'gpu' is no device; give cpu"),
        (["decode", "--heads", "0"], "argument --heads: '0' must be an integer of at least 1"),
        (["throughput", "--requests", "0"], "argument --requests: '0' must be an integer of at"),
        (["throughput", "--most", "-1"], "argument --most: '-1' must be an integer of at least 1"),
        (["throughput", "--rounds", "0"], "argument --rounds: '0' must be an integer of at least"),
        (["ladder", "--requests", "0"], "argument --requests: '0' must be an integer of at least"),
        (["ladder", "--batch", "0"], "argument --batch: '0' must be an integer of at least 1"),
        (["ladder", "--subset", "0"], "argument --subset: '0' must be an integer of at least 1"),
        (["ladder", "--rounds", "1.5"], "argument --rounds: '1.5' must be an integer of at least"),
        (["serve-sim", "--requests", "0"], "argument --requests: '0' must be an integer of at"),
        (["serve-sim", "--rates", "1", "0"], "argument --rates: '0' must be a number above 0"),
        (["serve-sim", "--ttft-limit", "nan"], "argument --ttft-limit: 'nan' must be a number"),
        (["serve-sim", "--itl-limit", "inf"], "argument --itl-limit: 'inf' must be a number"),
        (["tensor-parallel", "--limit", "x"], "argument --limit: 'x' must be a number above 0"),
    ],
)
def test_flags_that_cannot_be_are_told_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "--help" in line


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_query_heads_that_kv_heads_cannot_share_out(what, capsys):
    assert main(["bench", what, "--device", "cpu", "--heads", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("minivllm: error: heads=3 must be a multiple of kv_heads=8; change one of them")


def test_without_a_gpu_there_is_nothing_to_profile(model, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "build", lambda *_: pytest.fail("said only afterwards"))
    arguments = ["--model", model, "--profile", *SMALL]
    assert main(["bench", "throughput", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "this is cpu, where there is nothing to profile; leave --profile out" in line


def test_shapes_and_a_model_are_not_both_named(capsys):
    assert main(["bench", "throughput", "--shapes", "Qwen3-0.6B", "--model", "/nowhere"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_peak_memory_never_falls():
    if peak_host_bytes() is None:
        pytest.skip("nobody counts it here")
    # In a small process: to pass the peak of this one, the block would take gigabytes.
    source = inspect.getsourcefile(peak_host_bytes)
    program = f"""
from runpy import run_path
peak = run_path({source!r})["peak_host_bytes"]
before = peak()
block = b"x" * (before + 2**24)
with_block = peak()
del block
print(before, with_block, peak())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    before, with_block, after = map(int, done.stdout.split())
    assert 0 < before < 2**28
    # The kernel counts to within some pages.
    assert before + 2**23 < min(with_block, after)


def test_a_logarithmic_axis_has_a_line_for_each_power_of_ten():
    picture = bar_chart("t", [Bar("a", 30.0), Bar("b", 2500.0, "<x>")], unit="u", log=True)
    texts = texts_of(picture).splitlines()
    assert [text for text in texts if text in ("10", "100", "1,000", "10,000")] == [
        "10",
        "100",
        "1,000",
        "10,000",
    ]
    assert "2,500  <x>" in texts
    with pytest.raises(ValueError, match="only positive"):
        bar_chart("t", [Bar("a", 0.0)], unit="u")
    with pytest.raises(ValueError, match="no point"):
        line_charts("t", [("p", [Line("a", [])])], x_label="x")
