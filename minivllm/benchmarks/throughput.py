"""``minivllm bench throughput``: the whole engine on the field's usual workload."""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from minivllm.benchmarks.harness import ceilings, format_table
from minivllm.benchmarks.peers import run_peers
from minivllm.benchmarks.profile import profile_decode
from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.benchmarks.shapes import shape_folder
from minivllm.benchmarks.svg import Bar, bar_chart, write_svg
from minivllm.benchmarks.workload import Workload, check_greedy, usual_workload, work_of
from minivllm.distributed.host_memory import peak_host_bytes
from minivllm.engine.config import EngineConfig
from minivllm.engine.outputs import RequestOutput
from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM
from minivllm.models.hub import model_folder


def build(settings: dict[str, Any], shapes: str | None) -> tuple[LLM, float]:
    """The engine, on random weights of ``shapes``, or of its model; and seconds until ready.

    The seconds count from the start of the process where the system tells it (Linux). Raises
    ValueError if both are named.
    """
    settings = {"skip_tokenizer_init": True, "enable_prefix_caching": False, **settings}
    if settings.get("model") is not None and shapes is not None:
        raise ValueError(f"shapes={shapes!r} and model={settings['model']!r}: give one of them")
    if shapes is not None:
        settings |= {"model": shape_folder(shapes), "load_format": "dummy"}
    began = time.perf_counter()
    before = process_age()
    llm = LLM(**settings)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    built = time.perf_counter() - began
    # As a server would: what lives from now on need not be searched for garbage again and again,
    # which a step would have to wait for.
    gc.freeze()
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
    peers: bool = False,
    plot: str | None = None,
) -> dict[str, Any]:
    """The field's usual workload; prints tokens a second and the share of the machine's limit.

    peers: then run what else is installed on the same workload. plot: a file for the picture.
    profile: also decode steps; ValueError if they would not run on a GPU.
    """
    if profile:
        where = EngineConfig(device=settings.get("device", "auto")).resolve_device()
        if where.type != "cuda":
            raise ValueError(
                f"profile={profile}: decode steps are profiled on a CUDA device, and this is "
                f"{where}, where there is nothing to profile; leave --profile out"
            )
    report, workload, place = _measure_throughput(
        settings, shapes, num_requests, most, rounds, profile=profile
    )
    first, median, limit = (
        report[name]
        for name in (
            "first_output_tokens_per_s",
            "median_output_tokens_per_s",
            "limit_output_tokens_per_s",
        )
    )
    work, peak = report["work"], report["peak_host_bytes"]
    rows = [
        ["ready after process start", f"{report['ready_seconds']:.1f} s"],
        ["of that, loading and recording", f"{report['loading_seconds']:.1f} s"],
        ["peak host memory", "unknown" if peak is None else f"{peak / 2**30:.2f} GiB"],
        ["first run", f"{first:,.0f} output tokens/s"],
        [f"median of {rounds}", f"{median:,.0f} output tokens/s"],
        ["bytes to move", f"{(work['kv_bytes'] + work['weight_bytes']) / 1e12:.2f} TB"],
        ["operations", f"{work['flop'] / 1e12:.0f} TFLOP"],
        ["limit at the measured ceilings", f"{limit:,.0f} output tokens/s"],
        ["share of the limit, first / median", f"{first / limit:.2f} / {median / limit:.2f}"],
        ["host time a step", f"{report['rounds'][-1]['host_ms_per_step']:.2f} ms"],
        ["greedy tokens against the plain model", verdict(report["check"])],
    ]
    print(format_table(["throughput", machine_facts()["device"]], rows))
    if peers:
        # The engine is gone by now; what the allocator still holds of it, a peer could not have.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        report["peers"] = run_peers(workload, **place, rounds=rounds)
    write_report(output, report)
    write_svg(plot, draw({**machine_facts(), **report}))
    return report


def _measure_throughput(
    settings: dict[str, Any],
    shapes: str | None,
    num_requests: int,
    most: int,
    rounds: int,
    *,
    profile: bool,
) -> tuple[dict[str, Any], Workload, dict[str, Any]]:
    """The report, the workload, and which model in which form runs where, for the peers.

    Nothing of the engine is left when it returns.
    """
    began = time.perf_counter()
    llm, ready = build(settings, shapes)
    loading = time.perf_counter() - began
    with llm:
        engine = llm.engine
        workload = usual_workload(num_requests, most, vocab_size=vocab_size(llm))
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
        # Now: the ceilings and the check take memory that serving does not.
        peak = peak_host_bytes()
        runner = engine.runner
        assert runner is not None
        device = runner.device
        limits = ceilings(device)
        dtype = next(runner.model.parameters()).dtype
        work = work_of(workload, engine.model_config, dtype)
        least = work.seconds(limits["copy_bytes_per_s"], limits["matmul_flop_per_s"])
        limit = workload.num_output_tokens / least
        first = results[0]["output_tokens_per_s"]
        median = statistics.median(result["output_tokens_per_s"] for result in results)
        report: dict[str, Any] = {
            "benchmark": "throughput",
            "model": shapes or str(settings.get("model") or "the embedded tiny Qwen3"),
            "requests": num_requests,
            "input_tokens": workload.num_input_tokens,
            "output_tokens": workload.num_output_tokens,
            "ready_seconds": ready,
            # Weights, room for the KV cache, kernels and graphs: all but the imports.
            "loading_seconds": loading,
            "peak_host_bytes": peak,
            "rounds": results,
            "first_output_tokens_per_s": first,
            "median_output_tokens_per_s": median,
            "ceilings": limits,
            "work": vars(work),
            "limit_output_tokens_per_s": limit,
            "first_share_of_limit": first / limit,
            "median_share_of_limit": median / limit,
            "check": check_greedy(runner.model, greedy_outputs(llm)),
            "graphs": vars(runner.facts) if hasattr(runner, "facts") else None,
        }
        if device.type == "cuda":
            report["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()
        if profile:
            report["profile"] = {
                f"batch {batch}, context {context}": profile_decode(llm, batch, context)
                for batch, context in ((256, 540), (32, 256), (1, 256))
            }
        place = {
            "folder": model_folder(engine.config.model),
            "dummy": engine.config.load_format == "dummy",
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
        }
    return report, workload, place


def draw(report: dict[str, Any]) -> str:
    """Output tokens a second beside the machine's limit, and the peers that ran with it."""
    count = len(report["rounds"])
    bars = [
        Bar("limit of this machine", report["limit_output_tokens_per_s"], colour=5),
        Bar("minivllm, first run", report["first_output_tokens_per_s"]),
        Bar(f"minivllm, median of {count}", report["median_output_tokens_per_s"]),
    ]
    for name, peer in report.get("peers", {}).items():
        if "output_tokens_per_s" in peer:
            part = "" if peer["requests"] == report["requests"] else f"{peer['requests']} requests"
            label = f"{name} {peer['version']}"
            bars.append(Bar(label, peer["output_tokens_per_s"], part, colour=1))
    return bar_chart(
        "Throughput, output tokens a second",
        bars,
        unit="tokens/s",
        notes=[
            f"{report['model']} on {report['device']}, {report['date']}",
            f"{report['requests']} requests at once, {report['input_tokens']:,} tokens in and "
            f"{report['output_tokens']:,} out, temperature 0.6",
            "the limit is computed from the copy bandwidth and product rate of the same run",
        ],
    )


def _timed(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> tuple[float, list[RequestOutput]]:
    """Seconds from the first request to the last token, under a progress bar of tokens."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=True)
    return time.perf_counter() - began, outputs


def greedy_outputs(llm: LLM, num_requests: int = 24, count: int = 48) -> list[RequestOutput]:
    """Greedy answers to a few of the usual prompts, as long as the engine's context allows."""
    room = llm.engine.max_model_len
    count = min(count, room // 2)
    workload = usual_workload(num_requests, min(400, room - count), 9, vocab_size(llm))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=count)
    return llm.generate(workload.prompts, params, use_tqdm=False)


def vocab_size(llm: LLM) -> int:
    """How many tokens the model knows."""
    return llm.engine.model_config.vocab_size


def verdict(check: dict[str, float] | None) -> str:
    """What :func:`check_greedy` found, in a few words."""
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
