"""Attention of one row cut into splits: how long they are, and how they become one again.

A split i brings out_i, divided by its own softmax denominator, and lse_i, log2 of that number:

    out = sum_i 2^lse_i * out_i / sum_i 2^lse_i

For one row the product behind attention merges while it reads (``gemv_kernel``). For more rows that
would be done over and over, by every program of that product, so a kernel of its own does it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.attention.flash_kernels import LOWEST


@triton.jit
def split_span(old, splits, MIN_SPLIT: tl.constexpr):
    """How many of a sequence's ``old`` cached tokens each split of its attention takes.

    A multiple of MIN_SPLIT, and such that ``splits`` of them are enough.
    """
    return tl.maximum(tl.cdiv(tl.cdiv(old, splits), MIN_SPLIT), 1) * MIN_SPLIT


@triton.jit
def merged_splits(
    partial_ptr,
    lse_ptr,
    context_ptr,
    row,
    rows,
    first_head,
    splits,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
):
    """Attention of HEADS heads of one row, float32 [HEADS, D], from its splits.

    partial [splits, rows, H, D], each divided by its own softmax denominator; lse [splits, rows,
    H], log2 of that denominator. Splits past the end of the sequence were not written.
    """
    old = tl.maximum(tl.load(context_ptr + row) - 1, 0)
    used = tl.maximum(tl.cdiv(old, split_span(old, splits, MIN_SPLIT)), 1)
    heads = first_head + tl.arange(0, HEADS)
    mask = heads < H
    at = row * H + heads
    dims = tl.arange(0, D)[None, :]
    top = tl.full([HEADS], LOWEST, tl.float32)
    weight_sum = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, D], tl.float32)
    for first in tl.range(0, used, 4):
        # Four at a time: nothing of one is needed to load the next, so that their loads overlap.
        for ahead in tl.static_range(4):
            split = first + ahead
            there = mask & (tl.zeros_like(heads) + split < used)
            split_at = split * rows * H + at
            lse = tl.load(lse_ptr + split_at, mask=there, other=LOWEST)
            value_at = split_at[:, None] * D + dims
            value = tl.load(partial_ptr + value_at, mask=there[:, None], other=0.0)
            new_top = tl.maximum(top, lse)
            shrink = tl.exp2(top - new_top)
            weight = tl.where(there, tl.exp2(lse - new_top), 0.0)
            weight_sum = weight_sum * shrink + weight
            acc = acc * shrink[:, None] + value * weight[:, None]
            top = new_top
    weight_sum = tl.where(mask, weight_sum, 1.0)
    return acc / weight_sum[:, None]


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_splits_kernel(
    partial_ptr,
    lse_ptr,
    context_ptr,
    out_ptr,
    rows,
    splits,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (row, i) merges the splits of heads i * HEADS and on: out [rows, H, D]."""
    row = tl.program_id(0)
    first = tl.program_id(1) * HEADS
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    merged = merged_splits(
        partial_ptr, lse_ptr, context_ptr, row, rows, first, splits, H, D, HEADS, MIN_SPLIT
    )
    heads = first + tl.arange(0, HEADS)
    at = (row * H + heads)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=(heads < H)[:, None])


def splits_for(rows: int, num_kv_heads: int, programs: float) -> int:
    """Stretches that give about ``programs`` programs; 1 for enough rows, a power of two."""
    most = max(1, int(programs) // (rows * num_kv_heads))
    return min(32, 2 ** (most.bit_length() - 1))


def merge_splits(
    partial: torch.Tensor,
    lse: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    *,
    min_split: int = 64,
    dependent: bool = False,
) -> None:
    """partial: float32 [SPLITS, P, H, D], lse: float32 [SPLITS, P, H] -> out [P, H, D]."""
    splits, rows, num_heads, head_size = partial.shape
    heads = min(8, triton.next_power_of_2(num_heads))
    merge_splits_kernel[(rows, triton.cdiv(num_heads, heads))](
        partial,
        lse,
        context,
        out,
        rows,
        splits,
        H=num_heads,
        D=head_size,
        HEADS=heads,
        MIN_SPLIT=min_split,
        DEPENDENT=dependent,
        num_warps=4,
        **launch_options(dependent),
    )


def launch_options(dependent: bool) -> dict[str, bool]:
    """What a launch needs beside its arguments to start while the kernel in front still runs."""
    return {"launch_pdl": True} if dependent else {}
