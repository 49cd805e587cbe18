"""Requests that arrive over time: the arrivals, what is made of the times, and a small run."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from benchmark_helpers import read_report, small_model, texts_of

from minivllm.benchmarks import serve_sim
from minivllm.benchmarks.arrivals import (
    Arrival,
    Served,
    alone,
    percentiles,
    poisson_arrivals,
    serve,
    summarise,
)
from minivllm.cli import main
from minivllm.llm import LLMEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def engine(model):
    engine = LLMEngine(
        model=model, device="cpu", skip_tokenizer_init=True, num_kv_blocks=64, max_num_seqs=4
    )
    yield engine
    engine.shutdown()


def test_arrivals_are_poisson_and_repeatable():
    slow, fast = (poisson_arrivals(2000, rate) for rate in (2.0, 20.0))
    gaps = [b.seconds - a.seconds for a, b in pairwise(slow)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    # An exponential's deviation is its mean.
    assert mean == pytest.approx(0.5, rel=0.1) and variance**0.5 == pytest.approx(mean, rel=0.15)
    assert slow == poisson_arrivals(2000, 2.0)
    assert slow != poisson_arrivals(2000, 2.0, seed=1)
    # The rate changes when they come, not what they are.
    assert [each.prompt for each in slow] == [each.prompt for each in fast]
    assert slow[-1].seconds == pytest.approx(10 * fast[-1].seconds)
    assert 0.15 < sum(each.long for each in slow) / 2000 < 0.25


def test_nobody_is_served_before_they_come(engine):
    arrivals = [Arrival(0.05 * number, [1, 2, 3 + number], 3, False) for number in range(4)]
    began = time.perf_counter()
    served = serve(engine, arrivals)
    assert time.perf_counter() - began >= 0.15
    for one in served:
        assert len(one.times) == 3 and one.times == sorted(one.times)
        assert one.first_token > 0 and len(one.gaps) == 2


def test_a_request_alone_has_no_slowdown_to_speak_of(engine):
    arrivals = [Arrival(0.0, [5] * 20, 6, False), Arrival(0.0, [6] * 90, 6, True)]
    ideal = alone(engine, arrivals)
    assert set(ideal) == {False, True}
    assert all(first > 0 and each > 0 for first, each in ideal.values())
    assert set(alone(engine, arrivals[:1])) == {False}


def test_figures_of_a_run_that_is_known():
    def request(seconds, times, long=False):
        return Served(Arrival(seconds, [1], len(times), long), times)

    served = [
        request(0.0, [0.1, 0.2, 0.3]),  # alone: takes 0.3
        request(1.0, [1.2, 1.4, 1.6]),  # twice that, both limits kept
        request(2.0, [2.9, 3.0, 3.1]),  # first token late
        request(3.0, [3.1, 3.6, 4.0], long=True),  # the others late
    ]
    ideal = {False: (0.1, 0.1), True: (0.1, 0.1)}
    facts = summarise(served, ideal, ttft_limit_s=0.5, itl_limit_s=0.25)
    assert facts["seconds"] == 4.0 and facts["served_per_s"] == 1.0
    assert facts["good_share"] == 0.5 and facts["goodput_per_s"] == 0.5
    assert facts["output_tokens_per_s"] == 3.0
    assert facts["slowdown"]["long"]["p50"] == pytest.approx(1.0 / 0.3)
    assert facts["slowdown"]["short"]["p50"] == pytest.approx(2.0)
    slowdowns = [1.0, 2.0, 1.1 / 0.3, 1.0 / 0.3]
    jain = sum(slowdowns) ** 2 / (4 * sum(value**2 for value in slowdowns))
    assert facts["fairness"] == pytest.approx(jain)
    assert facts["first_token_ms"]["p100"] == pytest.approx(900)
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None, "p100": None}


def test_a_run_of_both_policies(model, tmp_path, monkeypatch, capsys):
    def short_answers(*args, **keywords):
        return [replace(each, max_tokens=4) for each in poisson_arrivals(*args, **keywords)]

    monkeypatch.setattr(serve_sim, "poisson_arrivals", short_answers)
    what = ["--requests", "5", "--rates", "40", "80", "--model", model, "--device", "cpu"]
    pool = ["--max-num-seqs", "4", "--num-kv-blocks", "256"]
    files = ["--output", str(tmp_path / "sim.json"), "--plot", str(tmp_path / "sim.svg")]
    assert main(["bench", "serve-sim", *what, *pool, *files]) == 0
    report = read_report(tmp_path / "sim.json")
    runs = [(run["policy"], run["rate_per_s"]) for run in report["runs"]]
    assert runs == [("prefill_first", 40), ("prefill_first", 80), ("mixed", 40), ("mixed", 80)]
    for run in report["runs"]:
        assert run["requests"] == 5 and 0 <= run["goodput_per_s"] <= run["served_per_s"]
        assert 0 < run["fairness"] <= 1 + 1e-9
    assert report["arrivals"]["seed"] == 0 and report["served_per_s_all_at_once"] > 0
    texts = texts_of((tmp_path / "sim.svg").read_text(encoding="utf-8"))
    assert report["date"] in texts and "goodput" in texts and "mixed, p99" in texts
    captured = capsys.readouterr()
    assert "fairness" in captured.out and "5/5" in captured.err
