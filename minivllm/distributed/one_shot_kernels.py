"""Sums over the ranks of one host in a single launch each, by writing into each other's memory.

    rank 0    own numbers -> | to rank 1 |                 rank 0's box  | from 0 | from 1 |
    rank 1    own numbers -> | to rank 0 |                 rank 1's box  | from 0 | from 1 |

Every rank has a box of memory that all others can write to. A program sends its numbers to the same
program of every other rank, waits until theirs have come, and adds up all of them in the order of
the ranks. So every rank gets the very same sum, after one trip over the wire: for few bytes the
trips are what takes time, and a ring of P ranks makes 2 * (P - 1) of them.

No flag says that numbers have come: every number brings its own (NCCL calls this its LL protocol).

    one word    | epoch | number |    64 bits for a float32, 32 for a number of 16 bits

A word is written whole or not at all, so whoever finds this call's epoch has the number too, and
nothing has to be written before anything else. A box has two halves that take turns. Thus nobody
can overrun a slow reader: to send for the second time from now, a rank must have had the words that
the others sent for the next time, which they did after they had read these.

Each program counts its own calls, in memory, and so a CUDA graph can be replayed: the arguments
stay, the epochs go on. All ranks make the same calls in the same order.

A rank that has gone would be waited for forever. So whoever waits looks at a word in the host's
memory now and then, and goes on with whatever it has once that is no longer zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# A look at the host's memory takes as long as some looks at one's own; this is about every ms.
LOOKS = tl.constexpr(1000)
# The same program runs on every rank, and so adds up in the same order.
PER_RANK = ["rank", "first_id", "num_ids"]


@triton.jit
def send(
    bits, at, mask, boxes_ptr, half, slot, epoch, rank, SIZE: tl.constexpr, WORD: tl.constexpr
):
    """Write ``bits`` [BLOCK] and the epoch to places ``at`` of our slot in every other box."""
    BITS: tl.constexpr = WORD.primitive_bitwidth // 2
    words = bits.to(WORD) | (epoch.to(WORD) << BITS)
    for ahead in tl.static_range(1, SIZE):
        # Not all to rank 0 first: its link would be busy while the others are idle.
        box = tl.load(boxes_ptr + (rank + ahead) % SIZE).to(tl.pointer_type(WORD))
        box = tl.multiple_of(box + (half * SIZE + rank) * slot, 16)
        tl.store(box + at, words, mask=mask)


@triton.jit
def receive(
    bits,
    at,
    mask,
    boxes_ptr,
    half,
    slot,
    epoch,
    rank,
    stop_ptr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,  # SIZE, rounded up to a power of two
    WORD: tl.constexpr,
):
    """What each rank has sent: words [RANKS, BLOCK], whose lower half is the number; ours is bits.

    Rows past the last rank, and places outside of ``mask``, are zeros.
    """
    BITS: tl.constexpr = WORD.primitive_bitwidth // 2
    ranks = tl.arange(0, RANKS)[:, None]
    box = tl.load(boxes_ptr + rank).to(tl.pointer_type(WORD))
    from_ptr = tl.multiple_of(box + half * SIZE * slot, 16) + ranks * slot + at[None, :]
    others = (ranks < SIZE) & (ranks != rank) & mask[None, :]
    now = epoch.to(WORD) << BITS
    words = tl.zeros(from_ptr.shape, WORD)
    missing = 1
    looks = 0
    while missing > 0:
        words = tl.load(from_ptr, mask=others, other=now, volatile=True)
        missing = tl.max(((words >> BITS) != (now >> BITS)).to(tl.int32))
        looks += 1
        if looks % LOOKS == 0:
            if tl.load(stop_ptr, volatile=True) != 0:
                missing = 0
    return tl.where(ranks == rank, bits.to(WORD)[None, :], words)


@triton.jit
def sum_of_ranks(
    x,
    at,
    mask,
    boxes_ptr,
    epochs_ptr,
    stop_ptr,
    slot,
    rank,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    WORD: tl.constexpr,
):
    """x [BLOCK] of this program on every rank -> their sum in float32, the same on every rank."""
    UINT: tl.constexpr = tl.uint32 if WORD.primitive_bitwidth == 64 else tl.uint16
    program = tl.program_id(0)
    epoch = tl.load(epochs_ptr + program).to(tl.uint32, bitcast=True) + 1
    half = (epoch & 1).to(tl.int32)
    bits = x.to(UINT, bitcast=True)
    send(bits, at, mask, boxes_ptr, half, slot, epoch, rank, SIZE, WORD)
    words = receive(bits, at, mask, boxes_ptr, half, slot, epoch, rank, stop_ptr, SIZE, RANKS, WORD)
    tl.store(epochs_ptr + program, epoch.to(tl.int32, bitcast=True))
    return tl.sum(words.to(UINT).to(x.dtype, bitcast=True).to(tl.float32), axis=0)


@triton.jit(do_not_specialize=PER_RANK)
def sum_rows_kernel(
    x_ptr,
    ids_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    boxes_ptr,
    epochs_ptr,
    stop_ptr,
    part_stride,
    x_stride,
    residual_stride,
    first_id,
    num_ids,
    eps,
    slot,
    rank,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    WORD: tl.constexpr,
    EMBED: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Row ``program_id(0)``: total = residual + sum of x over the ranks; out = norm(total).

    x is the sum of PARTS parts, rounded as ``out`` is; total may be float32, unrounded.
    EMBED: x is this rank's part of an embedding, and a row is that of its token ids[row], or zeros
    if the token is another rank's. ADD: there is a residual. NORM: the norm is wanted.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < E
    if NORM:
        weight = tl.load(weight_ptr + cols, mask=mask).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    dtype = out_ptr.dtype.element_ty
    if EMBED:
        # A vector, for the interpreter's masks are not made of scalars.
        token = tl.load(ids_ptr + row) - first_id + tl.zeros([BLOCK], tl.int64)
        ours = mask & (token >= 0) & (token < num_ids)
        x = tl.load(x_ptr + token * x_stride + cols, mask=ours, other=0.0)
    else:
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
        for part in tl.static_range(1, PARTS):
            part_ptr = x_ptr + part * part_stride + row * x_stride
            x += tl.load(part_ptr + cols, mask=mask, other=0.0)
        x = x.to(dtype)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
    at = tl.program_id(0) * E + cols
    total = sum_of_ranks(
        x, at, mask, boxes_ptr, epochs_ptr, stop_ptr, slot, rank, SIZE, RANKS, WORD
    )
    if ADD:
        total += residual.to(tl.float32)
    total = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * E + cols, total, mask=mask)
    if NORM:
        x = total.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / E + eps)
        normed = (x * inverse_rms).to(dtype).to(tl.float32)
        tl.store(out_ptr + row * E + cols, (normed * weight).to(dtype), mask=mask)


@triton.jit(do_not_specialize=[*PER_RANK, "rows"])
def sum_parts_kernel(
    parts_ptr,
    residual_ptr,
    gain_ptr,
    total_ptr,
    out_ptr,
    squares_ptr,
    boxes_ptr,
    epochs_ptr,
    stop_ptr,
    rows,
    slot,
    rank,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    WORD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK numbers of a row: total = residual + the sum of the PARTS parts of every rank.

    out: total * gain; squares [E / BLOCK, rows]: what this program's squares add up to. With both,
    a product of ``out`` can divide by the root mean square of its row. parts, residual and total
    are float32, what is sent is rounded as ``out`` is.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = E // BLOCK
    row = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    cols = block * BLOCK + tl.arange(0, BLOCK)
    at = row * E + cols
    gain = tl.load(gain_ptr + cols).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    x = tl.load(parts_ptr + at)
    for part in tl.static_range(1, PARTS):
        x += tl.load(parts_ptr + part * rows * E + at)
    residual = tl.load(residual_ptr + at)
    dtype = out_ptr.dtype.element_ty
    everywhere = tl.full([BLOCK], 1, tl.int1)
    total = residual + sum_of_ranks(
        x.to(dtype), at, everywhere, boxes_ptr, epochs_ptr, stop_ptr, slot, rank, SIZE, RANKS, WORD
    )
    tl.store(total_ptr + at, total)
    tl.store(out_ptr + at, (total * gain).to(dtype))
    tl.store(squares_ptr + block * rows + row, tl.sum(total * total, axis=0))


@triton.jit(do_not_specialize=PER_RANK)
def best_kernel(
    score_ptr,
    token_ptr,
    out_ptr,
    boxes_ptr,
    epochs_ptr,
    stop_ptr,
    rows,
    slot,
    rank,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Rows ``program_id(0)`` * BLOCK and on: the token of the best score of all ranks.

    Of equal scores the lowest token wins. A slot holds scores in front and tokens behind.
    """
    program = tl.program_id(0)
    row = program * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    score = tl.load(score_ptr + row, mask=mask, other=0.0)
    token = tl.load(token_ptr + row, mask=mask, other=0)
    epoch = tl.load(epochs_ptr + program).to(tl.uint32, bitcast=True) + 1
    half = (epoch & 1).to(tl.int32)
    high = score.to(tl.uint32, bitcast=True)
    low = token.to(tl.uint32)
    behind = slot // 2 + row
    send(high, row, mask, boxes_ptr, half, slot, epoch, rank, SIZE, tl.uint64)
    send(low, behind, mask, boxes_ptr, half, slot, epoch, rank, SIZE, tl.uint64)
    scores = receive(
        high, row, mask, boxes_ptr, half, slot, epoch, rank, stop_ptr, SIZE, RANKS, tl.uint64
    )
    tokens = receive(
        low, behind, mask, boxes_ptr, half, slot, epoch, rank, stop_ptr, SIZE, RANKS, tl.uint64
    )
    tl.store(epochs_ptr + program, epoch.to(tl.int32, bitcast=True))
    there = tl.arange(0, RANKS)[:, None] < SIZE
    scores = tl.where(there, scores.to(tl.uint32).to(tl.float32, bitcast=True), float("-inf"))
    wins = there & (scores == tl.max(scores, axis=0)[None, :])
    lowest = tl.min(tl.where(wins, tokens.to(tl.uint32).to(tl.int32, bitcast=True), 2147483647), 0)
    tl.store(out_ptr + row, lowest.to(tl.int64), mask=mask)


def word_of(dtype: torch.dtype) -> tl.dtype:
    """The word that carries a number of ``dtype``, in its lower half."""
    return tl.uint64 if dtype.itemsize == 4 else tl.uint32
