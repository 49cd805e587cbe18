"""Attention over pages in our own Triton kernels: what an engine calls.

    store_kv         new keys and values into their slots
    paged_prefill    many queries of a sequence: a prompt, a chunk of one, what a prefix cache left
    paged_decode     one query of each of many sequences
    paged_attention  both in one batch

Each picks the fastest kernel that fits. The forms to read first are in `paged_store_kernels.py` and
`paged_simple_kernels.py`; `paged_split_kernels.py` and `flash_hopper_kernels.py` refine them. The
same in PyTorch: `paged.py` and `paged_torch.py`.
"""

from __future__ import annotations

import torch

from minivllm.attention.flash_checks import check_out
from minivllm.attention.flash_hopper import attend_on_hopper, fits_hopper, order_blocks
from minivllm.attention.paged_checks import check_paged_inputs
from minivllm.attention.paged_plan_kernels import PagedDecodePlan
from minivllm.attention.paged_simple_kernels import paged_decode_whole, paged_prefill_tiled
from minivllm.attention.paged_split_kernels import paged_decode
from minivllm.attention.paged_store_kernels import store_kv

__all__ = [
    "PagedDecodePlan",
    "paged_attention",
    "paged_decode",
    "paged_decode_whole",
    "paged_prefill",
    "paged_prefill_tiled",
    "prefill_order",
    "store_kv",
]

SMALLEST_BOX = 16  # rows that the copy engine moves at once; smaller blocks are left to others


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    order: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of each sequence over all its tokens in the cache.

    Args:
        q: [T, H, D] queries of all sequences, one after the other; their keys and values are in
            the cache already. Query i of sequence b stands at position
            context_lens[b] - query_len[b] + i.
        k_cache: [N, S, G, D], H a multiple of G, S a power of two.
        v_cache: [N, S, G, D].
        block_tables: [B, max_blocks] int32; entries past a sequence's last block are not read.
        cu_query_lens: [B + 1] int32, the rows of q where the queries of each sequence begin, and
            where the last ones end. Rows of q outside are left alone.
        context_lens: [B] int32 tokens of each sequence, these queries included.
        scale: positive factor on the scores, usually D ** -0.5.
        max_query_len: the most queries of one sequence; it sizes the grid.
        order: what :func:`prefill_order` gave for these sequences; without it some of that is done
            anew in each layer.
        out: [T, H, D] to write into; a new tensor when None.

    Returns:
        [T, H, D], contiguous, in q's dtype.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    if not _fits_hopper(q, k_cache, v_cache):
        return paged_prefill_tiled(
            q,
            k_cache,
            v_cache,
            block_tables,
            cu_query_lens,
            context_lens,
            scale=scale,
            max_query_len=max_query_len,
            out=out,
        )
    check_paged_inputs(
        q, k_cache, v_cache, block_tables, context_lens, scale, cu_query_lens, max_query_len
    )
    out = check_out(out, q)
    if max_query_len > 0 and len(context_lens) > 0:
        attend_on_hopper(
            q,
            k_cache,
            v_cache,
            cu_query_lens,
            out,
            scale=scale,
            max_query_len=max_query_len,
            block_tables=block_tables,
            context_lens=context_lens,
            order=order,
        )
    return out


def prefill_order(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_query_lens: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    max_query_len: int,
) -> torch.Tensor | None:
    """What :func:`paged_prefill` of these needs to know once a step, for all layers alike.

    Arguments as there. None where its kernel needs nothing of the sort.
    """
    if max_query_len < 1 or not len(context_lens) or not _fits_hopper(q, k_cache, v_cache):
        return None
    return order_blocks(cu_query_lens, len(q), max_query_len, context_lens)


def _fits_hopper(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    return (
        k_cache.dim() == 4 and k_cache.shape[1] >= SMALLEST_BOX and fits_hopper(q, k_cache, v_cache)
    )


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    num_decodes: int = 0,
    plan: PagedDecodePlan | None = None,
    order: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a mixed batch: decode tokens first, then prompts and chunks of prompts.

    Args:
        q: [T, H, D]; the first num_decodes rows are one query each of the first num_decodes
            sequences, the others belong to the sequences after them.
        k_cache, v_cache, block_tables, cu_query_lens, context_lens, scale, max_query_len, out: see
            :func:`paged_prefill`, over all sequences.
        num_decodes: sequences at the front that have one query. Any of them may as well be treated
            as prompts of one token (0, the default), which is slower.
        plan: for the decode part, prepared for block_tables[:num_decodes] and
            context_lens[:num_decodes]; see :func:`paged_decode`.
        order: for the rest, likewise; see :func:`prefill_order`.

    Returns:
        [T, H, D], contiguous, in q's dtype.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    batch = len(block_tables)
    if not 0 <= num_decodes <= min(batch, len(q)):
        raise ValueError(
            f"num_decodes={num_decodes} is outside 0 to {min(batch, len(q))}, the sequences of "
            "block_tables and the rows of q"
        )
    out = check_out(out, q)
    if num_decodes > 0:
        paged_decode(
            q[:num_decodes],
            k_cache,
            v_cache,
            block_tables[:num_decodes],
            context_lens[:num_decodes],
            scale=scale,
            plan=plan,
            out=out[:num_decodes],
        )
    if num_decodes < batch:
        paged_prefill(
            q,
            k_cache,
            v_cache,
            block_tables[num_decodes:],
            cu_query_lens[num_decodes:],
            context_lens[num_decodes:],
            scale=scale,
            max_query_len=max_query_len,
            order=order,
            out=out,
        )
    return out
