"""Naive attention as a Triton kernel: the scores stay in registers, but all of a row at once.

Which program owns what (one query head of one sequence of 40 tokens; ROWS = 16, KEYS = 64):

                 keys 0 ..                       39 .. 63
    queries   [ x x x x x x x x x x x x x x x x | . . . ]   program 0: rows  0 to 15
       |      [ x x x x x x x x x x x x x x x x | . . . ]   program 1: rows 16 to 31
       v      [ x x x x x x x x x x x x x x x x | . . . ]   program 2: rows 32 to 39, 8 masked

A program loads its 16 queries and *every* key and value of the sequence, and so it holds 16 whole
rows of the score matrix, which is all that a softmax needs. KEYS is the power of two that holds the
longest sequence; `.` are lanes that the mask switches off. The grid has one such column of programs
for each (query head, sequence).

That a program holds everything at once is what makes the kernel short, and what limits it to short
sequences. Chapter 4 takes the keys tile by tile instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 16  # queries of a program: what a tensor core multiplies at once; fewer would be padded
# A program's keys pass through the shared memory of one multiprocessor. 64 KB of them (256 keys of
# 128 numbers in bfloat16) take up to 80 KB with what lies beside them; GPUs since Ampere have 99.
LARGEST_TILE = 64 * 1024


@triton.jit
def naive_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    out_stride_t,
    out_stride_h,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with ROWS queries of one head of one sequence to all keys of that sequence.

    q, out: [T, H, D]; k, v: [T, G, D], tokens ``*_stride_t`` and heads ``*_stride_h`` numbers
    apart; cu_seqlens: [B + 1]. Row block ``program_id(0)``, query head ``program_id(1)``, sequence
    ``program_id(2)``. GROUP = H / G; BLOCK_D is D rounded up to a power of two. PRECISION goes to
    tl.dot as ``input_precision``.
    """
    head = tl.program_id(1)
    seq = tl.program_id(2)
    begin = tl.load(cu_seqlens_ptr + seq).to(tl.int64)  # 64 bits: T * H * D can pass 2^31
    length = (tl.load(cu_seqlens_ptr + seq + 1) - begin).to(tl.int32)
    first_row = tl.program_id(0) * ROWS
    if first_row >= length:  # the grid is as high as the longest sequence needs
        return

    rows = first_row + tl.arange(0, ROWS)
    cols = tl.arange(0, KEYS)
    dims = tl.arange(0, BLOCK_D)[None, :]
    q_token = (begin + rows)[:, None]
    k_token = (begin + cols)[:, None]
    q_mask = (rows < length)[:, None] & (dims < D)
    k_mask = (cols < length)[:, None] & (dims < D)
    kv_head = head // GROUP

    q_tile = q_ptr + q_token * q_stride_t + head * q_stride_h + dims
    k_tile = k_ptr + k_token * k_stride_t + kv_head * k_stride_h + dims
    q = tl.load(q_tile, mask=q_mask, other=0.0)
    k = tl.load(k_tile, mask=k_mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale

    # A row inside the sequence never sees a masked key: those stand behind it.
    visible = cols[None, :] <= rows[:, None]
    scores = tl.where(visible, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]

    # other=0.0 is no decoration: a masked value has weight 0, but 0 times NaN is NaN.
    v_tile = v_ptr + k_token * v_stride_t + kv_head * v_stride_h + dims
    v = tl.load(v_tile, mask=k_mask, other=0.0)
    out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    out_tile = out_ptr + q_token * out_stride_t + head * out_stride_h + dims
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=q_mask)


def naive_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    max_seqlen: int,
) -> torch.Tensor:
    """Causal grouped-query attention of short sequences laid end to end.

    Args:
        q: [T, H, D]. q, k and v may be views of one fused tensor.
        k: [T, G, D], H a multiple of G.
        v: [T, G, D].
        cu_seqlens: [B + 1] int32, where each sequence begins, and T at the end.
        scale: factor on the scores, usually D ** -0.5.
        max_seqlen: length of the longest sequence.

    Returns:
        [T, H, D], contiguous, in q's dtype.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or a sequence is so long that
            a program cannot hold its keys (see :func:`longest_sequence`).
    """
    _check(q, k, v, cu_seqlens, max_seqlen)
    _, num_heads, head_size = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (triton.cdiv(max_seqlen, ROWS), num_heads, len(cu_seqlens) - 1)
    if 0 in grid:
        return out
    naive_attention_kernel[grid](
        q,
        k,
        v,
        out,
        cu_seqlens,
        *(stride for tensor in (q, k, v, out) for stride in tensor.stride()[:2]),
        scale,
        GROUP=num_heads // k.shape[1],
        D=head_size,
        BLOCK_D=_power_of_two(head_size),
        ROWS=ROWS,
        KEYS=_power_of_two(max_seqlen),
        # By default tl.dot may round float32 to 10 bits after the point.
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )
    return out


def longest_sequence(head_size: int, dtype: torch.dtype) -> int:
    """How many keys of ``head_size`` numbers a program can hold at once."""
    return LARGEST_TILE // (_power_of_two(head_size) * dtype.itemsize)


def _power_of_two(size: int) -> int:
    """``size`` rounded up to a power of two, and to the 16 that ``tl.dot`` wants to sum over."""
    return max(16, triton.next_power_of_2(size))


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3 or 0 in tensor.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give [tokens, heads, size]")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has gaps within a head; call {name}.contiguous() first")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; use float32, float16 or bfloat16")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but q is {q.dtype}; cast one of them")
    for name, tensor in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens)):
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q on {q.device}; move one of them")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} but v {tuple(v.shape)}; make them equal")
    if (len(q), q.shape[2]) != (len(k), k.shape[2]):
        raise ValueError(
            f"q has {len(q)} tokens of head size {q.shape[2]} but k and v have {len(k)} of "
            f"{k.shape[2]}; both must be equal"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, no multiple of the {k.shape[1]} of k and v; "
            "every KV head needs the same number of query heads"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; give int32 "
            "[B + 1]: a 0 and the end of each sequence"
        )
    if not cu_seqlens.is_contiguous():
        raise ValueError("cu_seqlens has gaps; call cu_seqlens.contiguous() first")
    if not 0 <= max_seqlen <= len(q):
        raise ValueError(f"max_seqlen={max_seqlen} is outside 0 to the {len(q)} tokens of q")
    longest = longest_sequence(q.shape[2], q.dtype)
    if max_seqlen > longest:
        raise ValueError(
            f"max_seqlen={max_seqlen} is too long: a program holds all keys of its sequence, and "
            f"up to {longest} of head size {q.shape[2]} in {q.dtype} fit; use flash attention "
            "(chapter 4), which takes them tile by tile"
        )
