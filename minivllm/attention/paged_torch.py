"""Attention on pages in vectorised PyTorch: the engine's path wherever there is no Triton kernel.

Decode rows and prompts want different shapes, so a step's queries are sorted into groups once, and
every layer then runs a few large operations a group:

    decode   all rows together; each block is one entry of a batched product, and blocks that many
             rows share at their beginning are read once for all of them (Juravsky et al. 2024,
             "Hydragen"; the same idea is called cascade attention in vLLM)
    prefill  prompts of like length together, K and V gathered, then PyTorch's fused attention
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from minivllm.attention.paged import PagedBatch, PagedKVCache, store_kv
from minivllm.models.qwen3 import Attend

# No more than this many mask elements at once (64 MiB of bool): long prompts go in pieces.
MAX_MASK_ELEMENTS = 1 << 26

# A shared prefix is treated apart if that spares the gathering of so many tokens.
MIN_TOKENS_SPARED = 256


class Piece(NamedTuple):
    """Some consecutive queries of one sequence.

    row: the sequence's place in the batch; first: its first query's row in the flattened batch;
    count: how many queries; position: where in its sequence the first one stands.
    """

    row: int
    first: int
    count: int
    position: int

    @property
    def context(self) -> int:
        """How many keys the last of them sees."""
        return self.position + self.count


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

    def __init__(self, cache: PagedKVCache, batch: PagedBatch, scale: float) -> None:
        self.cache = cache
        self.batch = batch
        self.scale = scale
        self.groups = _make_groups(batch, cache.block_size)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q: [T, H, D]; k, v: [T, G, D]. Stores k and v, then attends. Returns [T, H, D]."""
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        store_kv(k, v, k_cache, v_cache, self.batch.slot_mapping)
        out = torch.empty_like(q)
        for group in self.groups:
            out[group.tokens] = group.attend(q[group.tokens], k_cache, v_cache, self.scale)
        return out


def bind_torch_attention(cache: PagedKVCache, batch: PagedBatch, scale: float) -> Attend:
    """The PyTorch path as a backend: one ``attend`` for one step."""
    return TorchPagedAttention(cache, batch, scale)


class PrefillGroup:
    """b pieces with about equally many queries, padded to one rectangle of Q queries.

    Padding repeats a piece's last query, and so writes the same result once more.
    """

    def __init__(self, pieces: Sequence[Piece], tables: torch.Tensor, block_size: int) -> None:
        device = tables.device
        rows, firsts, counts, positions = torch.tensor(pieces, device=device).unbind(1)
        step = torch.arange(max(piece.count for piece in pieces), device=device)
        step = step.minimum(counts[:, None] - 1)
        num_blocks = -(-max(piece.context for piece in pieces) // block_size)
        key = torch.arange(num_blocks * block_size, device=device)
        self.shape = step.shape
        self.tokens = (firsts[:, None] + step).flatten()
        # Past a table's end any block will do: the mask hides its tokens.
        self.blocks = tables[rows, :num_blocks].clamp(min=0).flatten()
        # [b, 1, Q, keys]: which key each query sees.
        self.mask = key <= (positions[:, None] + step)[:, None, :, None]

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q: [b * Q, H, D] -> [b * Q, H, D]."""
        num_heads, head_size = q.shape[1:]
        # [b, keys, G, D], then heads before tokens.
        gathered = (self.shape[0], -1, k_cache.shape[2], head_size)
        out = F.scaled_dot_product_attention(
            q.unflatten(0, self.shape).transpose(1, 2),
            k_cache.index_select(0, self.blocks).view(gathered).transpose(1, 2),
            v_cache.index_select(0, self.blocks).view(gathered).transpose(1, 2),
            attn_mask=self.mask,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(-1, num_heads, head_size)


class SharedPrefix(NamedTuple):
    """Rows ``start`` to ``end`` of a decode group begin with the same ``blocks`` int64 [m]."""

    start: int
    end: int
    blocks: torch.Tensor


class DecodeGroup:
    """b sequences with one query each; R = H / G query heads share each key head.

    A row's blocks are those of a prefix that it shares with its neighbours, if any, and m of its
    own (padded). Scores for both stand side by side, so that one softmax covers the whole context:

        row 0   [ shared prefix A ......... | own blocks .......... ]
        row 1   [ shared prefix A ......... | own blocks ..... pad  ]
        row 2   [ shared prefix B ..... pad | own blocks .......... ]
    """

    def __init__(self, pieces: Sequence[Piece], tables: torch.Tensor, block_size: int) -> None:
        device = tables.device
        host_tables = tables.tolist()
        order: list[Piece] = []
        skipped: list[int] = []
        self.prefixes: list[SharedPrefix] = []
        for cluster, num_shared in _clusters(pieces, host_tables, block_size):
            if num_shared:
                start, end = len(order), len(order) + len(cluster)
                blocks = tables[cluster[0].row, :num_shared]
                self.prefixes.append(SharedPrefix(start, end, blocks))
            order += cluster
            skipped += [num_shared] * len(cluster)
        self.num_rows = len(order)
        self.tokens = torch.tensor([piece.first for piece in order], device=device)
        own = [
            host_tables[piece.row][skip : -(-piece.context // block_size)]
            for piece, skip in zip(order, skipped, strict=True)
        ]
        most = max(map(len, own))
        padded = [blocks + [0] * (most - len(blocks)) for blocks in own]
        self.own_blocks = torch.tensor(padded, device=device).flatten()
        left = [p.context - skip * block_size for p, skip in zip(order, skipped, strict=True)]
        key = torch.arange(most * block_size, device=device)
        # [b, 1, 1, own keys]
        self.hidden = (key >= torch.tensor(left, device=device)[:, None])[:, None, None]
        self.prefix_len = block_size * max([len(p.blocks) for p in self.prefixes], default=0)

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q: [b, H, D] -> [b, H, D]."""
        num_heads, head_size = q.shape[1:]
        block_size, num_kv_heads = k_cache.shape[1:3]
        group = num_heads // num_kv_heads
        queries = (q * scale).view(self.num_rows, num_kv_heads, group, head_size)
        # One product for each (row, block, key head): [b * m * G, R, D] x [b * m * G, D, S].
        per_block = (self.num_rows, -1, num_kv_heads, group, head_size)
        each = queries[:, None].expand(-1, len(self.own_blocks) // self.num_rows, -1, -1, -1)
        keys = k_cache.transpose(1, 2).index_select(0, self.own_blocks).flatten(0, 1)
        values = v_cache.transpose(1, 2).index_select(0, self.own_blocks).flatten(0, 1)
        own = torch.bmm(each.reshape(-1, group, head_size), keys.transpose(1, 2))
        own = own.view(*per_block[:-1], block_size).permute(0, 2, 3, 1, 4).flatten(3)
        own = own.masked_fill(self.hidden, float("-inf"))
        if self.prefixes:
            shared = own.new_full((*own.shape[:3], self.prefix_len), float("-inf"))
            for prefix in self.prefixes:
                self._score_prefix(prefix, queries, k_cache, shared)
            own = torch.cat((shared, own), dim=-1)
        # In float32, as the kernels do: bfloat16 sums of many small weights lose their tail.
        weights = own.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        own_weights = weights[..., self.prefix_len :].unflatten(3, (-1, block_size))
        own_weights = own_weights.permute(0, 3, 1, 2, 4).reshape(-1, group, block_size)
        out = torch.bmm(own_weights, values).view(per_block).sum(dim=1)
        for prefix in self.prefixes:
            self._add_prefix(prefix, weights, v_cache, out)
        return out.view(-1, num_heads, head_size)

    @staticmethod
    def _score_prefix(
        prefix: SharedPrefix, queries: torch.Tensor, k_cache: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """All rows of a prefix against its keys, read once: scores [b, G, R, keys] are filled."""
        keys = k_cache.index_select(0, prefix.blocks).flatten(0, 1).permute(1, 2, 0)
        rows = queries[prefix.start : prefix.end].transpose(0, 1)
        result = torch.bmm(rows.flatten(1, 2), keys)
        place = scores[prefix.start : prefix.end, :, :, : keys.shape[-1]]
        place.copy_(result.view(*rows.shape[:3], -1).transpose(0, 1))

    @staticmethod
    def _add_prefix(
        prefix: SharedPrefix, weights: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor
    ) -> None:
        """The prefix's part of the weighted values, added to out [b, G, R, D]."""
        values = v_cache.index_select(0, prefix.blocks).flatten(0, 1).transpose(0, 1)
        rows = weights[prefix.start : prefix.end, :, :, : values.shape[1]].transpose(0, 1)
        result = torch.bmm(rows.flatten(1, 2), values)
        out[prefix.start : prefix.end] += result.view(*rows.shape[:3], -1).transpose(0, 1)


def _clusters(
    pieces: Sequence[Piece], tables: list[list[int]], block_size: int
) -> list[tuple[list[Piece], int]]:
    """Sort decode rows by what they share: (rows, number of blocks that all of them begin with)."""
    by_first_block: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_first_block.setdefault(tables[piece.row][0], []).append(piece)
    alone: list[Piece] = []
    clusters = []
    for cluster in by_first_block.values():
        # The newest token's own block is never shared, whatever the tables say.
        most = min((piece.context - 1) // block_size for piece in cluster)
        columns = zip(*(tables[piece.row][:most] for piece in cluster), strict=True)
        num_shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        if (len(cluster) - 1) * num_shared * block_size < MIN_TOKENS_SPARED:
            alone += cluster
        else:
            clusters.append((cluster, num_shared))
    return [*clusters, (alone, 0)] if alone else clusters


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
        # No mask larger than the limit; long contexts apart from short ones.
        pieces.sort(key=lambda piece: piece.context, reverse=True)
        while pieces:
            fit = max(1, (MAX_MASK_ELEMENTS >> exponent) // pieces[0].context)
            groups.append(kind(pieces[:fit], tables, block_size))
            pieces = pieces[fit:]
    return groups
