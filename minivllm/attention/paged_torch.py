"""Attention on pages in vectorised PyTorch: the engine's path wherever there is no Triton kernel.

Decode rows and prompts want different shapes, so a step's queries are sorted into groups once, and
every layer then runs a few large operations a group:

    decode   all rows together; each block is one entry of a batched product, and blocks that many
             rows share at their beginning are read once for all of them (``paged_torch_decode``)
    prefill  prompts of like length together, K and V gathered, then PyTorch's fused attention
             (``paged_torch_prefill``)
"""

from typing import Protocol

import torch

from minivllm.attention.paged import PagedBatch, PagedKVCache, store_kv
from minivllm.attention.paged_torch_decode import DecodeGroup
from minivllm.attention.paged_torch_prefill import Piece, PrefillGroup
from minivllm.models.qwen3 import Attend

# No more than this many mask elements at once (64 MiB of bool): long prompts go in pieces.
MAX_MASK_ELEMENTS = 1 << 26

# Nor more keys than this gathered at once (1 GiB with their values, for Qwen3-0.6B in float32):
# rows are padded to the longest, so one long context among many short ones would take many times
# what the whole pool takes.
MAX_GATHERED_KEYS = 1 << 17


class Group(Protocol):
    """Queries that are computed together; ``tokens`` int64 [n] are their rows in the batch."""

    tokens: torch.Tensor

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q: [n, H, D], in the order of ``tokens``. Returns [n, H, D] in the same order."""
        ...


class TorchPagedAttention:
    """``attend`` for one step; whatever does not depend on the layer is prepared here, once."""

    def __init__(
        self,
        cache: PagedKVCache,
        batch: PagedBatch,
        scale: float,
        groups: list[Group] | None = None,
    ) -> None:
        self.cache = cache
        self.batch = batch
        self.scale = scale
        self.groups = _make_groups(batch, cache.block_size) if groups is None else groups
        # One group of all queries as they stand: nothing has to be picked out and put back.
        count = len(batch.input_ids)
        whole = len(self.groups) == 1 and len(self.groups[0].tokens) == count
        self.whole = whole and self.groups[0].tokens.tolist() == list(range(count))

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q: [T, H, D]; k, v: [T, G, D]. Stores k and v, then attends. Returns [T, H, D]."""
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        store_kv(k, v, k_cache, v_cache, self.batch.slot_mapping)
        if self.whole:
            return self.groups[0].attend(q, k_cache, v_cache, self.scale)
        out = torch.empty_like(q)
        for group in self.groups:
            picked = q.index_select(0, group.tokens)
            out.index_copy_(0, group.tokens, group.attend(picked, k_cache, v_cache, self.scale))
        return out


class TorchAttention:
    """The PyTorch path as a backend: called once a step, it gives the step's ``attend``.

    While the same sequences decode and none of them begins a new block, only their lengths change
    from step to step; then the groups of the step before are good for this one too.
    """

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, list[int]] | None = None
        self._groups: list[DecodeGroup] = []

    def __call__(self, cache: PagedKVCache, batch: PagedBatch, scale: float) -> Attend:
        num_blocks = [-(-context // cache.block_size) for context in batch.context_lens]
        if max(batch.query_lens) > 1:
            self._last = None
            return TorchPagedAttention(cache, batch, scale)
        same = self._last is not None and self._last[1] == num_blocks
        if same and torch.equal(self._last[0], batch.block_tables):
            for group in self._groups:
                group.set_contexts(batch.context_lens)
        else:
            self._groups = _make_groups(batch, cache.block_size)
            # A copy: the tables may lie in memory that the next step fills anew.
            self._last = batch.block_tables.clone(), num_blocks
        return TorchPagedAttention(cache, batch, scale, self._groups)


def bind_torch_attention(cache: PagedKVCache, batch: PagedBatch, scale: float) -> Attend:
    """One ``attend`` for one step, which knows of no other step."""
    return TorchPagedAttention(cache, batch, scale)


def _make_groups(batch: PagedBatch, block_size: int) -> list[Group]:
    """Cut long queries into pieces, then group the pieces by like length."""
    buckets: dict[int, list[Piece]] = {}
    first = 0
    for row, (num_queries, context) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        most = max(1, MAX_MASK_ELEMENTS // context)
        for start in range(0, num_queries, most):
            count = min(most, num_queries - start)
            piece = Piece(row, first + start, count, context - num_queries + start)
            # Lengths up to the same power of two share a rectangle.
            buckets.setdefault((count - 1).bit_length(), []).append(piece)
        first += num_queries
    tables = batch.block_tables.long()
    groups: list[Group] = []
    for exponent, pieces in buckets.items():
        kind = DecodeGroup if exponent == 0 else PrefillGroup
        # No group larger than the limits; long contexts apart from short ones.
        pieces.sort(key=lambda piece: piece.context, reverse=True)
        while pieces:
            most_keys = min(MAX_MASK_ELEMENTS >> exponent, MAX_GATHERED_KEYS)
            fit = max(1, most_keys // pieces[0].context)
            groups.append(kind(pieces[:fit], tables, block_size))
            pieces = pieces[fit:]
    return groups
