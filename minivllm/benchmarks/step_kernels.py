"""What the small kernels of a step cost: ``python -m minivllm.benchmarks.step_kernels``.

Every kernel is first held against its PyTorch twin on fresh random inputs, then timed in a CUDA
graph of many calls, plainly and with dependent launch, at Qwen3-0.6B's sizes by default. Prints
microseconds a call and GB/s of the bytes that have to move; ``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from minivllm.attention import paged
from minivllm.benchmarks import harness
from minivllm.benchmarks.report import write_report
from minivllm.engine import device_rows
from minivllm.engine.device_rows import DeviceRows, StepInputs
from minivllm.layers import activation, layernorm
from minivllm.layers.rotary_embedding import RotaryEmbedding
from minivllm.layers.sampler import Sampler, SamplingTensors, gumbel_noise

DTYPE = torch.bfloat16
TOKENS = (1, 8, 32, 256, 8192)
BATCHES = (1, 8, 32, 256)
BLOCK_SIZE = 64
EPS = 1e-6
# Large inputs are changed from call to call, so that the L2 cache does not answer for memory.
COLD_BYTES = 400_000_000
CALLS = 20


@dataclass(frozen=True)
class Sizes:
    """Of the model: E, F, H, G, D and V."""

    hidden: int = 1024
    mlp: int = 3072
    heads: int = 16
    kv_heads: int = 8
    head_size: int = 128
    vocab: int = 151_936


@dataclass(frozen=True)
class Case:
    """One kernel on one shape.

    ours: takes ``pdl``. twin: the PyTorch form of the same call. error: how far both are apart, as
    a share of what is allowed. bytes: what has to move, each number once.
    """

    kernel: str
    batch: int
    bytes: int
    ours: Callable[..., Any]
    twin: Callable[[], Any]
    error: Callable[[], float]


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(DTYPE)


def _apart(ours: Sequence[torch.Tensor], twin: Sequence[torch.Tensor]) -> float:
    """The largest difference, in units of 4 roundings of the largest number; NaN never passes."""
    worst = 0.0
    for mine, theirs in zip(ours, twin, strict=True):
        difference = (mine.double() - theirs.double()).abs().max()
        allowed = 4 * torch.finfo(theirs.dtype).eps * theirs.double().abs().max()
        share = float(difference / allowed)
        worst = max(worst, share if share == share else float("inf"))
    return worst


def layer_cases(sizes: Sizes, tokens: int) -> list[Case]:
    """The three kernels of a decoder layer, for T = ``tokens``."""
    from minivllm.engine import fused_kernels as fused
    from minivllm.engine.fused_heads_kernels import qk_norm_rope_store

    heads, kv_heads, size = sizes.heads, sizes.kv_heads, sizes.head_size
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": size}
    x, residual = _randn(tokens, sizes.hidden), _randn(tokens, sizes.hidden)
    weight = 1 + 0.1 * _randn(sizes.hidden)
    gate_up = _randn(tokens, 2 * sizes.mlp)
    qkv = _randn(tokens, (heads + 2 * kv_heads) * size)
    q_weight, k_weight = (1 + 0.1 * _randn(size) for _ in range(2))
    rotary = RotaryEmbedding(size, 4096, 1e6, device="cuda")
    positions = torch.randint(4096, (tokens,), device="cuda")
    num_blocks = -(-tokens // BLOCK_SIZE) + 1
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:tokens]
    cache = torch.zeros(num_blocks, BLOCK_SIZE, kv_heads, size, dtype=DTYPE, device="cuda")
    caches, twin_caches = ([cache.clone() for _ in range(2)] for _ in range(2))

    def heads_ours(pdl: bool = False) -> list[torch.Tensor]:
        args = (qkv, q_weight, k_weight, EPS, rotary.table, positions, slots, *caches)
        return [qk_norm_rope_store(*args, **shape, pdl=pdl), *caches]

    def heads_twin() -> list[torch.Tensor]:
        q, k, v = qkv.unflatten(1, (-1, size)).split((heads, kv_heads, kv_heads), dim=1)
        q, k = layernorm.rms_norm(q, q_weight, EPS), layernorm.rms_norm(k, k_weight, EPS)
        q, k = rotary(positions, q, k)
        paged.store_kv(k, v, *twin_caches, slots)
        return [q, *twin_caches]

    def norm_ours(pdl: bool = False) -> Sequence[torch.Tensor]:
        return fused.add_rms_norm(x, residual, weight, EPS, pdl=pdl)

    def norm_twin() -> Sequence[torch.Tensor]:
        return layernorm.add_rms_norm(x, residual, weight, EPS)

    def silu_ours(pdl: bool = False) -> Sequence[torch.Tensor]:
        return [fused.silu_and_mul(gate_up, pdl=pdl)]

    def silu_twin() -> Sequence[torch.Tensor]:
        return [activation.silu_and_mul(gate_up)]

    row = DTYPE.itemsize * tokens
    width = qkv.shape[1]
    table = 4 * size + 16  # float32 cos and sin, position, slot
    return [
        Case(name, tokens, moved, ours, twin, lambda a=ours, b=twin: _apart(a(), b()))
        for name, moved, ours, twin in (
            ("qk_norm_rope_store", row * 2 * width + tokens * table, heads_ours, heads_twin),
            ("add_rms_norm", row * 4 * sizes.hidden, norm_ours, norm_twin),
            ("silu_and_mul", row * 3 * sizes.mlp, silu_ours, silu_twin),
        )
    ]


def sampler_cases(sizes: Sizes, batch: int) -> list[Case]:
    """The sampler: every token about equally likely, a model that is sure of itself, greedy."""
    from minivllm.engine.sampler_kernels import sample

    cases = []
    for name, spread, heat in (("flat", 0.6, 0.6), ("sure", 3.0, 0.6), ("greedy", 0.6, 0.0)):
        logits = _randn(batch, sizes.vocab) * spread
        if name == "sure":
            logits[:, 777] = 30.0
        temperature = torch.full((batch,), heat, device="cuda")
        seed = torch.randint(2**62, (batch,), device="cuda")
        step = torch.randint(1000, (batch,), device="cuda")

        given = (logits, temperature, seed, step)

        def ours(pdl: bool = False, given: Any = given) -> torch.Tensor:
            return sample(*given, pdl=pdl)

        def twin(given: Any = given) -> torch.Tensor:
            return Sampler()(given[0], SamplingTensors(*given[1:]))

        def error(given: Any = given, ours: Any = ours) -> float:
            return _score_lost(ours(), *given)

        moved = logits.nbytes
        cases.append(Case(f"sample, {name}", batch, moved, ours, twin, error))
    return cases


def _score_lost(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
) -> float:
    """How far the chosen tokens score below the best, as a share of what rounding explains."""
    scores = logits.float()
    if bool((temperature > 0).all()):
        scores = scores / temperature[:, None] + gumbel_noise(seed, step, logits.shape[1])
    best = scores.amax(dim=1)
    lost = best - scores.gather(1, tokens[:, None])[:, 0]
    return float((lost / (1e-5 * best.abs().clamp(min=1))).max())


def bookkeeping_cases(places: int) -> list[Case]:
    """The beginning and the end of a decode step, and the host's changes."""
    from minivllm.engine import step_kernels

    max_blocks = 4096 // BLOCK_SIZE
    rows, twin_rows = (DeviceRows.allocate(places, max_blocks, "cuda") for _ in range(2))
    rows.length.copy_(torch.randint(1, 4096, (places,)))
    rows.block_tables.random_(10_000)
    rows.seed.random_()
    rows.temperature.uniform_()
    twin_rows.flat.copy_(rows.flat)
    active = torch.randperm(places, device="cuda").int()
    out, twin_out = (StepInputs.allocate(places, max_blocks, "cuda") for _ in range(2))
    tokens = torch.randint(1000, (places,), device="cuda")
    words = torch.randperm(rows.flat.numel(), device="cuda")[:places].int()
    updates = torch.stack((words, torch.randint_like(words, 1000)), dim=1).contiguous()

    def begin(pdl: bool = False) -> Any:
        step_kernels.begin_step(rows, active, out, BLOCK_SIZE, pdl=pdl)
        return list(vars(out).values())

    def begin_twin() -> Any:
        device_rows.begin_step(twin_rows, active, twin_out, BLOCK_SIZE)
        return list(vars(twin_out).values())

    def finish(pdl: bool = False) -> Any:
        step_kernels.finish_step(rows, active, out, tokens, pdl=pdl)
        return [rows.flat]

    def finish_twin() -> Any:
        device_rows.finish_step(twin_rows, active, twin_out, tokens)
        return [twin_rows.flat]

    def update(pdl: bool = False) -> Any:
        step_kernels.apply_updates(rows.flat, updates, pdl=pdl)
        return [rows.flat]

    def update_twin() -> Any:
        device_rows.apply_updates(twin_rows.flat, updates)
        return [twin_rows.flat]

    def unequal(ours: Callable[[], Any], twin: Callable[[], Any]) -> float:
        return 0.0 if all(map(torch.equal, ours(), twin())) else float("inf")

    table = 8 * int((rows.length.sum() + BLOCK_SIZE - 1) // BLOCK_SIZE)
    return [
        Case(name, places, moved, ours, twin, lambda a=ours, b=twin: unequal(a, b))
        for name, moved, ours, twin in (
            ("begin_step", table + places * (28 + 52), begin, begin_twin),
            ("finish_step", places * 36, finish, finish_twin),
            ("apply_updates", places * 12, update, update_twin),
        )
    ]


def measure(make: Callable[[], list[Case]]) -> list[dict[str, Any]]:
    """Check and time the cases that ``make`` builds, over as many copies as keep memory cold."""
    first = make()
    sets = [first]
    largest = max(case.bytes for case in first)
    if largest > 10_000_000:
        sets += [make() for _ in range(min(3, COLD_BYTES // largest))]
    records = []
    for number, case in enumerate(first):
        cases = [cases[number] for cases in sets]
        error = max(one.error() for one in cases)
        record: dict[str, Any] = {
            "kernel": case.kernel,
            "batch": case.batch,
            "bytes": case.bytes,
            "error_share": error,
            "good": error <= 1.0,
        }
        for name, options in (("plain", {}), ("pdl", {"pdl": True})):
            if options and torch.cuda.get_device_capability() < (9, 0):
                continue
            calls = [partial(one.ours, **options) for one in cases]
            repeated = (calls * CALLS)[:CALLS]
            seconds = harness.time_calls(
                harness.replay_of(repeated), torch.device("cuda"), budget_s=0.03
            )
            record[f"{name}_us"] = seconds / CALLS * 1e6
        twin = harness.time_calls(case.twin, torch.device("cuda"), budget_s=0.02)
        record["pytorch_us"] = twin * 1e6
        best = min(record[key] for key in ("plain_us", "pdl_us") if key in record)
        record["gb_per_s"] = case.bytes / best / 1e3
        records.append(record)
    return records


def run_step_kernels(output: str | None = None) -> int:
    """Check and time all of them, print a table; returns the exit status, 0 if all are right."""
    if not torch.cuda.is_available():
        raise ValueError("the kernels of a step are timed on a CUDA device, and there is none here")
    sizes = Sizes()
    torch.manual_seed(0)
    copy = harness.copy_bandwidth(torch.device("cuda"))
    records = []
    for batch in BATCHES:
        records += measure(partial(bookkeeping_cases, batch))
        records += measure(partial(sampler_cases, sizes, batch))
    for tokens in TOKENS:
        records += measure(partial(layer_cases, sizes, tokens))
    records.sort(key=lambda record: record["kernel"])
    table = harness.format_table(
        ["kernel", "batch", "us", "us, dependent", "PyTorch us", "GB/s", "of copy", "right"],
        [
            [
                record["kernel"],
                record["batch"],
                f"{record['plain_us']:.2f}",
                f"{record['pdl_us']:.2f}" if "pdl_us" in record else "",
                f"{record['pytorch_us']:.0f}",
                f"{record['gb_per_s']:.0f}",
                f"{record['gb_per_s'] * 1e9 / copy:.2f}",
                "yes" if record["good"] else f"NO ({record['error_share']:.3g})",
            ]
            for record in records
        ],
    )
    write_report(output, {"copy_bytes_per_s": copy, "sizes": vars(sizes), "records": records})
    print(f"{DTYPE}; this machine copies {copy / 1e9:.0f} GB/s\n\n{table}")
    return 0 if all(record["good"] for record in records) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="JSON file")
    return run_step_kernels(parser.parse_args(argv).output)


if __name__ == "__main__":
    raise SystemExit(main())
