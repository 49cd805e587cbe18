"""Decode on several ranks: time a token, time in communication, and the limit of arithmetic.

Run it with ``python -m minivllm.benchmarks.tensor_parallel --shapes Qwen3-8B --ranks 1 2``. Weights
are random, and the same for every number of ranks, so greedy tokens can be compared.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch

from minivllm.benchmarks.harness import ceilings, format_table
from minivllm.benchmarks.profile import profile_decode
from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.benchmarks.shapes import SHAPES
from minivllm.benchmarks.throughput import build
from minivllm.benchmarks.workload import check_greedy, matrix_parameters, usual_workload
from minivllm.engine.outputs import RequestOutput
from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM
from minivllm.models.config import ModelConfig
from minivllm.models.loader import random_model

NUM_INPUT = 100


def main() -> None:
    """Measure one shape on each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", choices=SHAPES, default="Qwen3-8B")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=128, help="decoded in each measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-check", action="store_true", help="skip the plain float32 model")
    parser.add_argument("--output", help="write a JSON report here")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    greedy: dict[int, list[RequestOutput]] = {}
    config: ModelConfig | None = None
    for ranks in given.ranks:
        began = time.perf_counter()
        settings = {
            "tensor_parallel_size": ranks,
            "max_num_seqs": max(given.batch),
            "max_model_len": 1024,
            "gpu_memory_utilization": 0.6,
            "device": given.device,
        }
        llm, _ = build(settings, given.shapes)
        with llm:
            config = llm.engine.model_config
            facts: dict[str, Any] = {"ready_seconds": time.perf_counter() - began}
            greedy[ranks] = _greedy(llm)
            facts["same_tokens_as_first"] = _same(greedy[given.ranks[0]], greedy[ranks])
            for batch in given.batch:
                facts[str(batch)] = measure(llm, batch, given.tokens)
            results[str(ranks)] = facts
        print(f"{ranks} ranks: {facts}", flush=True)
        write_report(given.output, {"benchmark": "tensor_parallel", "ranks": results})
        gc.collect()
    assert config is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = ceilings(device)["copy_bytes_per_s"]
    checks = {}
    if not given.no_check:
        model = random_model(config, dtype=_dtype(config, device), device=device)
        checks = {ranks: check_greedy(model, outputs) for ranks, outputs in greedy.items()}
    report = {
        "benchmark": "tensor_parallel",
        "model": given.shapes,
        "input_tokens": NUM_INPUT,
        "output_tokens": given.tokens,
        "copy_bytes_per_s": bandwidth,
        "ranks": results,
        "checks": checks,
    }
    rows = []
    for ranks in given.ranks:
        for batch in given.batch:
            facts = results[str(ranks)][str(batch)]
            first = results[str(given.ranks[0])][str(batch)]
            limit = least_ms(config, batch, given.tokens, ranks, bandwidth, device)
            facts["limit_ms"] = limit
            rows.append(
                [
                    f"{ranks}",
                    f"{batch}",
                    f"{facts['ms_per_token']:.3f}",
                    f"{first['ms_per_token'] / facts['ms_per_token']:.2f}x",
                    f"{facts['communication_ms']:.3f}" if "communication_ms" in facts else "-",
                    f"{limit:.3f}",
                ]
            )
    headers = ["ranks", "batch", "ms a token", "scaling", "ms in all-reduce", "limit ms"]
    print(f"{given.shapes}, {machine_facts()['device']}")
    print(format_table(headers, rows))
    for ranks, check in checks.items():
        verdict = "agree with" if check["agrees"] else "DIFFER from"
        print(
            f"{ranks} ranks: greedy tokens {verdict} the plain model in float32, "
            f"{check['likeliest_share']:.1%} the likeliest, worst {check['worst_shortfall']:.4f} "
            f"short (rounding: {check['rounding_of_plain_model']:.4f})"
        )
    write_report(given.output, report)


def measure(llm: LLM, batch: int, tokens: int) -> dict[str, Any]:
    """Milliseconds from token to token of ``batch`` sequences that decode together."""
    engine = llm.engine
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=tokens + 24)
    times = []
    for _ in range(3):
        for place in range(batch):
            engine.add_request(str(place), [1 + place % 1000] * NUM_INPUT, params)
        while engine.scheduler.waiting or any(
            seq.num_output_tokens < 8 for seq in engine.scheduler.running
        ):
            engine.step()
        began = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        times.append(1e3 * (time.perf_counter() - began) / tokens)
        while engine.has_unfinished_requests:
            engine.step()
    facts: dict[str, Any] = {"ms_per_token": sorted(times)[1], "rounds_ms": times}
    if torch.cuda.is_available():
        profile = profile_decode(llm, batch, NUM_INPUT + 32)
        # With the wait for the slowest rank, which is part of what an exchange costs.
        facts["communication_ms"] = sum(
            kernel["ms_a_step"] for kernel in profile["kernels"] if "nccl" in kernel["name"].lower()
        )
        facts["profile"] = {
            name: profile[name] for name in ("step_ms", "busy_ms", "idle_share", "parts_ms")
        }
        facts["kernels"] = profile["kernels"][:8]
    return facts


def least_ms(
    config: ModelConfig,
    batch: int,
    tokens: int,
    ranks: int,
    bytes_per_s: float,
    device: torch.device,
) -> float:
    """The least time of a decode step: a rank's weights and cache, read once, and no exchange."""
    size = _dtype(config, device).itemsize
    kv_heads = max(1, config.num_kv_heads // ranks)
    context = NUM_INPUT + 8 + tokens / 2
    kv = 2 * config.num_layers * kv_heads * config.head_size * batch * context
    return 1e3 * size * (matrix_parameters(config) / ranks + kv) / bytes_per_s


def _greedy(llm: LLM) -> list[RequestOutput]:
    """Short and long prompts, one after the other and then together: every form of a step."""
    workload = usual_workload(6, 300, 9, llm.engine.model_config.vocab_size)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=32)
    alone = llm.generate(workload.prompts[:1], params, use_tqdm=False)
    return alone + llm.generate(workload.prompts, params, use_tqdm=False)


def _same(first: list[RequestOutput], second: list[RequestOutput]) -> float:
    """The share of answers that are the same to the last token (rounding may part them)."""
    pairs = zip(first, second, strict=True)
    same = [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in pairs]
    return sum(same) / len(same)


def _dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else config.dtype


if __name__ == "__main__":
    main()
