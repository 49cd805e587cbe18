"""Paged attention as Triton kernels (Kwon et al. 2023), the readable forms.

The cache of a layer is [N, S, G, D]: N blocks (pages) of S tokens. A sequence owns whichever
blocks were free; its row of the block table lists them in order:

    token t of sequence b  ->  block = block_tables[b, t // S],  row = t % S of that block

Only the address of a key changes against `flash_kernels.py`; the online softmax is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.attention.flash_checks import check_out
from minivllm.attention.flash_kernels import (
    LOG2_E,
    LOWEST,
    FlashTile,
    attend_to_tile,
    default_tile,
    padded_head_size,
    precision_of,
)
from minivllm.attention.paged_checks import check_paged_inputs


@triton.jit
def load_paged_tile(
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    start,
    length,
    kv_head,
    G: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys and values [BLOCK_N, BLOCK_D] of one sequence's tokens from start on; their positions.

    k_cache, v_cache: [N, S, G, D], contiguous; table: the sequence's row of the block tables.
    Tokens at or past ``length`` are zeros: neither their table entry nor their slot is read.
    Returns k and v of ``kv_head``, and the tokens' positions [BLOCK_N].
    """
    tokens = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = tokens < length
    blocks = tl.load(table_ptr + tokens // S, mask=inside, other=0)
    slots = blocks.to(tl.int64) * S + tokens % S  # 64 bits: N * S * G * D can pass 2^31
    at = ((slots * G + kv_head) * D)[:, None] + dims
    mask = inside[:, None] & (dims < D)
    k = tl.load(k_cache_ptr + at, mask=mask, other=0.0)
    v = tl.load(v_cache_ptr + at, mask=mask, other=0.0)
    return k, v, tokens


@triton.jit
def paged_decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    context_lens_ptr,
    out_ptr,
    q_stride_b,
    q_stride_h,
    table_stride,
    scale_log2,
    G: tl.constexpr,
    GROUP: tl.constexpr,  # query heads for each KV head, H / G
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP rounded up to the 16 rows that a matrix instruction takes
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does KV head ``program_id(0)`` of sequence ``program_id(1)``.

    Its query heads share each K and V tile:

        kv_head 0:  q head 0 |                block table of the sequence: 7, 2, 5
                    q head 1 |  x  keys of    block 7 -> block 2 -> block 5
                    (14 rows |                tile by tile
                     unused) |

    A query of a decode step stands at the end of its sequence and sees all of it: no causal mask.

    q: [B, H, D], sequences ``q_stride_b`` and heads ``q_stride_h`` numbers apart; k_cache, v_cache:
    [N, S, G, D]; block_tables: [B, M], rows ``table_stride`` numbers apart; context_lens: [B]; out:
    [B, H, D], contiguous, zeros where the context is 0. scale_log2 and PRECISION go to
    `attend_to_tile`.
    """
    kv_head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    length = tl.load(context_lens_ptr + seq)
    rows = tl.arange(0, ROWS)
    heads = kv_head * GROUP + rows
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < GROUP)[:, None] & (dims < D)[None, :]
    at = heads[:, None] * q_stride_h + dims[None, :]
    q = tl.load(q_ptr + seq * q_stride_b + at, mask=mask, other=0.0)

    row_max = tl.full([ROWS], LOWEST, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    table_ptr = block_tables_ptr + seq * table_stride
    for start in tl.range(0, length, BLOCK_N):
        k, v, tokens = load_paged_tile(
            k_cache_ptr, v_cache_ptr, table_ptr, start, length, kv_head, G, S, D, BLOCK_D, BLOCK_N
        )
        visible = (tokens < length)[None, :]
        row_max, row_sum, acc = attend_to_tile(
            q, k, v, visible, row_max, row_sum, acc, scale_log2, PRECISION
        )
    # A padded row of a CUDA graph has no context: its sum is 0 and its output shall be 0.
    out = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    at = (seq * (G * GROUP) + heads)[:, None] * D + dims[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def paged_decode_whole(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    block_n: int = 64,
    num_warps: int = 4,
    num_stages: int = 3,
) -> torch.Tensor:
    """Attention of one new token for each sequence, each sequence walked by one program.

    The readable form. It keeps a GPU busy only if there are many sequences; ``paged_decode``
    takes the same arguments and also divides long ones.

    Args:
        q: [B, H, D] the newest token's queries; its key and value are in the cache already.
        k_cache: [N, S, G, D], H a multiple of G, S a power of two.
        v_cache: [N, S, G, D].
        block_tables: [B, max_blocks] int32; entries past a sequence's last block are not read.
        context_lens: [B] int32 tokens of each sequence, the newest included; 0 for a padded row.
        scale: positive factor on the scores.
        block_n: keys a tile; num_warps, num_stages: see Triton.

    Returns:
        [B, H, D], contiguous, in q's dtype; zeros where context_lens is 0.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    check_paged_inputs(q, k_cache, v_cache, block_tables, context_lens, scale)
    batch, num_heads, head_size = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    group = num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    paged_decode_kernel[(num_kv_heads, batch)](
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        out,
        *q.stride()[:2],
        block_tables.stride(0),
        scale * LOG2_E,
        G=num_kv_heads,
        GROUP=group,
        S=block_size,
        D=head_size,
        BLOCK_D=padded_head_size(head_size),
        ROWS=max(16, triton.next_power_of_2(group)),
        BLOCK_N=block_n,
        PRECISION=precision_of(q.dtype),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


# One kernel for all batches, and for those whose first sequences are left out.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_tables_ptr", "cu_query_lens_ptr", "context_lens_ptr"],
)
def paged_prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    cu_query_lens_ptr,
    context_lens_ptr,
    out_ptr,
    q_stride_t,
    q_stride_h,
    table_stride,
    scale_log2,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program does BLOCK_M queries of one query head, as in `flash_attention_kernel`.

    The queries are the last of their sequence, behind ``context`` tokens that are in the cache
    from earlier (a shared prefix, an earlier chunk):

        position:  0 ............ context .. context + query_len
        keys       [ seen by every query ][ seen up to oneself ]
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    begin = tl.load(cu_query_lens_ptr + seq).to(tl.int64)
    query_len = (tl.load(cu_query_lens_ptr + seq + 1) - begin).to(tl.int32)
    first_row = block * BLOCK_M
    if first_row >= query_len:
        return
    length = tl.load(context_lens_ptr + seq)
    context = length - query_len

    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)[None, :]
    q_rows = (begin + rows)[:, None] * q_stride_t + head * q_stride_h
    mask = (rows < query_len)[:, None] & (dims < D)
    q = tl.load(q_ptr + q_rows + dims, mask=mask, other=0.0)

    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table_ptr = block_tables_ptr + seq * table_stride
    kv_head = head // GROUP
    end = tl.minimum(context + first_row + BLOCK_M, length)
    for start in tl.range(0, end, BLOCK_N):
        k, v, tokens = load_paged_tile(
            k_cache_ptr, v_cache_ptr, table_ptr, start, length, kv_head, G, S, D, BLOCK_D, BLOCK_N
        )
        visible = tokens[None, :] <= (context + rows)[:, None]
        row_max, row_sum, acc = attend_to_tile(
            q, k, v, visible, row_max, row_sum, acc, scale_log2, PRECISION
        )
    out_rows = ((begin + rows) * (G * GROUP) + head)[:, None] * D
    out = acc / row_sum[:, None]
    tl.store(out_ptr + out_rows + dims, out.to(out_ptr.dtype.element_ty), mask=mask)


def paged_prefill_tiled(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    tile: FlashTile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``paged_prefill`` by the kernel above, on whatever device Triton has.

    tile: shape of a program; chosen by head size and dtype when None. The rest, the result and
    the errors: see :func:`minivllm.attention.paged_kernels.paged_prefill`.
    """
    check_paged_inputs(
        q, k_cache, v_cache, block_tables, context_lens, scale, cu_query_lens, max_query_len
    )
    _, num_heads, head_size = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    tile = tile or default_tile(head_size, q.dtype, q.device)
    out = check_out(out, q)
    grid = (triton.cdiv(max_query_len, tile.block_m), num_heads, len(context_lens))
    if 0 in grid:
        return out
    paged_prefill_kernel[grid](
        q,
        k_cache,
        v_cache,
        block_tables,
        cu_query_lens,
        context_lens,
        out,
        *q.stride()[:2],
        block_tables.stride(0),
        scale * LOG2_E,
        G=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        S=block_size,
        D=head_size,
        BLOCK_D=padded_head_size(head_size),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        PRECISION=precision_of(q.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
