"""What every benchmark here needs: facts about the machine, clocks, ceilings, tables, JSON."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def machine_facts(device: torch.device) -> dict[str, str]:
    """Device, versions, date and command line: what a figure means nothing without."""
    facts = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    else:
        facts["threads"] = str(torch.get_num_threads())
    for package in ("triton", "minivllm"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], Any], device: torch.device, *, budget_s: float = 0.2) -> float:
    """Median seconds of one call, after warm-up, from at least 5 runs within about budget_s.

    On a GPU the clock is a pair of CUDA events around each call: launch gaps are part of it.
    """
    for _ in range(2):
        call()
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    runs = max(5, min(100, int(budget_s / max(time.perf_counter() - began, 1e-6))))
    if device.type != "cuda":
        return statistics.median(_wall_times(call, runs))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    synchronize(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


def _wall_times(call: Callable[[], Any], runs: int) -> Iterable[float]:
    for _ in range(runs):
        began = time.perf_counter()
        call()
        yield time.perf_counter() - began


def time_in_graph(calls: Sequence[Callable[[], Any]], *, budget_s: float = 0.2) -> float:
    """Median seconds of one of ``calls``, captured one after the other in one CUDA graph.

    A graph takes the host out of the measurement. Give calls that read different memory, larger
    together than the L2 cache, or the cache is what will be measured.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return time_calls(graph.replay, torch.device("cuda"), budget_s=budget_s) / len(calls)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large device-to-device copy, read and written bytes both counted."""
    size = 2**32 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / time_calls(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Floating-point operations a second of a large square product of random numbers."""
    size = 8192 if device.type == "cuda" else 512
    dtype = dtype if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / time_calls(lambda: a @ b, device)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
