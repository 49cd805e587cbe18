"""CUDA graphs: a decode step recorded once and replayed with a single launch.

A decode step is some 250 small kernels. Launched from Python one by one they take longer than they
run; a graph (CUDA Graphs, CUDA C++ Programming Guide) holds them all with their arguments, so
replaying it costs about as much as launching one. The price: every address and every shape in it is
fixed. So the step reads its inputs from memory that stays, and one graph is recorded for each batch
size of a ladder; a batch takes the smallest graph that it fits into, and the rest is padding.

    batch of 11     ladder  1  2  4  8 [16] 24  32 ...      11 sequences + 5 places of padding
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """Turns a function that works on memory that stays into something that can be replayed."""

    def record(self, work: Callable[[], None]) -> Replay: ...


class CudaGraphRecorder:
    """Records into CUDA graphs that share one pool of memory.

    Graphs that never run at the same time may use the same memory for what lies between their
    kernels. Recorded largest first, the smaller ones find room in what the first has reserved.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Replay:
        """Run ``work`` once for real, which compiles its kernels, and then record it."""
        work()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            work()
        return graph.replay


class NoRecorder:
    """Replays by doing the work again: ``enforce_eager``, and devices without graphs."""

    def record(self, work: Callable[[], None]) -> Replay:
        return work


def ladder_sizes(most: int) -> list[int]:
    """Batch sizes worth a graph of their own, ``most`` the last: 1, 2, 4, then every 8 up to 256,
    then every 32. Raises ValueError if ``most`` is below 1.

    Attention skips padding, and a matrix product's tile is 16 rows or more, so a few rows of
    padding cost next to nothing; but a step of one must not pay for sixteen.
    """
    if most < 1:
        raise ValueError(f"most={most} must be at least 1: the largest batch of a step")
    sizes = [size for size in (1, 2, 4) if size < most]
    step = 8
    size = 8
    while size < most:
        sizes.append(size)
        # Beyond 256 a step takes longer, and so does recording: coarser rungs do.
        step = 8 if size < 256 else 32
        size += step
    return [*sizes, most]


def _nothing(size: int) -> None:
    """The work of a ladder that has been cleared."""


class GraphLadder:
    """One recording of ``work(size)`` for each size.

    work: runs a step of ``size`` places on memory that stays. sizes: ascending.
    """

    def __init__(self, sizes: list[int], work: Callable[[int], None], recorder: Recorder) -> None:
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError(f"sizes={sizes} must be ascending batch sizes of at least 1")
        self.sizes = sizes
        self._work = work
        self.recorder = recorder
        self._replays: dict[int, Replay] = {}
        self.seconds = 0.0

    def record(self) -> None:
        """Record every size, the largest first, for it needs the most memory; notes ``seconds``."""
        started = time.perf_counter()
        # A collection in the middle of a recording could free memory of another stream.
        gc.collect()
        for size in reversed(self.sizes):
            self._replays[size] = self.recorder.record(lambda size=size: self._work(size))
        self.seconds = time.perf_counter() - started

    def size_for(self, batch: int) -> int:
        """The smallest recorded size that holds ``batch`` places; ValueError if none does."""
        if not 1 <= batch <= self.sizes[-1]:
            raise ValueError(
                f"batch={batch} has no graph: sizes from 1 to {self.sizes[-1]} are recorded"
            )
        return self.sizes[bisect_left(self.sizes, batch)]

    def replay(self, batch: int) -> int:
        """Run the step for ``batch`` places; returns the size that ran, padding included."""
        size = self.size_for(batch)
        self._replays[size]()
        return size

    def clear(self) -> None:
        """Free the graphs. What they share with a process group must outlive them."""
        self._replays.clear()
        # Usually a method of whoever owns this ladder: with it, both would wait for a collection.
        self._work = _nothing
