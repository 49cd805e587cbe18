"""Attention in tiles with an online softmax, in plain PyTorch.

Naive attention writes a whole score matrix, L x L numbers for each head. This form
looks at `tile` keys at a time and keeps three running values for each query row
instead:

    row_max  the largest score seen so far
    row_sum  the sum of exp(score - row_max) over the keys seen so far
    acc      the sum of exp(score - row_max) * value over the keys seen so far

When a tile brings a larger maximum, what was summed before is too large by a known
factor, exp(new maximum - old maximum), and is scaled down. After the last tile
acc / row_sum is exactly softmax(scores) @ values, whatever the tile size.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018);
Dao et al., "FlashAttention" (2022). The Triton form is in `flash_kernels.py`; this one
is its twin: the oracle of its tests, and the path on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from minivllm.attention.flash_checks import DTYPES, check_flash_inputs


def online_softmax_step(
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    acc: torch.Tensor,
    scores: torch.Tensor,
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take one tile of n keys into the running softmax of M query rows.

    Args:
        row_max: [..., M] largest score of each query row so far, -inf at the start.
        row_sum: [..., M] sum of exp(score - row_max), 0 at the start.
        acc: [..., M, D] sum of exp(score - row_max) * value, 0 at the start.
        scores: [..., M, n] scaled scores of this tile, -inf where a query may not look.
        values: [..., n, D] values of this tile.

    Returns:
        The three running values after this tile, as new tensors. Every row must have seen
        at least one finite score by then: -inf - (-inf) would be NaN.
    """
    new_max = torch.maximum(row_max, scores.amax(dim=-1))
    shrink = torch.exp(row_max - new_max)
    weights = torch.exp(scores - new_max.unsqueeze(-1))
    row_sum = row_sum * shrink + weights.sum(dim=-1)
    acc = acc * shrink.unsqueeze(-1) + weights @ values
    return new_max, row_sum, acc


def attend_in_tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, tile: int
) -> torch.Tensor:
    """Causal attention of one block of queries, `tile` keys at a time.

    Args:
        q: [M, H, D] queries; they stand at the last M of the L positions.
        k: [L, G, D] keys, L >= M and H a multiple of G.
        v: [L, G, D] values.
        scale: factor on the scores, usually D ** -0.5.
        tile: keys a step; the result does not depend on it, the memory does.

    Returns:
        [M, H, D] in q's dtype. The arithmetic runs in float32 or wider.
    """
    num_queries, num_heads, head_size = q.shape
    length, num_kv_heads = k.shape[:2]
    group = num_heads // num_kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    # [G, group, M, D]: the query heads of one group share their keys and values.
    queries = q.to(wide).unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
    positions = torch.arange(length - num_queries, length, device=q.device)

    row_max = queries.new_full(queries.shape[:3], float("-inf"))
    row_sum = torch.zeros_like(row_max)
    acc = torch.zeros_like(queries)
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        keys = k[start:stop].to(wide).permute(1, 2, 0).unsqueeze(1)  # [G, 1, D, n]
        values = v[start:stop].to(wide).transpose(0, 1).unsqueeze(1)  # [G, 1, n, D]
        hidden = torch.arange(start, stop, device=q.device) > positions.unsqueeze(1)  # [M, n]
        scores = (queries @ keys * scale).masked_fill(hidden, float("-inf"))
        # Key 0 is in the first tile and visible to every query: no row stays empty.
        row_max, row_sum, acc = online_softmax_step(row_max, row_sum, acc, scores, values)
    out = acc / row_sum.unsqueeze(-1)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_size).to(q.dtype)


def attend_in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, tile: int
) -> torch.Tensor:
    """Causal attention of one sequence, `tile` queries and `tile` keys at a time.

    A block of queries meets the keys up to its own last position; what lies behind is hidden from
    all of it, and is not touched. The arguments are those of :func:`attend_in_tiles`: q [M, H, D]
    at the last M of the L positions, k and v [L, G, D]. Returns [M, H, D] in q's dtype.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    context = len(k) - len(q)  # tokens before the first query: from a cache, or none
    for first in range(0, len(q), tile):
        last = min(first + tile, len(q))
        seen = context + last
        out[first:last] = attend_in_tiles(q[first:last], k[:seen], v[:seen], scale=scale, tile=tile)
    return out


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    max_seqlen: int,
    tile: int = 128,
) -> torch.Tensor:
    """Causal self-attention of a flattened batch in O(T) memory, in PyTorch.

    Args:
        q: [T, H, D] queries of all sequences, one after the other.
        k: [T, G, D] keys, H a multiple of G.
        v: [T, G, D] values.
        cu_seqlens: [B + 1] int32, where each sequence begins, and T at the end.
        scale: positive factor on the scores.
        max_seqlen: length of the longest sequence (the kernel sizes its grid by it).
        tile: rows of queries and keys in a step.

    Returns:
        [T, H, D], contiguous, in q's dtype.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    # float64 too: what the kernels are checked against is computed here.
    dtypes = (*DTYPES, torch.float64)
    check_flash_inputs(q, k, v, cu_seqlens, scale, max_seqlen, dtypes)
    if tile < 1:
        raise ValueError(f"tile={tile} must be at least 1")
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for begin, end in pairwise(cu_seqlens.tolist()):
        rows = slice(begin, end)
        out[rows] = attend_in_blocks(q[rows], k[rows], v[rows], scale=scale, tile=tile)
    return out


class FlashAttention:
    """``attend`` for sequences laid end to end, without a score matrix and without a cache.

    cu_seqlens: the boundaries, [0, end of the first, end of the second, ...], B + 1 numbers.
    scale: what the scores are multiplied by, D ** -0.5.
    form: :func:`flash_attention`, or that of ``flash_kernels.py``.
    """

    def __init__(
        self,
        cu_seqlens: Sequence[int],
        scale: float,
        *,
        form: Callable[..., torch.Tensor] = flash_attention,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
        self.max_seqlen = max((end - begin for begin, end in pairwise(cu_seqlens)), default=0)
        self.scale = scale
        self.form = form

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q: [T, H, D]; k, v: [T, G, D]. No token sees another sequence's. Returns [T, H, D]."""
        return self.form(q, k, v, self.cu_seqlens, scale=self.scale, max_seqlen=self.max_seqlen)
