"""What the paged attention functions demand of their arguments, checked before any launch.

With MINIVLLM_DEBUG=1 in the environment the numbers inside the tables are checked too. That
copies them to the host and waits for the GPU, so it is off otherwise and costs nothing then.
"""

from __future__ import annotations

import os

import torch

from minivllm.attention.flash_checks import check_heads, check_index, check_scale

DEBUG = os.environ.get("MINIVLLM_DEBUG") == "1"


def check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise ValueError unless k_cache and v_cache are contiguous [N, S, G, D] of one shape."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)}; give [blocks, tokens, heads, size]"
            )
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous, its strides are {cache.stride()}")
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)} but v_cache {tuple(v_cache.shape)}; "
            "they must be equal"
        )
    tokens = k_cache.shape[1]
    if tokens < 1 or tokens & (tokens - 1):
        raise ValueError(f"a block of {tokens} tokens in k_cache; use a power of two")


def check_store_inputs(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Raise ValueError unless the arguments of ``store_kv`` fit together.

    k, v: [T, G, D]; k_cache, v_cache: [N, S, G, D]; slot_mapping: [T] int64.
    """
    check_cache(k_cache, v_cache)
    if k.dim() != 3 or k.shape[1:] != k_cache.shape[2:]:
        raise ValueError(
            f"k has shape {tuple(k.shape)} but k_cache holds [heads, size] "
            f"{tuple(k_cache.shape[2:])}; give [tokens, heads, size] with the same"
        )
    check_heads(k, k, v)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dtype != k.dtype or tensor.device != k.device:
            raise ValueError(
                f"k is {k.dtype} on {k.device} but {name} is {tensor.dtype} on {tensor.device}"
            )
    if slot_mapping.dtype != torch.int64 or slot_mapping.shape != k.shape[:1]:
        raise ValueError(
            f"slot_mapping is {slot_mapping.dtype} {tuple(slot_mapping.shape)} but must be "
            f"int64 [{len(k)}], one slot for each token of k"
        )
    if slot_mapping.device != k.device:
        raise ValueError(f"slot_mapping is on {slot_mapping.device} but k on {k.device}")
    if not slot_mapping.is_contiguous():
        raise ValueError("slot_mapping is strided; call slot_mapping.contiguous()")
    if DEBUG and not _capturing(k):
        num_slots = k_cache.shape[0] * k_cache.shape[1]
        bad = (slot_mapping < -1) | (slot_mapping >= num_slots)
        if bad.any():
            token = int(bad.nonzero()[0])
            raise ValueError(
                f"slot_mapping[{token}] = {int(slot_mapping[token])} lies outside the "
                f"{num_slots} slots of the cache"
            )


def check_paged_inputs(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    cu_query_lens: torch.Tensor | None = None,
    max_query_len: int = 1,
) -> None:
    """Raise ValueError unless queries, cache and tables fit together.

    q: [T, H, D], or [B, H, D] for decode, where ``cu_query_lens`` is None; k_cache, v_cache:
    [N, S, G, D]; block_tables: [B, max_blocks] int32; context_lens: [B] int32; cu_query_lens:
    [B + 1] int32.
    """
    check_cache(k_cache, v_cache)
    if q.dim() != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}; give [tokens, heads, size]")
    check_heads(q, k_cache, v_cache)
    check_scale(scale)
    batch = block_tables.shape[0]
    check_index("block_tables", block_tables, (None, None), q)
    check_index("context_lens", context_lens, (batch,), q)
    if cu_query_lens is None:
        if len(q) != batch:
            raise ValueError(
                f"q has {len(q)} rows but block_tables {batch}; decode takes one for each sequence"
            )
    else:
        check_index("cu_query_lens", cu_query_lens, (batch + 1,), q)
        if not 0 <= max_query_len <= len(q):
            raise ValueError(
                f"max_query_len={max_query_len} is outside 0 to the {len(q)} rows of q"
            )
    if DEBUG and not _capturing(q):
        _check_tables(k_cache, block_tables, context_lens, cu_query_lens, max_query_len, len(q))


def check_plan_inputs(
    block_tables: torch.Tensor, context_lens: torch.Tensor, block_size: int, like: torch.Tensor
) -> None:
    """Raise ValueError unless both are int32, of one batch, and on the device of ``like``.

    block_tables: [B, max_blocks]; context_lens: [B]. In debug mode: no sequence is longer than its
    table.
    """
    check_index("block_tables", block_tables, (None, None), like)
    check_index("context_lens", context_lens, (len(block_tables),), like)
    if DEBUG and not _capturing(block_tables):
        _check_lengths(block_tables, context_lens, block_size)


def _check_lengths(block_tables: torch.Tensor, context_lens: torch.Tensor, block_size: int) -> None:
    for seq, length in enumerate(context_lens.tolist()):
        used = -(-length // block_size)
        if not 0 <= used <= block_tables.shape[1]:
            raise ValueError(
                f"context_lens[{seq}] = {length} needs {used} blocks of {block_size} tokens but "
                f"block_tables has room for {block_tables.shape[1]}"
            )


def _capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, when nothing may be read back."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_tables(
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_query_lens: torch.Tensor | None,
    max_query_len: int,
    num_rows: int,
) -> None:
    """Read the tables back and raise ValueError for the first entry that leads outside."""
    num_blocks, tokens = k_cache.shape[:2]
    _check_lengths(block_tables, context_lens, tokens)
    for seq, length in enumerate(context_lens.tolist()):
        used = -(-length // tokens)
        for index, block in enumerate(block_tables[seq, :used].tolist()):
            if not 0 <= block < num_blocks:
                raise ValueError(
                    f"block_tables[{seq}, {index}] = {block} lies outside the {num_blocks} "
                    "blocks of the cache"
                )
    if cu_query_lens is None:
        return
    bounds = cu_query_lens.tolist()
    if bounds[0] < 0 or bounds[-1] > num_rows:
        raise ValueError(
            f"cu_query_lens runs from {bounds[0]} to {bounds[-1]} but q has {num_rows} rows"
        )
    for seq, length in enumerate(context_lens.tolist()):
        queries = bounds[seq + 1] - bounds[seq]
        if not 0 <= queries <= min(max_query_len, length):
            raise ValueError(
                f"sequence {seq} has {queries} queries; they must lie within its {length} tokens "
                f"of context and max_query_len={max_query_len}"
            )
