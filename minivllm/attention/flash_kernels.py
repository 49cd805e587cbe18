"""Flash attention as a Triton kernel (Dao et al. 2022; Dao 2023): no score matrix is stored.

Which program owns which tile (one sequence, one query head):

                keys ->   tile 0   tile 1   tile 2   tile 3
    queries  program 3  [ diag ]
       |     program 2  [ full ] [ diag ]
       v     program 1  [ full ] [ full ] [ diag ]
             program 0  [ full ] [ full ] [ full ] [ diag ]

A program keeps its BLOCK_M query rows, their running maximum, sum and output in
registers, and walks from left to right over tiles of BLOCK_N keys and values. A tile
right of the diagonal is hidden from all its rows, and never loaded. Only the finished
output is written. The grid has one such column of programs for each (query head,
sequence); a program whose rows lie past the end of a shorter sequence returns at once.

The same with copies, products and softmax overlapped: `flash_hopper_kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minivllm.attention.flash_checks import check_flash_inputs, check_out
from minivllm.attention.flash_hopper import attend_on_hopper, fits_hopper

LOG2_E = 1.4426950408889634
# The running maximum starts here and not at -inf: a row that has seen no key yet then keeps the
# sum 0, while -inf - (-inf) would make it NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def attend_to_tile(q, k, v, visible, row_max, row_sum, acc, scale_log2, PRECISION: tl.constexpr):
    """Take one tile of keys and values into the running softmax of q's rows.

    q [M, D]; k, v [N, D]; visible [M, N] or [1, N] says who may look at whom. row_max, row_sum [M]
    and acc [M, D] are float32. Returns the three after this tile. PRECISION goes to tl.dot as
    ``input_precision``.

    exp(scale * x) is computed as exp2(scale_log2 * x), where scale_log2 = scale * log2(e): the chip
    has an instruction for exp2 only. row_max is the maximum of scale_log2 * x. It is scaled once
    for a row, which leaves one multiply-add for each score.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
    shrink = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores * scale_log2 - new_max[:, None])
    row_sum = row_sum * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit
def flash_attention_kernel(
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
    scale_log2,
    GROUP: tl.constexpr,  # query heads for each KV head
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with BLOCK_M queries of one head of one sequence to the keys up to their own.

    q, out: [T, H, D]; k, v: [T, G, D], tokens ``*_stride_t`` and heads ``*_stride_h`` numbers
    apart; cu_seqlens: [B + 1]. Query head ``program_id(1)``, sequence ``program_id(2)``; the row
    blocks are dealt out from the last (``program_id(0)`` 0) to the first. scale_log2 and PRECISION:
    see attend_to_tile.
    """
    # The last rows have the longest way to go: they start first, the short ones fill the gaps.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.program_id(2)
    begin = tl.load(cu_seqlens_ptr + seq).to(tl.int64)  # 64 bits: T * H * D can pass 2^31
    length = (tl.load(cu_seqlens_ptr + seq + 1) - begin).to(tl.int32)
    first_row = block * BLOCK_M
    if first_row >= length:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)[None, :]
    q_rows = (begin + rows)[:, None] * q_stride_t + head * q_stride_h
    q_mask = (rows < length)[:, None] & (dims < D)
    q = tl.load(q_ptr + q_rows + dims, mask=q_mask, other=0.0)
    k_head = k_ptr + head // GROUP * k_stride_h
    v_head = v_ptr + head // GROUP * v_stride_h

    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # No key after the last row of this block is visible to any of its rows.
    end = tl.minimum(first_row + BLOCK_M, length)
    for start in tl.range(0, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        token = (begin + cols)[:, None]
        inside = (cols < length)[:, None] & (dims < D)
        k = tl.load(k_head + token * k_stride_t + dims, mask=inside, other=0.0)
        v = tl.load(v_head + token * v_stride_t + dims, mask=inside, other=0.0)
        visible = cols[None, :] <= rows[:, None]
        row_max, row_sum, acc = attend_to_tile(
            q, k, v, visible, row_max, row_sum, acc, scale_log2, PRECISION
        )
    out_rows = (begin + rows)[:, None] * out_stride_t + head * out_stride_h
    out = acc / row_sum[:, None]
    tl.store(out_ptr + out_rows + dims, out.to(out_ptr.dtype.element_ty), mask=q_mask)


@dataclass(frozen=True)
class FlashTile:
    """Shape of one program of a flash kernel: tile rows and columns, warps, pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def default_tile(head_size: int, dtype: torch.dtype, device: torch.device) -> FlashTile:
    """A tile that suits head size, dtype and the fast memory of the device's multiprocessors.

    Measured on an H200 for head size 128 in bfloat16; elsewhere only known to fit.
    """
    if dtype == torch.float32:  # no matrix unit takes it: small tiles
        return FlashTile(32, 32, 4, 2) if head_size <= 128 else FlashTile(32, 16, 8, 2)
    if shared_memory(device) < 128 * 1024:
        return FlashTile(64, 64, 4, 2) if head_size <= 128 else FlashTile(64, 32, 4, 1)
    return FlashTile(64, 64, 4, 3) if head_size <= 128 else FlashTile(128, 32, 8, 2)


def shared_memory(device: torch.device) -> int:
    """Bytes of fast memory that one program can have; a CPU's interpreter has no limit."""
    if device.type != "cuda":
        return 2**30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def precision_of(dtype: torch.dtype) -> str:
    """What ``tl.dot`` may do to its inputs: nothing (by default it rounds float32 to tf32)."""
    return "ieee" if dtype == torch.float32 else "tf32"


def padded_head_size(head_size: int) -> int:
    """A power of two that ``tl.dot`` can multiply."""
    return max(16, triton.next_power_of_2(head_size))


def flash_attention_tiled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    max_seqlen: int,
    out: torch.Tensor | None = None,
    tile: FlashTile | None = None,
) -> torch.Tensor:
    """``flash_attention`` by the kernel above, on whatever device Triton has.

    tile: shape of a program; chosen by head size and dtype when None. The rest, the result and
    the errors: see :func:`flash_attention`.
    """
    check_flash_inputs(q, k, v, cu_seqlens, scale, max_seqlen)
    _, num_heads, head_size = q.shape
    tile = tile or default_tile(head_size, q.dtype, q.device)
    out = check_out(out, q)
    grid = (triton.cdiv(max_seqlen, tile.block_m), num_heads, len(cu_seqlens) - 1)
    if 0 in grid:
        return out
    flash_attention_kernel[grid](
        q,
        k,
        v,
        out,
        cu_seqlens,
        *(stride for tensor in (q, k, v, out) for stride in tensor.stride()[:2]),
        scale * LOG2_E,
        GROUP=num_heads // k.shape[1],
        D=head_size,
        BLOCK_D=padded_head_size(head_size),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        PRECISION=precision_of(q.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    max_seqlen: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal self-attention of a flattened batch in O(T) memory, by the fastest kernel that fits.

    Args:
        q: [T, H, D] queries of all sequences, one after the other. q, k and v may be views of one
            fused tensor.
        k: [T, G, D] keys, H a multiple of G.
        v: [T, G, D] values.
        cu_seqlens: [B + 1] int32, where each sequence begins, and T at the end.
        scale: positive factor on the scores, usually D ** -0.5.
        max_seqlen: length of the longest sequence; it sizes the grid.
        out: [T, H, D] to write into; a new tensor when None.

    Returns:
        [T, H, D], contiguous, in q's dtype.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    if not fits_hopper(q, k, v):
        return flash_attention_tiled(
            q, k, v, cu_seqlens, scale=scale, max_seqlen=max_seqlen, out=out
        )
    check_flash_inputs(q, k, v, cu_seqlens, scale, max_seqlen)
    out = check_out(out, q)
    if max_seqlen > 0:
        attend_on_hopper(q, k, v, cu_seqlens, out, scale=scale, max_query_len=max_seqlen)
    return out
