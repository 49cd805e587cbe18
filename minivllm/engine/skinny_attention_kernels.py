"""Decode attention for a handful of sequences, with all that stands in front of it.

From the fused projection of a row, q, k and v, this kernel makes what attention needs (norms of the
heads, RoPE), writes k and v to their slot, and attends. A program takes one KV head of one sequence
and one of ``splits`` equal stretches of the cached tokens:

    tokens of sequence b    [ 0 .. span ) [ span .. 2 span ) [ 2 span .. old )   new
    program (g, split, b)        0                1                  2            0

The newest token is not read from the cache: it starts the running softmax of split 0. The cached
ones were written in earlier steps, so their first tile is loaded before the wait for the
projection, as weights are. Splits past the end do nothing; a short sequence has only split 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.attention.flash_kernels import LOG2_E, LOWEST, attend_to_tile, precision_of
from minivllm.engine.skinny_split_kernels import launch_options, split_span


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
    MIN_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """qkv [parts, P, (H + 2 G) * D] -> out [splits, P, H, D] and lse [splits, P, H].

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
    span = split_span(old, tl.num_programs(1), MIN_SPLIT)
    begin = split * span
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
    # Not earlier, though it could: programs that hold their place until here keep the weights of
    # kernels further on away, and whole steps were 5 % faster so.
    if (split > 0) & (begin >= old):
        return

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
    tl.store(lse_ptr + out_row, row_max + tl.log2(row_sum), mask=used)


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
        out: [1, P, H, D], or float32 [splits, P, H, D] of which :func:`merge_splits` makes one.
        lse: float32 [splits, P, H], for that.
        eps: of the head norms.
        early: let the next kernel start at once, not after the loop over the cache.
        dependent: whether the kernel in front was launched to be overlapped.
    """
    splits, rows, num_heads, head_size = out.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    skinny_attention_kernel[(num_kv_heads, splits, rows)](
        qkv,
        q_gain,
        k_gain,
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
        QKV_PARTS=qkv.shape[0],
        NORM=q_gain is not None,
        G=num_kv_heads,
        GROUP=group,
        D=head_size,
        S=block_size,
        ROWS=max(16, triton.next_power_of_2(group)),
        TILE=tile,
        MIN_SPLIT=min_split,
        PRECISION=precision_of(k_cache.dtype),
        STAGES=stages,
        EARLY=early,
        DEPENDENT=dependent,
        num_warps=num_warps,
        **launch_options(dependent),
    )
