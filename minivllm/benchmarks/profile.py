"""Where the time of a decode step goes: kernels, busy time and gaps, from PyTorch's profiler."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM

# Which kernels count as what, by a part of their names; the first that fits.
PARTS = {
    "attention": ("decode", "merge", "plan_kernel", "prefill", "flash", "attention"),
    "sampling": ("sample", "argmax", "best_of"),
    "norm, RoPE, activation": ("norm", "gain", "rope", "silu"),
    "rows": ("begin_step", "finish_step", "apply_updates"),
    "matrix products": (
        "gemm",
        "cutlass",
        "nvjet",
        "gemv",
        "matvec",
        "product",
        "skinny",
        "splitK",
        "cublas",
    ),
    "copies": ("memcpy", "memset", "copy"),
}


def profile_decode(llm: LLM, batch: int, context: int, steps: int = 30) -> dict[str, Any]:
    """Profile ``steps`` decode steps of ``batch`` sequences whose contexts are about ``context``.

    Returns, for one step: milliseconds from step to step, busy milliseconds of the GPU, its idle
    share, the number of kernels, and busy milliseconds by part and by kernel.
    """
    engine = llm.engine
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=steps + 60)
    for place in range(batch):
        prompt = [1 + place % 1000] * (context - steps // 2)
        engine.add_request(str(place), prompt, params, stream=False)
    # Until all decode, and some steps more.
    while any(seq.num_output_tokens < 4 for seq in engine.scheduler.running) or (
        engine.scheduler.waiting
    ):
        engine.step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    for place in range(batch):
        engine.abort_request(str(place))
    spans = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end, event.name))
    return summarise(sorted(spans), steps)


def summarise(spans: list[tuple[float, float, str]], steps: int) -> dict[str, Any]:
    """spans: (start, end, name) in microseconds, ascending, of ``steps`` steps.

    Kernels overlap where one is launched while those before it run, and waits inside for their end.
    So a kernel counts from the end of the one that ended before it, if it had begun by then.
    """
    if not spans:
        return {}
    busy = 0.0
    end = spans[0][0]
    for start, stop, _ in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    total = end - spans[0][0]
    end = spans[0][0]
    parts: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(list)
    for start, stop, name in sorted(spans, key=lambda span: span[1]):
        added = stop - max(start, end)
        end = stop
        parts[part_of(name)] += added
        kernels[name].append(added)
    gaps: dict[str, list[float]] = defaultdict(list)
    reached, before = spans[0][1], spans[0][2]
    for start, stop, name in spans[1:]:
        if start > reached:
            gaps[f"{before[:40]} -> {name[:40]}"].append(start - reached)
        if stop > reached:
            reached, before = stop, name
    widest = sorted(gaps.items(), key=lambda item: -sum(item[1]))[:10]
    slowest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:16]
    return {
        "step_ms": total / steps / 1e3,
        "busy_ms": busy / steps / 1e3,
        "idle_share": 1 - busy / total,
        "kernels_a_step": len(spans) / steps,
        "parts_ms": {part: value / steps / 1e3 for part, value in sorted(parts.items())},
        "gaps": [
            {
                "between": pair,
                "a_step": len(times) / steps,
                "us_each": sum(times) / len(times),
                "ms_a_step": sum(times) / steps / 1e3,
            }
            for pair, times in widest
        ],
        "kernels": [
            {
                "name": name[:80],
                "a_step": len(times) / steps,
                "us_each": sum(times) / len(times),
                "ms_a_step": sum(times) / steps / 1e3,
            }
            for name, times in slowest
        ],
    }


def part_of(name: str) -> str:
    """The part of a step that a kernel belongs to."""
    low = name.lower()
    for part, words in PARTS.items():
        if any(word.lower() in low for word in words):
            return part
    return "other"
