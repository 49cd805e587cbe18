"""What the kernel benchmarks share: clocks, the machine's ceilings, tables.

A GPU that multiplies at full rate for a second grows warm and slows down, and whoever is measured
last looks worst. So contenders take turns, in short bursts with pauses between them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Call, device: torch.device, *, budget_s: float = 0.1) -> float:
    """Median seconds of one call, after warm-up, from 3 to 100 runs within about ``budget_s``.

    On a GPU the clock is a pair of CUDA events around each call, so launch gaps are part of it.
    """
    call()
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    runs = max(3, min(100, int(budget_s / max(time.perf_counter() - began, 1e-6))))
    if device.type != "cuda":
        return statistics.median(_wall_time(call) for _ in range(runs))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    synchronize(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


def _wall_time(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def time_in_turns(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 5,
    burst_s: float = 0.03,
    pause_s: float = 0.05,
) -> dict[str, float]:
    """Median seconds of each call over ``rounds`` of short bursts, all calls in every round."""
    if device.type != "cuda":
        rounds, pause_s = 1, 0.0
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(time_calls(call, device, budget_s=burst_s))
            time.sleep(pause_s)
    return {name: statistics.median(values) for name, values in times.items()}


def time_host(call: Call, device: torch.device, *, runs: int = 10) -> float | None:
    """Median seconds until ``call`` returns, the GPU's work not awaited; None on a CPU."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(runs):
        synchronize(device)
        times.append(_wall_time(call))
    synchronize(device)
    return statistics.median(times)


def replay_of(calls: Sequence[Call]) -> Call:
    """``calls`` captured one after the other in one CUDA graph: its replay has no host in it.

    What is returned holds on to ``calls``, and so to the tensors whose addresses the graph knows.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]

    def replay() -> Any:
        graph.replay()
        return calls, results

    return replay


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy within the device, read and written bytes both counted."""
    size = 2**26
    if device.type == "cuda":
        # An engine beside it may have left little memory.
        size = min(2**32, max(size, torch.cuda.mem_get_info(device)[0] // 4))
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * size / time_calls(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device) -> float:
    """Operations a second of a large product of random matrices (bfloat16; float32 on a CPU)."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / time_calls(lambda: a @ b, device)


def ceilings(device: torch.device) -> dict[str, float]:
    """Both ceilings, measured now: what every figure here is a share of."""
    return {"copy_bytes_per_s": copy_bandwidth(device), "matmul_flop_per_s": matmul_rate(device)}


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that one call adds to the allocator at its peak; None where nobody counts (a CPU)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of text under headers, columns aligned: names to the left, numbers to the right."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    lines = []
    for row in [list(headers), ["-" * width for width in widths], *cells]:
        first = row[0].ljust(widths[0])
        rest = (value.rjust(width) for value, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)
