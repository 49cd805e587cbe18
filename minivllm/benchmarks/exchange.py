"""Sums over ranks on GPUs, alone: are they right however ranks are late, and how long do they take?

    python -m minivllm.benchmarks.exchange --ranks 2 4

One-shot sums (``distributed/one_shot.py``) beside NCCL's, both in a CUDA graph, one after the other
as in a decode step. First their results are compared, on all ranks to the bit and with a sum in
float64; and a graph is replayed thousands of times while the ranks are held up at random.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from minivllm.benchmarks.harness import format_table
from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.cli_flags import Parser, positive, positive_number
from minivllm.distributed.exchange import Exchange
from minivllm.distributed.group import TorchGroup
from minivllm.distributed.one_shot import OneShot
from minivllm.layers.layernorm import RMSNorm

CALLS = 72  # sums in a graph: two a layer of Qwen3-8B
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main() -> None:
    """Check and measure on each number of ranks."""
    parser = Parser(description=__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2])
    parser.add_argument("--width", type=positive, default=4096, help="numbers a token (4096)")
    parser.add_argument("--rows", type=positive, nargs="+", default=[1, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--replays", type=positive, default=3000, help="under random delays (3000)")
    parser.add_argument(
        "--limit", type=positive_number, default=120.0, help="seconds for each (120)"
    )
    parser.add_argument("--output", help="write a JSON report here")
    given = parser.parse_args()
    sizes = {}
    for size in given.ranks:
        sizes[str(size)] = run(size, given.width, given.rows, given.replays, given.limit)
        write_report(given.output, {"benchmark": "exchange", "sizes": sizes})
        print_table(size, sizes[str(size)])


def run(size: int, width: int, rows: list[int], replays: int, limit: float) -> dict[str, Any]:
    """Let ``size`` processes, one a GPU, do it; TimeoutError after ``limit`` seconds."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.SimpleQueue()
    settings = (size, store.port, width, rows, replays, results)
    ranks = [
        context.Process(target=_rank, args=(rank, *settings), daemon=True) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        # Rank 0's answer is a few kilobytes, which the pipe holds: nobody has to read meanwhile.
        for process in ranks:
            process.join(limit)
            if process.exitcode is None:
                raise TimeoutError(f"{size} ranks took more than {limit:.0f} s")
            if process.exitcode:
                raise RuntimeError(f"a rank of {size} ended with exit code {process.exitcode}")
        return results.get()
    finally:
        for process in ranks:
            process.kill()


def print_table(size: int, facts: dict[str, Any]) -> None:
    """Microseconds a sum."""
    names = [name for name in facts["us"] if name != "rows"]
    rows = [
        [str(count), *(f"{facts['us'][name][place]:.1f}" for name in names)]
        for place, count in enumerate(facts["us"]["rows"])
    ]
    print(f"{size} ranks, {machine_facts()['device']}, {facts['width']} wide, microseconds a sum")
    print(format_table(["tokens", *names], rows))
    print("checked:", facts["checked"], flush=True)


def _rank(
    rank: int, size: int, port: int, width: int, rows: list[int], replays: int, results: Any
) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    # Every rank has numbers of its own.
    torch.manual_seed(rank)
    store = dist.TCPStore("127.0.0.1", port)
    group = TorchGroup(store, rank, size, device, local=True)
    checked = {}
    for number, dtype in enumerate(DTYPES):
        here = dist.PrefixStore(f"check {number}", store)
        checked[str(dtype).removeprefix("torch.")] = _check(group, here, dtype, width, replays)
        _say(rank, f"{dtype}: {checked[str(dtype).removeprefix('torch.')]}")
    facts = _measure(group, dist.PrefixStore("measure", store), width, rows)
    if rank == 0:
        results.put({"width": width, "checked": checked, **facts})
    group.least(0)
    group.abort()


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def _connect(group: TorchGroup, store: dist.Store, **settings: Any) -> OneShot:
    # Every object needs a name of its own to meet by.
    before, group.store = group.store, store
    one_shot = OneShot.connect(group, pdl=True, **settings)
    group.store = before
    if one_shot is None:
        raise RuntimeError("these GPUs share no memory")
    return one_shot


def _check(
    group: TorchGroup, store: dist.Store, dtype: torch.dtype, width: int, replays: int
) -> dict[str, Any]:
    """Raises AssertionError if a sum is wrong."""
    device, rank, size = group.device, group.rank, group.size
    one_shot = _connect(
        group,
        store,
        width=width,
        dtype=dtype,
        most_rows=64,
        most_parts=4,
        most_sampled=64,
    )
    norm = RMSNorm(width, 1e-6, dtype=dtype, device=device)
    norm.requires_grad_(False).weight.normal_()
    plain = Exchange(group, pdl=True)
    worst = apart = 0.0
    close = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]
    for step in range(40):
        rows = (1, 2, 7, 32, 64)[step % 5]
        x = torch.randn(rows, width, device=device).to(dtype)
        every = group.all_gather(x)
        total = one_shot.sum_rows(x)
        same = group.all_gather(total)
        assert torch.equal(same, same[:1].expand_as(same)), "ranks differ"
        exact = every.double().sum(dim=0)
        worst = max(worst, float((total - exact).norm() / exact.norm()))
        residual = torch.randn(rows, width, device=device).to(dtype)
        residual = group.all_gather(residual)[0].contiguous()
        first, second = one_shot.add_norm(x, residual, norm), plain.add_norm(x, residual, norm)
        for mine, other in zip(first, second, strict=True):
            apart = max(apart, float((mine - other).norm() / other.norm()))
        few = (1, 3)[step % 2]
        parts = torch.randn(3, few, width, device=device)
        base = group.all_gather(torch.randn(few, width, device=device))[0].contiguous()
        summed, scaled = torch.empty_like(base), torch.empty_like(base, dtype=dtype)
        squares = one_shot.add_gain_of_parts(parts, base, norm.weight, summed, scaled)
        expected = group.all_gather(parts).double().sum(dim=(0, 1)) + base
        assert float((summed - expected).norm() / expected.norm()) < close
        assert torch.equal(scaled, (summed * norm.weight).to(dtype))
        assert torch.allclose(squares.sum(dim=0), summed.square().sum(dim=1), rtol=1e-5)
        score = torch.randn(33, device=device).round(decimals=1)
        token = torch.randint(1000 * rank, 1000 * rank + 900, (33,), device=device)
        best = torch.empty_like(token)
        one_shot.best(score, token, best)
        scores, tokens = group.all_gather(score), group.all_gather(token)
        wins = torch.where(scores == scores.amax(dim=0), tokens, 1 << 40).amin(dim=0)
        assert torch.equal(best, wins)
    assert worst < close, f"{dtype}: {worst} from the sum in float64"
    wrong = _replay_under_delays(group, one_shot, dtype, width, replays)
    assert wrong == 0, f"{wrong} wrong sums under delays"
    one_shot.close()
    return {
        "distance_from_float64": worst,
        "distance_from_nccl_and_norm": apart,
        "replays_under_delays": replays,
        "wrong": wrong,
        "ranks": size,
    }


def _replay_under_delays(
    group: TorchGroup, one_shot: OneShot, dtype: torch.dtype, width: int, replays: int
) -> int:
    """How many of a graph's sums are wrong, of numbers whose sum is known to the bit."""
    device, size = group.device, group.size
    generator = torch.Generator(device).manual_seed(1 + group.rank)
    counts = (1, 8, 1, 33, 2, 1)
    bases = [
        torch.randint(-3, 4, (rows, width), generator=generator, device=device) for rows in counts
    ]
    sums = [group.all_gather(base).sum(dim=0) for base in bases]
    turn = torch.zeros(1, dtype=torch.int64, device=device)
    wrong = torch.zeros(1, dtype=torch.int64, device=device)
    zeros = [torch.zeros(rows, width, dtype=dtype, device=device) for rows in counts]
    norm = RMSNorm(width, 1e-6, dtype=dtype, device=device).requires_grad_(False)

    def work() -> None:
        turn.add_(1)
        factor = turn % 5 + 1
        for base, exact, zero in zip(bases, sums, zeros, strict=True):
            x = (base * factor).to(dtype)
            _, total = one_shot.add_norm(x, zero, norm)
            wrong.add_((total != (exact * factor).to(dtype)).any())
            few = min(len(base), 4)
            parts = (base[:few] * factor).float()[None]
            total, scaled = torch.empty_like(parts[0]), torch.empty_like(x[:few])
            one_shot.add_gain_of_parts(parts, zero[:few].float(), norm.weight, total, scaled)
            wrong.add_((total != exact[:few] * factor).any())

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    delays = random.Random(group.rank)
    for number in range(replays):
        # Up to 100 microseconds; now and then the host is late, too.
        if delays.random() < 0.5:
            torch.cuda._sleep(delays.randrange(200_000))
        graph.replay()
        if number % 500 == 499 and delays.random() < 0.5:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    assert int(turn) == replays + 1 and size == group.size
    return int(wrong)


def _measure(group: TorchGroup, store: dist.Store, width: int, rows: list[int]) -> dict[str, Any]:
    """Microseconds a sum of each kind, in a graph of ``CALLS`` of them."""
    device, dtype = group.device, torch.bfloat16
    norm = RMSNorm(width, 1e-6, dtype=dtype, device=device).requires_grad_(False)
    plain = Exchange(group, pdl=True)
    sizes = {"width": width, "dtype": dtype, "most_rows": max(rows), "most_sampled": 64}
    shots = {
        warps: _connect(
            group,
            dist.PrefixStore(f"{warps}", store),
            **sizes,
            most_parts=max(rows),
            row_warps=warps,
        )
        for warps in (16, 8, 4)
    }
    us: dict[str, list[Any]] = {"rows": rows}
    for count in rows:
        x = torch.randn(count, width, device=device).to(dtype) / 64
        kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "nccl": group.all_reduce,
            "nccl, add and norm": lambda total, x=x: plain.add_norm(x.clone(), total, norm)[1],
            "clone": lambda total, x=x: (x.clone(), total)[1],
            **{
                f"one-shot add and norm, {warps} warps": (
                    lambda total, x=x, shot=shot: shot.add_norm(x, total, norm)[1]
                )
                for warps, shot in shots.items()
            },
            "one-shot sum": lambda total, x=x: (shots[16].sum_rows(x), total)[1],
            "one-shot parts, gain": partial(_add_gain, shots[16], x.float()[None], norm.weight),
        }
        for name, call in kinds.items():
            us.setdefault(name, []).append(_time(group, call, torch.zeros_like(x)))
    for shot in shots.values():
        shot.close()
    return {"us": us}


def _add_gain(
    one_shot: OneShot, parts: torch.Tensor, gain: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    summed = torch.empty_like(parts[0])
    one_shot.add_gain_of_parts(parts, parts[0], gain, summed, torch.empty_like(total))
    return total


def _time(
    group: TorchGroup, call: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor
) -> float:
    """Median microseconds of one of ``CALLS`` calls in a graph, each on what the last one gave."""

    def work() -> None:
        total = start
        for _ in range(CALLS):
            total = call(total)

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(12):
        group.least(0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # so that all ranks are under way
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / CALLS)
    del graph
    return statistics.median(times)


if __name__ == "__main__":
    main()
