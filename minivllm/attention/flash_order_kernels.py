"""The order in which a persistent grid takes the blocks of a ragged batch: longest way first.

A sequence of 20 tokens among others of 20,000 has one block of query rows where they have 157, so a
grid that allows every sequence as many as the longest would mostly find nothing to do.
"""

from __future__ import annotations

import triton
import triton.language as tl


# One kernel for all batches, and for those whose first sequences are left out.
@triton.jit(
    do_not_specialize=["batch"],
    do_not_specialize_on_alignment=["cu_query_lens_ptr", "context_lens_ptr"],
)
def order_blocks_kernel(
    order_ptr,
    cu_query_lens_ptr,
    context_lens_ptr,
    batch,
    M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Write (sequence, block) of all blocks of M query rows, those with the most keys first.

    One program finds the place of one block, by counting the blocks in front of it, those of
    BLOCK_B sequences at a time. The number of blocks goes first: order [1 + blocks, 2] int32. The
    grid is (most blocks, sequences).
    """
    block = tl.program_id(0)
    seq = tl.program_id(1)
    begin = tl.load(cu_query_lens_ptr + seq)
    query_len = tl.load(cu_query_lens_ptr + seq + 1) - begin
    # Blocks of keys that the sequence's first block visits; each later one visits one more.
    key = block
    if PAGED:
        key += (tl.load(context_lens_ptr + seq) - query_len) // M
    total = 0
    place = 1
    for first in tl.range(0, batch, BLOCK_B):
        seqs = first + tl.arange(0, BLOCK_B)
        inside = seqs < batch
        begins = tl.load(cu_query_lens_ptr + seqs, mask=inside, other=0)
        query_lens = tl.load(cu_query_lens_ptr + seqs + 1, mask=inside, other=0) - begins
        blocks = tl.cdiv(query_lens, M)
        keys = tl.zeros_like(blocks)
        if PAGED:
            lengths = tl.load(context_lens_ptr + seqs, mask=inside, other=0)
            keys = (lengths - query_lens) // M
        longer = tl.minimum(tl.maximum(keys + blocks - 1 - key, 0), blocks)
        equal = (keys <= key) & (key < keys + blocks) & (seqs < seq)
        place += tl.sum(longer + equal.to(tl.int32), axis=0)
        total += tl.sum(blocks, axis=0)
    if (block == 0) & (seq == 0):
        tl.store(order_ptr, total)
    if block * M < query_len:
        tl.store(order_ptr + 2 * place, seq)
        tl.store(order_ptr + 2 * place + 1, block)
