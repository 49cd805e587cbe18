"""Flash attention for Hopper GPUs (H100, H200), with copies, products and softmax overlapped.

The arithmetic is that of `flash_kernels.py`. What changes is who does it when. The matrix unit of
a multiprocessor stands idle while the same warps compute a softmax or wait for memory; here the
warps of a program share the labour (warp specialization, as in FlashAttention-3, Shah et al. 2024):

    producer   1 warp   copies  Q, K0, V0, K1, V1, ...  into shared memory, as far ahead as it fits
    consumer 0 4 warps  query rows  0 to  63:  S = Q K^T, softmax, O += P V
    consumer 1 4 warps  query rows 64 to 127:  the same, at its own pace

    K and V buffers      full[i]: "tile i is there"   producer -> consumers
    (STAGES of each)     empty[i]: "you may refill"   consumers -> producer

A consumer also keeps the matrix unit busy with itself: it starts S for the next tile and O += P V
for this one, and computes the softmax of the next tile while the latter still runs.

A program takes one block of 128 query rows after the other until none is left (a persistent
grid), so the producer fetches the next block's first tiles during this one's last steps. Blocks
with the longest way to go come first. Keys are visited from the diagonal back to the first: the
tile that needs a mask is then the first one, and the others need none.

It is written in Gluon, the layer below Triton's language where layouts, barriers and copies are
explicit. Triton's own compiler does not divide these labours on this chip for more than 4 warps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.9 renamed the copies between global and shared memory.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

BLOCK_M = gl.constexpr(128)  # query rows of a program
HALF_M = gl.constexpr(64)  # of them for each consumer: what one wgmma instruction takes
LOWEST = gl.constexpr(-1e30)  # see flash_kernels.py


@gluon.jit
def work_item(item, work, H: gl.constexpr, PAGED: gl.constexpr, ORDERED: gl.constexpr):
    """Which queries item number ``item`` means: (head, seq, begin, first_row, query_len, length).

    query_len and first_row 0 mean none. Every other round of the grid runs backwards: whoever got
    the longest block of one round gets the shortest of the next.
    """
    cu_query_lens_ptr, context_lens_ptr, order_ptr, batch, entries = work
    programs = gl.num_programs(0)
    turn = item // programs
    item = gl.where(turn % 2 == 0, item, (2 * turn + 1) * programs - 1 - item)
    head = item % H
    entry = item // H
    if ORDERED:
        inside = entry < entries
        seq = gl.load(order_ptr + 2 * entry + 2, mask=inside, other=0)
        block = gl.load(order_ptr + 2 * entry + 3, mask=inside, other=0)
    else:
        inside = entry < entries
        seq = gl.where(inside, entry % batch, 0)
        block = gl.where(inside, (entries - 1 - entry) // batch, 0)
    begin = gl.load(cu_query_lens_ptr + seq)
    query_len = gl.where(inside, gl.load(cu_query_lens_ptr + seq + 1) - begin, 0)
    length = query_len
    if PAGED:
        length = gl.load(context_lens_ptr + seq)
    return head, seq, begin, block * BLOCK_M, query_len, length


@gluon.jit
def tile_rows(
    table_ptr,
    begin,
    start,
    length,
    S: gl.constexpr,
    N: gl.constexpr,
    BOX: gl.constexpr,
    PAGED: gl.constexpr,
):
    """Row of K and V where each box of BOX keys of the tile at ``start`` begins.

    A box past the end of the sequence reads block 0: something must be read, nothing is used.
    """
    rows = ()
    for part in gl.static_range(N // BOX):
        token = start + part * BOX
        if PAGED:
            block = gl.load(table_ptr + token // S, mask=token < length, other=0)
            rows = rows + (block * S + token % S,)  # noqa: RUF005 (Gluon has no unpacking)
        else:
            rows = rows + (begin + token,)  # noqa: RUF005
    return rows


@gluon.jit
def produce(
    descs,
    tiles,
    barriers,
    work,
    tables,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    S: gl.constexpr,
    BOX: gl.constexpr,
    PAGED: gl.constexpr,
    ORDERED: gl.constexpr,
):
    """The producer: one warp that only copies."""
    q_desc, k_desc, v_desc = descs
    tables_ptr, table_stride = tables
    q_tile, k_tile, v_tile = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_tile.shape[0]
    N: gl.constexpr = k_tile.shape[1]
    D: gl.constexpr = k_tile.shape[2]
    BYTES: gl.constexpr = k_tile.dtype.primitive_bitwidth // 8
    entries = work[4]
    count = 0  # tiles so far, over all items: tile i is in buffer i % STAGES
    done = 0  # items so far
    for item in range(gl.program_id(0), H * entries + gl.num_programs(0), gl.num_programs(0)):
        head, seq, begin, first_row, query_len, length = work_item(item, work, H, PAGED, ORDERED)
        if first_row < query_len:
            mbarrier.wait(q_empty, (done & 1) ^ 1)
            mbarrier.expect(q_full, BLOCK_M * D * BYTES)
            for half in gl.static_range(2):
                row = begin + first_row + half * HALF_M
                copy_in(q_desc, [row, head * D], q_full, q_tile.index(half))
            end = gl.minimum(length - query_len + first_row + BLOCK_M, length)
            num_tiles = gl.cdiv(end, N)
            column = head // GROUP * D
            table_ptr = tables_ptr + seq * table_stride
            for j in range(num_tiles):
                # Looked up before waiting for a free buffer: the wait hides the latency.
                rows = tile_rows(
                    table_ptr, begin, (num_tiles - 1 - j) * N, length, S, N, BOX, PAGED
                )
                stage = count % STAGES
                phase = (count // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), N * D * BYTES)
                for part in gl.static_range(N // BOX):
                    box = k_tile.index(stage).slice(part * BOX, BOX)
                    copy_in(k_desc, [rows[part], column], k_full.index(stage), box)
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), N * D * BYTES)
                for part in gl.static_range(N // BOX):
                    box = v_tile.index(stage).slice(part * BOX, BOX)
                    copy_in(v_desc, [rows[part], column], v_full.index(stage), box)
                count += 1
            done += 1


@gluon.jit
def softmax_step(scores, row_max, row_sum, scale_log2):
    """Online softmax of one tile: (weights, row_max, row_sum, factor that shrinks the old sums)."""
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    shrink = gl.exp2((row_max - new_max) * scale_log2)
    # One multiply-add a score, because the maximum is scaled and not the score.
    weights = gl.exp2(scores * scale_log2 - (new_max * scale_log2)[:, None])
    return weights, new_max, row_sum * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def consume(
    HALF: gl.constexpr,
    out,
    tiles,
    barriers,
    work,
    scale_log2,
    H: gl.constexpr,
    PAGED: gl.constexpr,
    ORDERED: gl.constexpr,
):
    """A consumer: rows HALF * 64 to HALF * 64 + 63 of every block."""
    out_desc, out_ptr, out_tile = out
    q_tile, k_tile, v_tile = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_tile.shape[0]
    N: gl.constexpr = k_tile.shape[1]
    D: gl.constexpr = k_tile.shape[2]
    dtype: gl.constexpr = k_tile.dtype
    # How the 128 threads hold S [64, N] and O [64, D]: as wgmma leaves them, rows within a warp.
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    v_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    cols = gl.arange(0, N, layout=gl.SliceLayout(0, s_layout))
    s_zero = gl.zeros([HALF_M, N], gl.float32, s_layout)

    entries = work[4]
    count = 0
    done = 0
    for item in range(gl.program_id(0), H * entries + gl.num_programs(0), gl.num_programs(0)):
        head, _, begin, first_row, query_len, length = work_item(item, work, H, PAGED, ORDERED)
        if first_row < query_len:
            context = length - query_len
            num_tiles = gl.cdiv(gl.minimum(context + first_row + BLOCK_M, length), N)
            row = first_row + HALF * HALF_M
            unmasked = (context + row + 1) // N * N  # keys before this one all rows may see
            position = context + row + gl.arange(0, HALF_M, layout=gl.SliceLayout(1, s_layout))
            q = q_tile.index(HALF)
            mbarrier.wait(q_full, done & 1)

            # The tile on the diagonal, which is the last of its sequence or near it.
            start = (num_tiles - 1) * N
            stage = count % STAGES
            phase = count // STAGES & 1
            mbarrier.wait(k_full.index(stage), phase)
            scores = warpgroup_mma(q, k_tile.index(stage).permute((1, 0)), s_zero, use_acc=False)
            mbarrier.arrive(k_empty.index(stage), count=1)
            if start + N > length:
                # What lies past the end may be anything, and 0 * NaN is NaN: V must be cleared.
                # Both consumers do it, and write the same.
                mbarrier.wait(v_full.index(stage), phase)
                v = v_tile.index(stage).load(v_layout)
                v_pos = start + gl.arange(0, N, layout=gl.SliceLayout(1, v_layout))
                v_tile.index(stage).store(gl.where((v_pos < length)[:, None], v, 0.0))
                fence_async_shared()
            scores = gl.where((start + cols)[None, :] <= position[:, None], scores, float("-inf"))
            # A finite start: a row that sees nothing of this tile keeps sum 0 instead of NaN.
            row_max = gl.full([HALF_M], LOWEST, gl.float32, gl.SliceLayout(1, s_layout))
            row_sum = gl.zeros([HALF_M], gl.float32, gl.SliceLayout(1, s_layout))
            weights, row_max, row_sum, shrink = softmax_step(scores, row_max, row_sum, scale_log2)
            p = gl.convert_layout(weights.to(dtype), p_layout)
            acc = gl.zeros([HALF_M, D], gl.float32, o_layout)
            next_tile = count + 1
            mbarrier.wait(
                k_full.index(next_tile % STAGES), next_tile // STAGES & 1, pred=num_tiles > 1
            )
            for j in range(1, num_tiles):
                start = (num_tiles - 1 - j) * N
                k_stage = next_tile % STAGES
                k = k_tile.index(k_stage).permute((1, 0))
                scores_token = warpgroup_mma(q, k, s_zero, use_acc=False, is_async=True)
                stage = count % STAGES
                mbarrier.wait(v_full.index(stage), count // STAGES & 1)
                acc_token = warpgroup_mma(p, v_tile.index(stage), acc, is_async=True)
                scores = warpgroup_mma_wait(1, [scores_token])  # the older of the two
                mbarrier.arrive(k_empty.index(k_stage), count=1)
                if start + N > unmasked:
                    hidden = (start + cols)[None, :] > position[:, None]
                    scores = gl.where(hidden, float("-inf"), scores)
                weights, row_max, row_sum, shrink = softmax_step(
                    scores, row_max, row_sum, scale_log2
                )
                next_p = weights.to(dtype)
                # The assembler moves arithmetic across the wait for acc below, and the overlap
                # is lost, unless a branch stands between them: this wait for the next K is one.
                next_tile += 1
                mbarrier.wait(
                    k_full.index(next_tile % STAGES),
                    next_tile // STAGES & 1,
                    pred=j + 1 < num_tiles,
                )
                acc = warpgroup_mma_wait(0, [acc_token])
                mbarrier.arrive(v_empty.index(stage), count=1)
                acc = acc * gl.convert_layout(shrink, o_rows)[:, None]
                p = gl.convert_layout(next_p, p_layout)
                count += 1
            mbarrier.arrive(q_empty, count=1)
            stage = count % STAGES
            mbarrier.wait(v_full.index(stage), count // STAGES & 1)
            acc = warpgroup_mma(p, v_tile.index(stage), acc)
            mbarrier.arrive(v_empty.index(stage), count=1)
            count += 1
            done += 1

            acc = acc * (1.0 / gl.convert_layout(row_sum, o_rows))[:, None]
            if row + HALF_M <= query_len:
                # A full block leaves by an asynchronous copy: the next one begins meanwhile.
                tma.store_wait(0)
                out_tile.index(HALF).store(acc.to(dtype))
                fence_async_shared()
                copy_out(out_desc, [begin + row, head * D], out_tile.index(HALF))
            else:
                rows = row + gl.arange(0, HALF_M, layout=o_rows)
                dims = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
                at = ((begin + rows).to(gl.int64) * (H * D) + head * D)[:, None] + dims[None, :]
                gl.store(out_ptr + at, acc.to(dtype), mask=(rows < query_len)[:, None])
    tma.store_wait(0)


# One kernel for all batches, and for those whose first sequences are left out.
@gluon.jit(
    do_not_specialize=["table_stride", "batch", "entries"],
    do_not_specialize_on_alignment=["cu_query_lens_ptr", "context_lens_ptr", "tables_ptr"],
)
def flash_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    out_ptr,
    cu_query_lens_ptr,
    context_lens_ptr,
    tables_ptr,
    table_stride,
    order_ptr,
    batch,
    entries,  # at most so many blocks of BLOCK_M rows
    scale_log2,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    S: gl.constexpr,
    D: gl.constexpr,
    N: gl.constexpr,
    BOX: gl.constexpr,
    STAGES: gl.constexpr,
    PAGED: gl.constexpr,
    ORDERED: gl.constexpr,
):
    """Set up buffers and barriers, then let three groups of warps work side by side."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    q_tile = gl.allocate_shared_memory(dtype, [2, HALF_M, D], q_desc.layout)
    k_tile = gl.allocate_shared_memory(dtype, [STAGES, N, D], k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [STAGES, N, D], v_desc.layout)
    out_tile = gl.allocate_shared_memory(dtype, [2, HALF_M, D], out_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)  # empty when both consumers say so
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    if ORDERED:
        entries = gl.load(order_ptr)  # as many as there are
    descs = (q_desc, k_desc, v_desc)
    tiles = (q_tile, k_tile, v_tile)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    work = (cu_query_lens_ptr, context_lens_ptr, order_ptr, batch, entries)
    tables = (tables_ptr, table_stride)
    out = (out_desc, out_ptr, out_tile)
    gl.warp_specialize(
        [
            (consume, (0, out, tiles, barriers, work, scale_log2, H, PAGED, ORDERED)),
            (consume, (1, out, tiles, barriers, work, scale_log2, H, PAGED, ORDERED)),
            (produce, (descs, tiles, barriers, work, tables, H, GROUP, S, BOX, PAGED, ORDERED)),
        ],
        [4, 1],  # warps of the second and third
        [232, 40],  # their registers: a copy needs few, two tiles of float32 many
    )
