"""Decode attention for a handful of sequences, with all that stands in front of it.

From the fused projection of a row, q, k and v, this kernel makes what attention needs (norms of the
heads, RoPE), writes k and v to their slot, and attends. A program takes one KV head of one sequence
and one of SPLITS equal stretches of the cached tokens:

    tokens of sequence b    [ 0 .. span ) [ span .. 2 span ) [ 2 span .. old )   new
    program (g, split, b)        0                1                  2            0

The newest token is not read from the cache: it starts the running softmax of split 0. The cached
ones were written in earlier steps, so their first tile is loaded before the wait for the
projection, as weights are. Splits past the end return at once; a short sequence has only split 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.attention.flash_kernels import LOG2_E, LOWEST, attend_to_tile, precision_of


@triton.jit
def split_span(old, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """How many of a sequence's ``old`` cached tokens each split of its attention takes.

    A multiple of MIN_SPLIT, and such that SPLITS of them are enough.
    """
    return tl.maximum(tl.cdiv(tl.cdiv(old, SPLITS), MIN_SPLIT), 1) * MIN_SPLIT


@triton.jit
def merged_splits(
    partial_ptr,
    lse_ptr,
    context_ptr,
    row,
    rows,
    first_head,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
):
    """Attention of HEADS heads of one row, float32 [HEADS, D], from its splits.

    partial [SPLITS, rows, H, D], each divided by its own softmax denominator; lse [SPLITS, rows,
    H], log2 of that denominator. Splits past the end of the sequence were not written.
    """
    old = tl.maximum(tl.load(context_ptr + row) - 1, 0)
    used = tl.maximum(tl.cdiv(old, split_span(old, SPLITS, MIN_SPLIT)), 1)
    heads = first_head + tl.arange(0, HEADS)
    mask = heads < H
    at = row * H + heads
    dims = tl.arange(0, D)[None, :]
    top = tl.full([HEADS], LOWEST, tl.float32)
    weight_sum = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, D], tl.float32)
    for first in tl.range(0, used, IN_FLIGHT):
        # Nothing of one split is needed to load the next, so that their loads overlap.
        for ahead in tl.static_range(IN_FLIGHT):
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


@triton.jit
def summed_heads(parts_ptr, heads, dims, mask, part_stride, D: tl.constexpr, PARTS: tl.constexpr):
    """Heads of one row of the projection, whose parts lie ``part_stride`` apart: [heads, D]."""
    at = heads[:, None] * D + dims[None, :]
    x = tl.load(parts_ptr + at, mask=mask[:, None], other=0.0)
    for part in tl.static_range(1, PARTS):
        x += tl.load(parts_ptr + part * part_stride + at, mask=mask[:, None], other=0.0)
    return x


@triton.jit
def turned(x, other, gain, other_gain, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Heads [heads, D], normalised if NORM and turned to their position.

    other: for each number its partner in the pair that RoPE turns, (i + D / 2) mod D; sin is
    negative for the first half.
    """
    if NORM:
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x *= inverse_rms * gain[None, :]
        other *= inverse_rms * other_gain[None, :]
    return x * cos[None, :] + other * sin[None, :]


@triton.jit
def page_rows(
    table_ptr,
    start,
    end,
    kv_head,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Where in a cache the rows of tokens start .. start + TILE begin; which are before ``end``."""
    token = start + tl.arange(0, TILE)
    mask = token < end
    if S >= TILE:  # the tile lies within a block: one look-up
        block = tl.load(table_ptr + start // S, mask=start < end, other=0)
    else:
        block = tl.load(table_ptr + token // S, mask=mask, other=0)
    slot = block.to(tl.int64) * S + token % S  # 64 bits: N * S * G * D can pass 2^31
    return (slot * G + kv_head) * D, mask


@triton.jit
def load_page_rows(cache_ptr, at, mask, D: tl.constexpr):
    """Keys or values at ``at``, zeros where ``mask`` is not set: [TILE, D]."""
    return tl.load(
        cache_ptr + at[:, None] + tl.arange(0, D)[None, :], mask=mask[:, None], other=0.0
    )


@triton.jit
def skinny_attention_kernel(
    qkv_ptr,
    q_gain_ptr,
    k_gain_ptr,
    rope_ptr,
    positions_ptr,
    slots_ptr,
    tables_ptr,
    context_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    lse_ptr,
    table_stride,
    eps,
    scale_log2,
    QKV_PARTS: tl.constexpr,
    NORM: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,  # query heads for each KV head, H / G
    D: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP, padded to a power of two of at least 16
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """qkv [parts, P, (H + 2 G) * D] -> out [P, H, D], or with splits [SPLITS, P, H, D] and lse.

    k_cache, v_cache [N, S, G, D]: where k and v of row b go to slots[b] (-1: nowhere); tables
    [P, M]; context [P]: tokens of each sequence, the newest included (0: a padded row).
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    if DEPENDENT and EARLY:
        gdc_launch_dependents()
    # All that is read up to the wait was there before the first kernel of the step was launched.
    old = tl.maximum(tl.load(context_ptr + row) - 1, 0)
    position = tl.load(positions_ptr + row)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    span = split_span(old, SPLITS, MIN_SPLIT)
    begin = split * span
    if (split > 0) & (begin >= old):
        # Nothing to do, and no need to wait: split 0 does, so that our end is still the end of all
        # before us. The room on the chip is better used by the kernel behind.
        return
    end = tl.minimum(begin + span, old)
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    at, mask = page_rows(table_ptr, begin, end, kv_head, G, D, S, TILE)
    k = load_page_rows(k_cache_ptr, at, mask, D)
    v = load_page_rows(v_cache_ptr, at, mask, D)
    HALF: tl.constexpr = D // 2
    dims = tl.arange(0, D)
    partner = (dims + HALF) % D
    rope_ptr += position * D
    cos = tl.load(rope_ptr + dims % HALF)
    sin = tl.load(rope_ptr + HALF + dims % HALF)
    sin = tl.where(dims < HALF, -sin, sin)
    q_gain, k_gain, q_gain_2, k_gain_2 = cos, cos, cos, cos
    if NORM:
        q_gain = tl.load(q_gain_ptr + dims).to(tl.float32)
        k_gain = tl.load(k_gain_ptr + dims).to(tl.float32)
        q_gain_2 = tl.load(q_gain_ptr + partner).to(tl.float32)
        k_gain_2 = tl.load(k_gain_ptr + partner).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    H: tl.constexpr = G * GROUP
    dtype = k_cache_ptr.dtype.element_ty
    lanes = tl.arange(0, ROWS)
    heads = kv_head * GROUP + lanes
    used = lanes < GROUP
    WIDTH: tl.constexpr = (H + 2 * G) * D
    row_ptr = qkv_ptr + row * WIDTH
    part_stride = tl.num_programs(2) * WIDTH
    one = tl.arange(0, 1)
    yes = one == 0
    q = summed_heads(row_ptr, heads, dims, used, part_stride, D, QKV_PARTS)
    q_2 = summed_heads(row_ptr, heads, partner, used, part_stride, D, QKV_PARTS)
    new_k = summed_heads(row_ptr, H + kv_head + one, dims, yes, part_stride, D, QKV_PARTS)
    new_k_2 = summed_heads(row_ptr, H + kv_head + one, partner, yes, part_stride, D, QKV_PARTS)
    new_v = summed_heads(row_ptr, H + G + kv_head + one, dims, yes, part_stride, D, QKV_PARTS)
    q = turned(q, q_2, q_gain, q_gain_2, cos, sin, eps, D, NORM).to(dtype)
    new_k = turned(new_k, new_k_2, k_gain, k_gain_2, cos, sin, eps, D, NORM).to(dtype)
    new_v = new_v.to(dtype)
    if (split == 0) & (slot >= 0):
        new_at = (slot * G + kv_head) * D + dims[None, :]
        tl.store(k_cache_ptr + new_at, new_k)
        tl.store(v_cache_ptr + new_at, new_v)

    new_score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale_log2
    has_new = tl.zeros([ROWS], tl.int32) + split == 0
    row_max = tl.where(has_new, new_score, LOWEST)
    row_sum = tl.where(has_new, 1.0, 0.0)
    acc = tl.where(has_new[:, None], new_v.to(tl.float32), 0.0)
    row_max, row_sum, acc = attend_to_tile(
        q, k, v, mask[None, :], row_max, row_sum, acc, scale_log2, PRECISION
    )
    for start in tl.range(begin + TILE, end, TILE, num_stages=STAGES):
        at, mask = page_rows(table_ptr, start, end, kv_head, G, D, S, TILE)
        k = load_page_rows(k_cache_ptr, at, mask, D)
        v = load_page_rows(v_cache_ptr, at, mask, D)
        row_max, row_sum, acc = attend_to_tile(
            q, k, v, mask[None, :], row_max, row_sum, acc, scale_log2, PRECISION
        )
    if DEPENDENT and not EARLY:
        gdc_launch_dependents()

    out_row = (split * tl.num_programs(2) + row) * H + heads
    result = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row[:, None] * D + dims[None, :], result, mask=used[:, None])
    if SPLITS > 1:
        tl.store(lse_ptr + out_row, row_max + tl.log2(row_sum), mask=used)


@triton.jit
def turned_head(row_ptr, head, gain, gain_2, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr):
    """One head of the projection's row, normalised if NORM and turned to its position: [D]."""
    dims = tl.arange(0, D)
    x = tl.load(row_ptr + head * D + dims)
    other = tl.load(row_ptr + head * D + (dims + D // 2) % D)
    if NORM:
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        x *= inverse_rms * gain
        other *= inverse_rms * gain_2
    return x * cos + other * sin


@triton.jit
def head_attention_kernel(
    qkv_ptr,
    q_gain_ptr,
    k_gain_ptr,
    rope_ptr,
    positions_ptr,
    slots_ptr,
    tables_ptr,
    context_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    lse_ptr,
    table_stride,
    eps,
    scale_log2,
    NORM: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The same for one query head a program, without tensor cores: for one row.

    K and V stay in the registers they were loaded into. Tensor cores would want them in another
    order first, and a chain of such steps is what a single row waits for. The GROUP programs of a
    KV head read the same K and V, all but one of them from the L2 cache.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    if DEPENDENT and EARLY:
        gdc_launch_dependents()
    kv_head = head // GROUP
    old = tl.maximum(tl.load(context_ptr + row) - 1, 0)
    position = tl.load(positions_ptr + row)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    span = split_span(old, SPLITS, MIN_SPLIT)
    begin = split * span
    if (split > 0) & (begin >= old):
        # Nothing to do, and no need to wait: split 0 does, so that our end is still the end of all
        # before us. The room on the chip is better used by the kernel behind.
        return
    end = tl.minimum(begin + span, old)
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    at, mask = page_rows(table_ptr, begin, end, kv_head, G, D, S, TILE)
    k = load_page_rows(k_cache_ptr, at, mask, D)
    v = load_page_rows(v_cache_ptr, at, mask, D)
    HALF: tl.constexpr = D // 2
    dims = tl.arange(0, D)
    partner = (dims + HALF) % D
    rope_ptr += position * D
    cos = tl.load(rope_ptr + dims % HALF)
    sin = tl.load(rope_ptr + HALF + dims % HALF)
    sin = tl.where(dims < HALF, -sin, sin)
    q_gain, k_gain, q_gain_2, k_gain_2 = cos, cos, cos, cos
    if NORM:
        q_gain = tl.load(q_gain_ptr + dims).to(tl.float32)
        k_gain = tl.load(k_gain_ptr + dims).to(tl.float32)
        q_gain_2 = tl.load(q_gain_ptr + partner).to(tl.float32)
        k_gain_2 = tl.load(k_gain_ptr + partner).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    H: tl.constexpr = G * GROUP
    dtype = k_cache_ptr.dtype.element_ty
    row_ptr = qkv_ptr + row * ((H + 2 * G) * D)
    q = turned_head(row_ptr, head, q_gain, q_gain_2, cos, sin, eps, D, NORM)
    new_k = turned_head(row_ptr, H + kv_head, k_gain, k_gain_2, cos, sin, eps, D, NORM).to(dtype)
    new_v = tl.load(row_ptr + (H + G + kv_head) * D + dims).to(dtype)
    if (split == 0) & (slot >= 0) & (head % GROUP == 0):
        new_at = (slot * G + kv_head) * D + dims
        tl.store(k_cache_ptr + new_at, new_k)
        tl.store(v_cache_ptr + new_at, new_v)

    # The running softmax begins with the newest token, in split 0; elsewhere with nothing.
    q *= scale_log2
    new_score = tl.sum(q * new_k.to(tl.float32), axis=0)
    top = tl.where(split == 0, new_score, LOWEST)
    weight_sum = tl.where(split == 0, 1.0, 0.0)
    acc = tl.where(split == 0, new_v.to(tl.float32), 0.0)
    for start in tl.range(begin, end, TILE, num_stages=1):
        next_at, next_mask = page_rows(table_ptr, start + TILE, end, kv_head, G, D, S, TILE)
        next_k = load_page_rows(k_cache_ptr, next_at, next_mask, D)
        next_v = load_page_rows(v_cache_ptr, next_at, next_mask, D)
        scores = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
        scores = tl.where(mask, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top)
        weight_sum = weight_sum * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink + tl.sum(weights[:, None] * v.to(tl.float32), axis=0)
        top = new_top
        k, v, mask = next_k, next_v, next_mask
    if DEPENDENT and not EARLY:
        gdc_launch_dependents()

    out_row = (split * tl.num_programs(2) + row) * H + head
    tl.store(out_ptr + out_row * D + dims, (acc / weight_sum).to(out_ptr.dtype.element_ty))
    if SPLITS > 1:
        tl.store(lse_ptr + out_row, top + tl.log2(weight_sum))


@triton.jit
def merge_splits_kernel(
    partial_ptr,
    lse_ptr,
    context_ptr,
    out_ptr,
    rows,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
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
        partial_ptr, lse_ptr, context_ptr, row, rows, first, H, D, HEADS, SPLITS, MIN_SPLIT, 4
    )
    heads = first + tl.arange(0, HEADS)
    at = (row * H + heads)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=(heads < H)[:, None])


def splits_for(rows: int, num_kv_heads: int, programs: float) -> int:
    """Stretches that give about ``programs`` programs; 1 for enough rows, a power of two."""
    most = max(1, int(programs) // (rows * num_kv_heads))
    return min(32, 2 ** (most.bit_length() - 1))


def skinny_attention(
    qkv: torch.Tensor,
    q_gain: torch.Tensor | None,
    k_gain: torch.Tensor | None,
    rope_table: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    context: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    eps: float,
    tile: int = 64,
    min_split: int = 64,
    num_warps: int = 4,
    stages: int = 3,
    dot: bool = True,
    early: bool = True,
    dependent: bool = False,
) -> None:
    """Norms, RoPE, the store of K and V, and attention of one new token for each of P rows.

    Args:
        qkv: float32 [parts, P, (H + 2 G) * D], the fused projection.
        q_gain, k_gain: [D] weights of the head norms; None for a family without them.
        rope_table: float32 [positions, 1, D], as RotaryEmbedding keeps it.
        positions, slot_mapping: [P] int64; slot -1 stores nothing.
        block_tables: [P, M] int32.
        context: [P] int32 tokens of each sequence with the newest; 0 for a padded row.
        k_cache, v_cache: [N, S, G, D], S a power of two.
        out: [1, P, H, D], or float32 [SPLITS, P, H, D] of which :func:`merge_splits` makes one.
        lse: float32 [SPLITS, P, H], for that.
        eps: of the head norms.
        dot: use the tensor cores.
        early: let the next kernel start at once, not after the loop over the cache.
        dependent: whether the kernel in front was launched to be overlapped.
    """
    splits, rows, num_heads, head_size = out.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    arguments = (
        qkv,
        q_gain if q_gain is not None else qkv,
        k_gain if k_gain is not None else qkv,
        rope_table,
        positions,
        slot_mapping,
        block_tables,
        context,
        k_cache,
        v_cache,
        out,
        lse,
        block_tables.stride(0),
        eps,
        head_size**-0.5 * LOG2_E,
    )
    options = {
        "NORM": q_gain is not None,
        "G": num_kv_heads,
        "GROUP": group,
        "D": head_size,
        "S": block_size,
        "TILE": tile,
        "SPLITS": splits,
        "MIN_SPLIT": min_split,
        "EARLY": early,
        "DEPENDENT": dependent,
        "num_warps": num_warps,
        **launch_options(dependent),
    }
    if not dot:
        head_attention_kernel[(num_heads, splits, rows)](*arguments, **options)
        return
    skinny_attention_kernel[(num_kv_heads, splits, rows)](
        *arguments,
        QKV_PARTS=qkv.shape[0],
        ROWS=max(16, triton.next_power_of_2(group)),
        PRECISION=precision_of(k_cache.dtype),
        STAGES=stages,
        **options,
    )


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
        H=num_heads,
        D=head_size,
        HEADS=heads,
        SPLITS=splits,
        MIN_SPLIT=min_split,
        DEPENDENT=dependent,
        num_warps=4,
        **launch_options(dependent),
    )


def launch_options(dependent: bool) -> dict[str, bool]:
    """What a launch needs beside its arguments to start while the kernel in front still runs."""
    return {"launch_pdl": True} if dependent else {}
