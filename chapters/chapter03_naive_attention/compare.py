"""Naive attention in PyTorch, as one Triton kernel, and PyTorch's own, on the same prompts.

    python -m chapters.chapter03_naive_attention.compare
    python -m chapters.chapter03_naive_attention.compare --json FILE
    python -m chapters.chapter03_naive_attention.compare --keep    # and put it into the text

The shapes are those of a layer of Qwen3-0.6B. Without a GPU the Triton kernel is left out: its
interpreter is for looking, not for timing.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from chapters.chapter03_naive_attention import results
from minivllm.attention.naive import NaiveAttention
from minivllm.benchmarks.harness import peak_memory, time_calls
from minivllm.benchmarks.report import machine_facts, write_report

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 16, 8, 128
SCALE = HEAD_SIZE**-0.5


def forms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_sequences: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a call that attends; the sequences are equally long."""
    length = len(q) // num_sequences
    cu_seqlens = list(range(0, len(q) + 1, length))
    naive = NaiveAttention(cu_seqlens, SCALE)
    batched = [tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (q, k, v)]

    def borrowed() -> torch.Tensor:
        out = F.scaled_dot_product_attention(*batched, is_causal=True, scale=SCALE, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    calls = {"naive, PyTorch": lambda: naive(0, q, k, v)}
    if q.is_cuda:
        from minivllm.attention.naive_kernels import naive_attention_triton

        boundaries = torch.tensor(cu_seqlens, dtype=torch.int32, device=q.device)
        calls["naive, one Triton kernel"] = lambda: naive_attention_triton(
            q, k, v, boundaries, scale=SCALE, max_seqlen=length
        )
    calls["scaled_dot_product_attention"] = borrowed
    return calls


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--keep", action="store_true", help="put the results into the text")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.keep:
        if device.type != "cuda":
            print("--keep: the text shows these times on a GPU", file=sys.stderr)
            return 2
        arguments.json = results.FOLDER / results.FORMS
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sequences, lengths = (64, (64, 256)) if device.type == "cuda" else (4, (64, 256))
    facts = machine_facts()
    print(f"{facts['device']}; torch {torch.__version__}; {facts['date']}")
    print(f"{sequences} prompts; 16 query and 8 KV heads of 128 numbers, {dtype}")
    print(f"{'tokens each':>11}  {'':<29} {'ms':>8} {'extra memory, MiB':>18}")
    rows: list[dict[str, Any]] = []
    for length in lengths:
        generator = torch.Generator(device).manual_seed(length)
        q, k, v = (
            torch.randn(sequences * length, heads, HEAD_SIZE, generator=generator, device=device)
            for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        )
        calls = forms(q.to(dtype), k.to(dtype), v.to(dtype), sequences)
        expected = calls["scaled_dot_product_attention"]().double()
        for name, call in calls.items():
            error = ((call().double() - expected).norm() / expected.norm()).item()
            assert error < 8 * torch.finfo(dtype).eps, f"{name} is off by {error:.2g}"
            milliseconds = time_calls(call, device) * 1e3
            extra = peak_memory(call, device)
            rows.append({"form": name, "length": length, "ms": milliseconds, "extra": extra})
            megabytes = "-" if extra is None else f"{extra / 2**20:.0f}"
            print(f"{length:>11}  {name:<29} {milliseconds:>8.3f} {megabytes:>18}", flush=True)
    write_report(arguments.json, {"rows": rows})
    if arguments.keep:
        results.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
