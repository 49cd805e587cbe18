"""Paged decode with the work cut into equal shares (split-KV, also known as flash decoding).

One program a (sequence, KV head) leaves a GPU idle when there are few sequences, and waits for the
longest when they differ. Here the tiles of all sequences lie on one line, and every program takes
an equal share of it, wherever that begins and ends (for each KV head alike):

    sequence   |---- 0 ----|- 1 -|--------------- 2 ---------------|-- 3 --|
    tiles      [] [] [] [] [] [] [] [] [] [] [] [] [] [] [] [] [] [] [] [] []
    shares     |----- share 0 -----|----- share 1 -----|----- share 2 -----|
    pieces     |     0     |  1  |2|         2         |     2     |   3   |

A sequence that borders cut (2 here) is done in pieces. Each piece is put aside, divided by its own
softmax denominator, with the logarithm of that denominator; a second kernel merges the pieces as
the online softmax merges tiles. What no border cuts is written at once.

The line itself is written down once a step, for all layers (`paged_plan_kernels.py`), so to attend
is one loop over a list, without a pause between sequences.

Sources: Dao et al., "Flash-Decoding for long-context inference" (2023); Osama et al., "Stream-K"
(2023), for the line of tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.attention.flash_checks import check_out
from minivllm.attention.flash_kernels import (
    LOG2_E,
    LOWEST,
    attend_to_tile,
    padded_head_size,
    precision_of,
)
from minivllm.attention.paged_checks import check_paged_inputs
from minivllm.attention.paged_plan_kernels import PagedDecodePlan

# Compute capabilities with a matrix unit for float64: A100; H100 and H200; B200.
FAST_IN_FLOAT64 = ((8, 0), (9, 0), (10, 0))


@triton.jit
def attend_in_float64(q, k, v, visible, row_max, row_sum, acc, scale_log2):
    """`attend_to_tile` for float32, with the sums of both products in float64.

    A float32 product by ``tl.dot`` adds one term after the other and rounds each time, where
    PyTorch's decode adds in a tree. Data-centre GPUs have a matrix unit for float64, so this costs
    them no time.
    """
    keys = tl.trans(k).to(tl.float64)
    scores = tl.dot(q.to(tl.float64), keys, out_dtype=tl.float64).to(tl.float32)
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
    shrink = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores * scale_log2 - new_max[:, None])
    row_sum = row_sum * shrink + tl.sum(weights, axis=1)
    more = tl.dot(weights.to(tl.float64), v.to(tl.float64), out_dtype=tl.float64)
    return new_max, row_sum, acc * shrink[:, None] + more.to(tl.float32)


@triton.jit(do_not_specialize=["most"])
def split_decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    share_ptr,
    tile_seq_ptr,
    tile_left_ptr,
    tile_slot_ptr,
    out_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    most,
    q_stride_b,
    q_stride_h,
    scale_log2,
    G: tl.constexpr,
    GROUP: tl.constexpr,  # query heads for each KV head, H / G
    HEADS: tl.constexpr,  # KV heads of a program
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program does one share of the line for HEADS KV heads: its row of the list, tile by tile.

    A tile has one column for each token and KV head, as they lie in memory. A query sees the
    columns of its own KV head, which costs nothing: the matrix unit wants 16 rows anyway.

        HEADS = 2           token 0   token 1   token 2         K has rows of 2 * D numbers
        KV head               0  1      0  1      0  1 ...
        query heads 0, 1      x  .      x  .      x  .
        query heads 2, 3      .  x      .  x      .  x

    The share, the list, q [B, H, D] with its strides, the cache [N, S, G, D] and what is put aside:
    see `PagedDecodePlan`.
    """
    if DEPENDENT:
        gdc_wait()  # looking up before it gains 0.3 us, but the list may be quite new
        gdc_launch_dependents()  # the merge may come, look up what it needs, and wait
    kv_head = tl.program_id(0) * HEADS
    share = tl.program_id(1)
    count = tl.load(share_ptr + 2 * share)
    from_start = tl.load(share_ptr + 2 * share + 1) != 0
    begin = share * most
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, TILE * HEADS)
    token = cols // HEADS
    dims = tl.arange(0, BLOCK_D)[None, :]
    heads = kv_head * GROUP + rows
    head_mask = rows < HEADS * GROUP
    row_mask = head_mask[:, None] & (dims < D)
    q_head = heads[:, None] * q_stride_h + dims
    own = (rows // GROUP)[:, None] == (cols % HEADS)[None, :]
    within_run = ((token % RUN * G + kv_head + cols % HEADS) * D)[:, None] + dims
    # One number a tile where the tile lies within a block, else one for each column.
    runs = TILE // RUN
    run = (token // RUN)[:, None] if RUN < TILE else 0
    # Looked up before it is known whether there is such a tile: one wait instead of two.
    seq = tl.load(tile_seq_ptr + begin)
    left = tl.load(tile_left_ptr + begin)
    slot = tl.load(tile_slot_ptr + begin * runs + run)
    if count > 0:
        end = begin + count
        row_max = tl.full([ROWS], LOWEST, tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for tile in tl.range(begin, end):
            # The next entry of the list is on its way while this tile is worked on.
            more = tile + 1 < end
            next_seq = tl.load(tile_seq_ptr + tile + 1, mask=more, other=0)
            next_left = tl.load(tile_left_ptr + tile + 1, mask=more, other=0)
            next_run = (tile + 1) * runs + run
            next_slot = tl.load(tile_slot_ptr + next_run, mask=next_run < end * runs, other=0)

            # With every tile anew: so it comes ahead of time, as K and V do, and a change of
            # sequence waits for nothing.
            q = tl.load(q_ptr + seq.to(tl.int64) * q_stride_b + q_head, mask=row_mask, other=0.0)
            # 64 bits, for N * S * G * D can pass 2^31; within a run of tokens 32 bits do.
            at = slot.to(tl.int64) * (G * D)
            mask = (token < left)[:, None] & (dims < D)
            k = tl.load(k_cache_ptr + at + within_run, mask=mask, other=0.0)
            v = tl.load(v_cache_ptr + at + within_run, mask=mask, other=0.0)
            visible = own & (token < left)[None, :]
            if PRECISION == "float64":
                row_max, row_sum, acc = attend_in_float64(
                    q, k, v, visible, row_max, row_sum, acc, scale_log2
                )
            else:
                row_max, row_sum, acc = attend_to_tile(
                    q, k, v, visible, row_max, row_sum, acc, scale_log2, PRECISION
                )
            to_end = left <= TILE
            if to_end | (tile + 1 == end):
                denominator = tl.where(row_sum > 0, row_sum, 1.0)
                result = acc / denominator[:, None]
                if from_start & to_end:
                    out_at = (seq.to(tl.int64) * (G * GROUP) + heads)[:, None] * D + dims
                    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=row_mask)
                else:
                    # Of a share only the first piece can lack its beginning, only the last its
                    # end, and so it needs two places at most.
                    piece = (2 * share + from_start.to(tl.int32)) * (G * GROUP) + heads
                    tl.store(partial_out_ptr + piece[:, None] * D + dims, result, mask=row_mask)
                    lse = row_max + tl.log2(denominator)
                    tl.store(partial_lse_ptr + piece, lse, mask=head_mask)
                row_max = tl.full([ROWS], LOWEST, tl.float32)
                row_sum = tl.zeros([ROWS], tl.float32)
                acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
                from_start = to_end
            seq = next_seq
            left = next_left
            slot = next_slot


@triton.jit
def merge_kernel(
    cut_ptr,
    out_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,  # taken in one step
    DEPENDENT: tl.constexpr,
    EAGER: tl.constexpr,
):
    """One program merges, for one query head, the sequence that the end of one share cuts.

    A piece i brings out_i, divided by its own denominator, and lse_i = log2 of that denominator:

        out = sum_i 2^lse_i * out_i / sum_i 2^lse_i

    Where several borders cut one sequence, the program of the first of them does it. cut_ptr:
    [shares, 2], the sequence and the share where it ends; out_ptr: [B, H, D]; the pieces:
    [2 * shares, H, D] and [2 * shares, H], see `PagedDecodePlan`.
    """
    head = tl.program_id(0)
    first = tl.program_id(1)
    # This is older than the kernel in front. The pieces are not, and even a program with nothing
    # to merge must wait: the next kernel takes our end for the end of both.
    seq = tl.load(cut_ptr + 2 * first).to(tl.int64)
    last = tl.load(cut_ptr + 2 * first + 1)
    if DEPENDENT:
        if EAGER:
            gdc_launch_dependents()
        gdc_wait()
        if not EAGER:
            gdc_launch_dependents()
    if last <= first:
        return

    dims = tl.arange(0, BLOCK_D)
    top = LOWEST
    weight_sum = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(first, last + 1, PIECES):
        share = start + tl.arange(0, PIECES)
        mask = share <= last
        piece = (2 * share + (share == first).to(tl.int32)) * H + head
        lse = tl.load(partial_lse_ptr + piece, mask=mask, other=float("-inf"))
        piece_mask = mask[:, None] & (dims < D)[None, :]
        piece_at = piece[:, None] * D + dims[None, :]
        pieces = tl.load(partial_out_ptr + piece_at, mask=piece_mask, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(lse - new_top)
        weight_sum = weight_sum * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink + tl.sum(weights[:, None] * pieces, axis=0)
        top = new_top
    out = (acc / weight_sum).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (seq * H + head) * D + dims, out, mask=dims < D)


def sums_in_float64(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether decode adds up its products in float64: those of float32, where that costs no time.

    Gaming GPUs of the same generations have a 64th of float32's speed in float64; they, and older
    ones, add in float32.
    """
    if dtype != torch.float32 or device.type != "cuda":
        return dtype == torch.float32
    return torch.cuda.get_device_capability(device) in FAST_IN_FLOAT64


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    plan: PagedDecodePlan | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of one new token for each sequence, over the pages of its context.

    Safe to capture in a CUDA graph: nothing is read back and the grid is fixed.

    Args:
        q: [B, H, D] the newest token's queries; its key and value are in the cache already.
        k_cache: [N, S, G, D], H a multiple of G, S a power of two.
        v_cache: [N, S, G, D].
        block_tables: [B, max_blocks] int32; entries past a sequence's last block are not read.
        context_lens: [B] int32 tokens of each sequence, the newest included; 0 for a padded row.
        scale: positive factor on the scores, usually D ** -0.5.
        plan: prepared for these block_tables and context_lens; made on the spot when None, which
            a model of many layers should not do in each.
        out: [B, H, D] to write into; a new tensor when None.
        pdl: let it start while the kernel in front finishes (programmatic dependent launch). It
            waits for that kernel's end before it reads anything; that kernel must in turn have
            waited for those before it. Without effect before Hopper. What is launched so behind
            this may start early either way: below plan.wide_from sequences while the shares are
            read, from there on when they have been.

    Returns:
        [B, H, D], contiguous, in q's dtype; zeros where context_lens is 0.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or the plan is another's.
    """
    check_paged_inputs(q, k_cache, v_cache, block_tables, context_lens, scale)
    batch, num_heads, head_size = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    if plan is None:
        plan = PagedDecodePlan(
            *block_tables.shape,
            block_size,
            num_heads,
            num_kv_heads,
            head_size,
            dtype=q.dtype,
            device=q.device,
        )
        plan.prepare(block_tables, context_lens)
    plan.check(q, k_cache, block_tables, context_lens)
    out = check_out(out, q)
    if batch == 0:
        return out
    dependent = {"launch_pdl": True} if plan.dependent else {}
    group = num_heads // num_kv_heads
    wide = batch >= plan.wide_from
    heads = 2 if wide else 1
    shape = {
        "D": head_size,
        "BLOCK_D": padded_head_size(head_size),
        "DEPENDENT": plan.dependent,
    }
    split_decode_kernel[(num_kv_heads // heads, plan.shares)](
        q,
        k_cache,
        v_cache,
        plan.share,
        plan.tile_seq,
        plan.tile_left,
        plan.tile_slot,
        out,
        plan.partial_out,
        plan.partial_lse,
        plan.most,
        *q.stride()[:2],
        scale * LOG2_E,
        G=num_kv_heads,
        GROUP=group,
        HEADS=heads,
        ROWS=max(16, triton.next_power_of_2(heads * group)),
        TILE=plan.tile,
        RUN=min(block_size, plan.tile),
        PRECISION="float64" if sums_in_float64(q.dtype, q.device) else precision_of(q.dtype),
        num_warps=heads * plan.num_warps,
        num_stages=plan.num_stages,
        **shape,
        **(dependent if pdl else {}),
    )
    if plan.shares > 1:
        merge_kernel[(num_heads, plan.shares - 1)](
            plan.cut,
            out,
            plan.partial_out,
            plan.partial_lse,
            H=num_heads,
            PIECES=8,
            # Whoever comes next may fill its caches while we work, if that leaves us enough.
            EAGER=not wide,
            num_warps=1,
            **shape,
            **dependent,
        )
    return out
