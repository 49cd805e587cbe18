"""``minivllm bench latency``: how long until the first token, and from one to the next."""

from __future__ import annotations

import statistics
import time
from typing import Any

from minivllm.benchmarks.harness import copy_bandwidth, format_table
from minivllm.benchmarks.report import write_report
from minivllm.benchmarks.throughput import build, greedy_outputs, verdict, vocab_size
from minivllm.benchmarks.workload import check_greedy, matrix_parameters, usual_workload
from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM


def run_latency(
    settings: dict[str, Any],
    *,
    shapes: str | None,
    batches: list[int],
    num_input: int,
    num_output: int,
    output: str | None,
) -> None:
    """Time to the first token and between tokens, for batches that start together.

    A step must read all weights at least. Each batch's ``step_share_of_weight_limit`` is the time
    which that takes at the bandwidth of a large copy in the same run, over the median step.
    """
    llm, ready = build(settings, shapes)
    rows, results = [], {}
    with llm:
        for batch in batches:
            _latency_round(llm, batch, num_input, 16, seed=1)
            rounds = [
                _latency_round(llm, batch, num_input, num_output, seed=2 + number)
                for number in range(3)
            ]
            firsts = sorted(first for result in rounds for first in result[0])
            gaps = sorted(gap for result in rounds for gap in result[1])
            totals = [result[2] for result in rounds]
            facts = {
                "first_token_ms": _percentiles(firsts),
                "between_tokens_ms": _percentiles(gaps),
                "ms_per_token": 1e3 * statistics.median(totals) / num_output,
            }
            results[str(batch)] = facts
            rows.append(
                [
                    str(batch),
                    f"{facts['ms_per_token']:.3f}",
                    f"{facts['first_token_ms']['p50']:.2f}",
                    *(f"{facts['between_tokens_ms'][p]:.3f}" for p in ("p50", "p90", "p99")),
                ]
            )
        runner = llm.engine.runner
        assert runner is not None
        dtype = next(runner.model.parameters()).dtype
        weights = {
            "bytes": matrix_parameters(llm.engine.model_config) * dtype.itemsize,
            "copy_bytes_per_s": copy_bandwidth(runner.device),
        }
        weights["ms"] = 1e3 * weights["bytes"] / weights["copy_bytes_per_s"]
        for facts, row in zip(results.values(), rows, strict=True):
            share = weights["ms"] / facts["between_tokens_ms"]["p50"]
            facts["step_share_of_weight_limit"] = share
            row.append(f"{share:.2f}")
        check = check_greedy(runner.model, greedy_outputs(llm, 1, 64))
    headers = ["batch", "ms a token, all in", "first token", "between: p50", "p90", "p99"]
    print(format_table([*headers, "share of the weights' limit"], rows))
    print(f"reading the weights alone: {weights['ms']:.3f} ms a step")
    print(f"greedy tokens against the plain model: {verdict(check)}")
    write_report(
        output,
        {
            "benchmark": "latency",
            "model": shapes or str(settings.get("model")),
            "input_tokens": num_input,
            "output_tokens": num_output,
            "ready_seconds": ready,
            "batches": results,
            "weights": weights,
            "check": check,
        },
    )


def _latency_round(
    llm: LLM, batch: int, num_input: int, num_output: int, *, seed: int
) -> tuple[list[float], list[float], float]:
    """Seconds to each request's first token, between tokens, and in all."""
    prompts = usual_workload(batch, num_input, seed, vocab_size(llm)).prompts
    prompts = [(prompt * num_input)[:num_input] for prompt in prompts]
    engine = llm.engine
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=num_output)
    began = time.perf_counter()
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), prompt, params)
    last: dict[str, float] = {}
    firsts, gaps = [], []
    while engine.has_unfinished_requests:
        outputs = engine.step()
        now = time.perf_counter()
        for out in outputs:
            if out.request_id in last:
                gaps.append(now - last[out.request_id])
            else:
                firsts.append(now - began)
            last[out.request_id] = now
    return firsts, gaps, time.perf_counter() - began


def _percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds; values ascending, in seconds."""
    last = len(values) - 1
    return {
        f"p{share}": 1e3 * values[round(last * share / 100)] if values else float("nan")
        for share in (50, 90, 99, 100)
    }
