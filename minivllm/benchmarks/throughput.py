"""``minivllm bench throughput`` and ``latency``: the whole engine, as its users meet it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from minivllm.benchmarks.harness import ceilings, format_table
from minivllm.benchmarks.profile import profile_decode
from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.benchmarks.shapes import shape_folder
from minivllm.benchmarks.workload import check_greedy, usual_workload, work_of
from minivllm.engine.outputs import RequestOutput
from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM


def build(settings: dict[str, Any], shapes: str | None) -> tuple[LLM, float]:
    """The engine, on random weights of ``shapes`` if no model is named; and seconds until ready.

    The seconds count from the start of the process where the system tells it (Linux).
    """
    settings = {"skip_tokenizer_init": True, "enable_prefix_caching": False, **settings}
    if settings.get("model") is None and shapes is not None:
        settings |= {"model": shape_folder(shapes), "load_format": "dummy"}
    began = time.perf_counter()
    before = process_age()
    llm = LLM(**settings)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    built = time.perf_counter() - began
    return llm, built + (before or 0.0)


def run_throughput(
    settings: dict[str, Any],
    *,
    shapes: str | None,
    num_requests: int,
    most: int,
    rounds: int,
    profile: bool,
    output: str | None,
) -> None:
    """The field's usual workload; prints tokens a second and the share of the machine's limit."""
    llm, ready = build(settings, shapes)
    with llm:
        engine = llm.engine
        workload = usual_workload(num_requests, most, vocab_size=_vocab(llm))
        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count)
            for count in workload.max_tokens
        ]
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)
        results = []
        for _ in range(rounds):
            stats_before = vars(engine.stats).copy()
            seconds, outputs = _timed(llm, workload.prompts, params)
            tokens = sum(len(out.outputs[0].token_ids) for out in outputs)
            assert tokens == workload.num_output_tokens
            steps = engine.stats.num_steps - stats_before["num_steps"]
            host = engine.stats.host_seconds - stats_before["host_seconds"]
            results.append(
                {
                    "seconds": seconds,
                    "output_tokens_per_s": tokens / seconds,
                    "steps": steps,
                    "host_ms_per_step": 1e3 * host / steps,
                }
            )
            print(f"{seconds:.3f} s, {tokens / seconds:,.0f} output tokens/s", flush=True)
        runner = engine.runner
        assert runner is not None
        device = runner.device
        limits = ceilings(device)
        dtype = next(runner.model.parameters()).dtype
        work = work_of(workload, engine.model_config, dtype)
        least = work.seconds(limits["copy_bytes_per_s"], limits["matmul_flop_per_s"])
        limit = workload.num_output_tokens / least
        first = results[0]["output_tokens_per_s"]
        best = statistics.median(result["output_tokens_per_s"] for result in results)
        check = check_greedy(runner.model, _greedy_outputs(llm))
        report: dict[str, Any] = {
            "benchmark": "throughput",
            "model": shapes or str(settings.get("model")),
            "requests": num_requests,
            "input_tokens": workload.num_input_tokens,
            "output_tokens": workload.num_output_tokens,
            "ready_seconds": ready,
            "rounds": results,
            "ceilings": limits,
            "work": vars(work),
            "limit_output_tokens_per_s": limit,
            "first_share_of_limit": first / limit,
            "median_share_of_limit": best / limit,
            "check": check,
            "graphs": vars(runner.facts) if hasattr(runner, "facts") else None,
        }
        if device.type == "cuda":
            report["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()
        if profile and device.type == "cuda":
            report["profile"] = {
                f"batch {batch}, context {context}": profile_decode(llm, batch, context)
                for batch, context in ((256, 540), (32, 256), (1, 256))
            }
    rows = [
        ["ready after process start", f"{ready:.1f} s"],
        ["first run", f"{first:,.0f} output tokens/s"],
        [f"median of {rounds}", f"{best:,.0f} output tokens/s"],
        ["bytes to move", f"{(work.kv_bytes + work.weight_bytes) / 1e12:.2f} TB"],
        ["operations", f"{work.flop / 1e12:.0f} TFLOP"],
        ["limit at the measured ceilings", f"{limit:,.0f} output tokens/s"],
        ["share of the limit, first / median", f"{first / limit:.2f} / {best / limit:.2f}"],
        ["host time a step", f"{results[-1]['host_ms_per_step']:.2f} ms"],
        ["greedy tokens against the plain model", _verdict(check)],
    ]
    print(format_table(["throughput", machine_facts()["device"]], rows))
    write_report(output, report)


def run_latency(
    settings: dict[str, Any],
    *,
    shapes: str | None,
    batches: list[int],
    num_input: int,
    num_output: int,
    output: str | None,
) -> None:
    """Time to the first token and between tokens, for batches that start together."""
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
        check = None
        if llm.engine.runner is not None:
            check = check_greedy(llm.engine.runner.model, _greedy_outputs(llm, 1, 64))
    headers = ["batch", "ms a token, all in", "first token", "between: p50", "p90", "p99"]
    print(format_table(headers, rows))
    print(f"greedy tokens against the plain model: {_verdict(check)}")
    write_report(
        output,
        {
            "benchmark": "latency",
            "model": shapes or str(settings.get("model")),
            "input_tokens": num_input,
            "output_tokens": num_output,
            "ready_seconds": ready,
            "batches": results,
            "check": check,
        },
    )


def _latency_round(
    llm: LLM, batch: int, num_input: int, num_output: int, *, seed: int
) -> tuple[list[float], list[float], float]:
    """Seconds to each request's first token, between tokens, and in all."""
    prompts = usual_workload(batch, num_input, seed, _vocab(llm)).prompts
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


def _timed(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> tuple[float, list[RequestOutput]]:
    """Seconds from the first request to the last token, under a progress bar of tokens."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=True)
    return time.perf_counter() - began, outputs


def _greedy_outputs(llm: LLM, num_requests: int = 24, count: int = 48) -> list[RequestOutput]:
    workload = usual_workload(num_requests, 400, 9, _vocab(llm))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=count)
    return llm.generate(workload.prompts, params, use_tqdm=False)


def _vocab(llm: LLM) -> int:
    return llm.engine.model_config.vocab_size


def _percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds; values ascending, in seconds."""
    last = len(values) - 1
    return {
        f"p{share}": 1e3 * values[round(last * share / 100)] if values else float("nan")
        for share in (50, 90, 99, 100)
    }


def _verdict(check: dict[str, float] | None) -> str:
    if check is None:
        return "not checked"
    word = "agree" if check["agrees"] else "DIFFER"
    return (
        f"{word}: {check['likeliest_share']:.1%} the likeliest, the worst "
        f"{check['worst_shortfall']:.4f} short (rounding: {check['rounding_of_plain_model']:.4f})"
    )


def process_age() -> float | None:
    """Seconds since this process started; None where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        import os

        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
