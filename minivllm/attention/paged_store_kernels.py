"""Writing new keys and values into their pages, as a Triton kernel.

    token            0    1    2    3
    slot_mapping    14   15   -1   32      slot = block * S + row; -1 is padding
                     |    |         |
    cache (S = 16)  [block 0 .. 14 15] [block 1 ........] [block 2: 32 ..]

One program copies one token, so each finds its place alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.attention.paged_checks import check_store_inputs


@triton.jit
def store_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # G * D rounded up to a power of two
):
    """One program copies the keys and values of one token, all heads, to their slot.

    k, v: [T, G, D], tokens ``*_stride_t`` and heads ``*_stride_h`` numbers apart, the D numbers of
    a head side by side; k_cache, v_cache: [N, S, G, D], contiguous; slot_mapping: [T], -1 for
    padding, of which nothing is read or written. Token ``program_id(0)``.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot < 0:  # padding
        return
    at = tl.arange(0, BLOCK)
    head, dim = at // D, at % D
    mask = at < G * D
    k = tl.load(k_ptr + token * k_stride_t + head * k_stride_h + dim, mask=mask)
    v = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + dim, mask=mask)
    tl.store(k_cache_ptr + slot * (G * D) + at, k, mask=mask)
    tl.store(v_cache_ptr + slot * (G * D) + at, v, mask=mask)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write new keys and values into their slots of the cache.

    Args:
        k: [T, G, D] new keys; k and v may be views of a fused tensor.
        v: [T, G, D] new values.
        k_cache: [N, S, G, D], written in place.
        v_cache: [N, S, G, D], written in place.
        slot_mapping: [T] int64, block * S + row for each token; -1 is padding and is skipped.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    check_store_inputs(k, v, k_cache, v_cache, slot_mapping)
    num_tokens, num_kv_heads, head_size = k.shape
    if num_tokens == 0:
        return
    store_kv_kernel[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        *k.stride()[:2],
        *v.stride()[:2],
        G=num_kv_heads,
        D=head_size,
        BLOCK=triton.next_power_of_2(num_kv_heads * head_size),
    )
