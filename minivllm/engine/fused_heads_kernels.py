"""Norms of heads, RoPE and stores to the pages, in one launch.

All that stands between a layer's fused projection and its attention. What ``fused_kernels.py`` says
of its kernels goes for this one: what is rounded where, ``norm_of``, and ``pdl``.

A program takes HEADS neighbouring heads of one token's row. Which kind a head is decides where it
goes, not who does it (4 query heads, 2 KV heads, HEADS = 4):

    one row of qkv    [ q0 | q1 | q2 | q3 | k0 | k1 | v0 | v1 ]
    program           |-------- 0 --------|-------- 1 --------|
    goes to              q [T, H, D]        k_cache   v_cache     norm and RoPE for q and k alone
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.engine.fused_kernels import (
    check_norm_of,
    inverse_rms_of,
    launch_options,
    norm_block,
)

# Below this many tokens a GPU has programs to spare, and each should have little to do.
MANY_TOKENS = 64


@triton.jit
def qk_norm_rope_store_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    positions_ptr,
    slot_mapping_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    norm_of_ptr,
    part_stride,
    qkv_stride,
    eps,
    norm_size,
    norm_eps,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # D / 2 rounded up to a power of two
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BLOCK: tl.constexpr,  # the size of a row of norm_of, padded; 0 without one
    DEPENDENT: tl.constexpr,
):
    """Heads ``program_id(1)`` * HEADS and on of token ``program_id(0)``: rows [HEADS, D / 2]."""
    if DEPENDENT:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    cols = tl.arange(0, HALF)[None, :]
    inside = cols < D // 2
    is_q = heads < H
    is_k = (heads >= H) & (heads < H + G)
    is_v = (heads >= H + G) & (heads < H + 2 * G)
    # RoPE turns pairs (i, i + D / 2), so a head is held as its two halves.
    position = tl.load(positions_ptr + token)
    slot = tl.load(slot_mapping_ptr + token)
    if NORM:
        weight_ptr = tl.where(is_q, q_weight_ptr + cols, k_weight_ptr + cols)
        weight_1 = tl.load(weight_ptr, mask=inside).to(tl.float32)
        weight_2 = tl.load(weight_ptr + D // 2, mask=inside).to(tl.float32)
    cos = tl.load(table_ptr + position * D + cols, mask=inside)
    sin = tl.load(table_ptr + position * D + D // 2 + cols, mask=inside)

    if NORM_BLOCK:
        scale = inverse_rms_of(norm_of_ptr + token * norm_size, norm_size, norm_eps, NORM_BLOCK)

    if DEPENDENT:
        gdc_wait()
    mask = inside & (heads < H + 2 * G)
    row_ptr = qkv_ptr + token * qkv_stride + heads * D + cols
    raw_1 = tl.load(row_ptr, mask=mask, other=0.0)
    raw_2 = tl.load(row_ptr + D // 2, mask=mask, other=0.0)
    for _ in tl.static_range(1, PARTS):
        row_ptr += part_stride
        raw_1 += tl.load(row_ptr, mask=mask, other=0.0)
        raw_2 += tl.load(row_ptr + D // 2, mask=mask, other=0.0)
    x_1 = raw_1.to(tl.float32)
    x_2 = raw_2.to(tl.float32)
    dtype = q_ptr.dtype.element_ty
    if NORM_BLOCK:
        x_1 *= scale
        x_2 *= scale
        raw_1 = x_1.to(dtype)
        raw_2 = x_2.to(dtype)
    if NORM:
        squares = tl.sum(x_1 * x_1 + x_2 * x_2, axis=1)[:, None]
        inverse_rms = tl.rsqrt(squares / D + eps)
        x_1 = ((x_1 * inverse_rms).to(dtype).to(tl.float32) * weight_1).to(dtype).to(tl.float32)
        x_2 = ((x_2 * inverse_rms).to(dtype).to(tl.float32) * weight_2).to(dtype).to(tl.float32)
    turned_1 = (x_1 * cos - x_2 * sin).to(dtype)
    turned_2 = (x_2 * cos + x_1 * sin).to(dtype)

    # Of these stores at most one is on for a head; the others cost next to nothing.
    to_q = q_ptr + (token * H + heads) * D + cols
    tl.store(to_q, turned_1, mask=inside & is_q)
    tl.store(to_q + D // 2, turned_2, mask=inside & is_q)
    if slot >= 0:
        to_k = k_cache_ptr + (slot * G + heads - H) * D + cols  # 64 bits, as slot is
        tl.store(to_k, turned_1, mask=inside & is_k)
        tl.store(to_k + D // 2, turned_2, mask=inside & is_k)
        to_v = v_cache_ptr + (slot * G + heads - H - G) * D + cols
        tl.store(to_v, raw_1, mask=inside & is_v)
        tl.store(to_v + D // 2, raw_2, mask=inside & is_v)


def qk_norm_rope_store(
    qkv: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    rope_table: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    norm_of: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    pdl: bool = False,
) -> torch.Tensor:
    """From the fused projection to rotated queries, with K and V in their slots: one launch.

    The same as ``QKVLinear.split``, ``RMSNorm`` on queries and keys, ``RotaryEmbedding`` and
    ``paged.store_kv``, one after the other.

    Args:
        qkv: [T, (H + 2 * G) * D]; rows may lie apart, the numbers of a row may not. Or float32
            [parts, T, (H + 2 * G) * D], to be summed first.
        q_norm_weight, k_norm_weight: [D], or both None for a family without these norms.
        eps: of the norms.
        rope_table: float32 [positions, 1, D], cos in the first half and sin in the second.
        positions: int64 [T].
        slot_mapping: int64 [T], block * S + row; -1 is padding and is written nowhere.
        k_cache, v_cache: [N, S, G, D], contiguous, in the dtype of ``qkv`` (of the model,
            where that is in parts); written in place.
        num_heads, num_kv_heads, head_size: H, G, D.
        norm_of: [T, E], contiguous, if ``qkv`` is the projection of these rows themselves: each row
            of ``qkv`` is then divided by the root mean square of its row here, with ``norm_eps``.
        pdl: launch before the kernel in front has ended. ``positions``, ``slot_mapping`` and
            ``norm_of`` are read before waiting for it, so whoever wrote them must have ended before
            it began.

    Returns:
        q: [T, H, D], contiguous.

    Raises:
        ValueError: if shapes, dtypes or strides do not fit together.
    """
    summed = qkv.dim() == 3 and qkv.dtype == torch.float32
    if qkv.dim() != 2 and not summed:
        raise ValueError(
            f"qkv is {qkv.dtype} {tuple(qkv.shape)}; give [T, numbers], or float32 [parts, T, "
            "numbers]"
        )
    num_tokens, width = qkv.shape[-2:]
    heads = num_heads + 2 * num_kv_heads
    if width != heads * head_size or qkv.stride(-1) != 1:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)} and strides {qkv.stride()}; {num_heads} query and "
            f"{num_kv_heads} KV heads of {head_size} need rows of {heads * head_size} in one piece"
        )
    if head_size % 2:
        raise ValueError(f"head_size={head_size} must be even: RoPE turns pairs")
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("give both of q_norm_weight and k_norm_weight, or neither")
    if k_cache.shape != v_cache.shape or k_cache.shape[2:] != (num_kv_heads, head_size):
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}; "
            f"give both [blocks, tokens, {num_kv_heads}, {head_size}]"
        )
    if k_cache.dtype != v_cache.dtype or (k_cache.dtype != qkv.dtype and not summed):
        raise ValueError(
            f"qkv is {qkv.dtype} but k_cache {k_cache.dtype} and v_cache {v_cache.dtype}; "
            "they must be equal"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(
            f"k_cache and v_cache must be contiguous; their strides are {k_cache.stride()} and "
            f"{v_cache.stride()}"
        )
    q = torch.empty(num_tokens, num_heads, head_size, dtype=k_cache.dtype, device=qkv.device)
    if norm_of is not None:
        check_norm_of(norm_of, q)
    if num_tokens == 0:
        return q
    block, warps = _heads_a_program(num_tokens, heads)
    qk_norm_rope_store_kernel[(num_tokens, triton.cdiv(heads, block))](
        qkv,
        q_norm_weight,
        k_norm_weight,
        rope_table,
        positions,
        slot_mapping,
        q,
        k_cache,
        v_cache,
        norm_of,
        qkv.stride(0) if summed else 0,
        qkv.stride(-2),
        eps,
        0 if norm_of is None else norm_of.shape[1],
        norm_eps,
        H=num_heads,
        G=num_kv_heads,
        D=head_size,
        HALF=triton.next_power_of_2(head_size // 2),
        HEADS=block,
        PARTS=qkv.shape[0] if summed else 1,
        NORM=q_norm_weight is not None,
        NORM_BLOCK=norm_block(norm_of),
        DEPENDENT=pdl,
        num_warps=warps,
        **launch_options(pdl),
    )
    return q


def _heads_a_program(num_tokens: int, heads: int) -> tuple[int, int]:
    """How many heads a program takes, and how many warps run it."""
    if num_tokens < MANY_TOKENS:
        return 4, 1
    most = 16 if num_tokens < 16 * MANY_TOKENS else 32
    return min(triton.next_power_of_2(heads), most), 4
