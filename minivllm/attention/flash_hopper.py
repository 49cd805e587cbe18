"""When `flash_hopper_kernels.py` fits, and how it is launched. Importing this needs no Triton."""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any

import torch

BLOCK_M = 128  # query rows of a program
BLOCK_N = 128  # keys of a tile
STAGES = 2  # tiles of K, and of V, in shared memory
SEQUENCES_AT_A_TIME = 64  # that the kernel looks at which orders the blocks


def runs_on_hopper(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether this kernel is for such numbers, on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return dtype in (torch.float16, torch.bfloat16) and head_size in (64, 128)


def fits_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether this kernel can take q [T, H, D] and k, v [rows, G, D] on the device they are on."""
    if q.dim() != 3 or k.dim() < 3 or v.dim() < 3:
        return False
    if not runs_on_hopper(q.device, q.dtype, q.shape[-1]):
        return False
    # The copies want heads side by side, rows that begin at 16 bytes, and 32-bit row numbers.
    return all(
        x.stride(-2) == x.shape[-1]
        and x.stride(-3) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and x.numel() // x.shape[-1] < 2**31
        for x in (q, k, v)
    )


@cache
def _layout(box: int, head_size: int, dtype: torch.dtype) -> Any:
    """How ``box`` rows lie in shared memory; working that out takes longer than a launch."""
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([box, head_size], element)


def _descriptor(rows: torch.Tensor, box: int) -> Any:
    """What the copy engine knows of rows [T, heads, D]: it moves ``box`` rows of one head."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    num_rows, num_heads, head_size = rows.shape
    return TensorDescriptor(
        rows,
        [num_rows, num_heads * head_size],
        [rows.stride(0), 1],
        [box, head_size],
        _layout(box, head_size, rows.dtype),
    )


def order_blocks(
    cu_query_lens: torch.Tensor,
    num_tokens: int,
    max_query_len: int,
    context_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """All blocks of query rows of a batch, those with the most keys to visit first.

    cu_query_lens: [B + 1] int32; num_tokens: the rows of q; max_query_len: the most queries of one
    sequence; context_lens: [B] int32, where keys are in pages. Returns int32 [1 + blocks, 2]: how
    many there are, and then (sequence, block) of each. One list serves all layers of a step.
    """
    from minivllm.attention.flash_order_kernels import order_blocks_kernel

    batch = len(cu_query_lens) - 1
    paged = context_lens is not None
    at_most = num_tokens // BLOCK_M + batch
    # Zeros: a list that nobody has filled says that there is nothing to do.
    order = torch.zeros(1 + at_most, 2, dtype=torch.int32, device=cu_query_lens.device)
    order_blocks_kernel[(-(-max_query_len // BLOCK_M), batch)](
        order,
        cu_query_lens,
        context_lens if paged else cu_query_lens,
        batch,
        M=BLOCK_M,
        BLOCK_B=SEQUENCES_AT_A_TIME,
        PAGED=paged,
        num_warps=1,
    )
    return order


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def attend_on_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_query_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    block_tables: torch.Tensor | None = None,
    context_lens: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> None:
    """Causal attention of a flattened batch, written to ``out``; arguments are checked already.

    Args:
        q: [T, H, D] queries.
        k: [T, G, D] keys; or, with block_tables, the cache [N, S, G, D].
        v: like k.
        cu_query_lens: [B + 1] int32, where each sequence's queries begin.
        out: [T, H, D], contiguous.
        scale: factor on the scores.
        max_query_len: the most queries of one sequence.
        block_tables: [B, max_blocks] int32, or None for contiguous keys.
        context_lens: [B] int32 with block_tables.
        order: what :func:`order_blocks` gives for all this; made here, if it is needed, when None.
    """
    from minivllm.attention.flash_hopper_kernels import flash_hopper_kernel

    num_tokens, num_heads, head_size = q.shape
    paged = block_tables is not None
    batch = len(cu_query_lens) - 1
    block_size = k.shape[1] if paged else BLOCK_N
    box = min(block_size, BLOCK_N)
    k, v = (x.view(-1, *x.shape[2:]) if paged else x for x in (k, v))
    # All blocks of all sequences as if they were equally long; where that would be far too many,
    # a first kernel lists those that exist.
    entries = -(-max_query_len // BLOCK_M) * batch
    if order is None and entries > 2 * (num_tokens // BLOCK_M + batch):
        order = order_blocks(cu_query_lens, num_tokens, max_query_len, context_lens)
    if order is not None:
        entries = len(order) - 1
    flash_hopper_kernel[(min(_processors(q.device), entries * num_heads),)](
        _descriptor(q, BLOCK_M // 2),
        _descriptor(k, box),
        _descriptor(v, box),
        _descriptor(out, BLOCK_M // 2),
        out,
        cu_query_lens,
        context_lens if paged else cu_query_lens,
        block_tables if paged else cu_query_lens,
        block_tables.stride(0) if paged else 0,
        cu_query_lens if order is None else order,
        batch,
        entries,
        scale * math.log2(math.e),
        H=num_heads,
        GROUP=num_heads // k.shape[1],
        S=block_size,
        D=head_size,
        N=BLOCK_N,
        BOX=box,
        STAGES=STAGES,
        PAGED=paged,
        ORDERED=order is not None,
        num_warps=4,
    )
