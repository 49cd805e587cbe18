"""Attention on pages in vectorised PyTorch: the engine's path wherever there is no Triton kernel.

Decode rows and prompts want different shapes, so a step's queries are sorted into groups once, and
every layer then runs a few large operations a group:

    decode   all rows together; each block is one entry of a batched product, and blocks that many
             rows share at their beginning are read once for all of them (Juravsky et al. 2024,
             "Hydragen"; the same idea is called cascade attention in vLLM)
    prefill  prompts of like length together, K and V gathered, then PyTorch's fused attention
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from minivllm.attention.paged import PagedBatch, PagedKVCache, store_kv
from minivllm.models.qwen3 import Attend

# No more than this many mask elements at once (64 MiB of bool): long prompts go in pieces.
MAX_MASK_ELEMENTS = 1 << 26

# Nor more keys than this gathered at once (1 GiB with their values, for Qwen3-0.6B in float32):
# rows are padded to the longest, so one long context among many short ones would take many times
# what the whole pool takes.
MAX_GATHERED_KEYS = 1 << 17

# Shared blocks are treated apart if that spares reading so many tokens a second time.
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


class SharedBlocks(NamedTuple):
    """Rows ``start`` to ``end`` of a decode group have some blocks in common.

    column: which block of their tables is the first of these. place, count: where they lie among
    all shared blocks of the group.
    """

    start: int
    end: int
    column: int
    place: int
    count: int


class DecodeGroup:
    """b sequences with one query each; R = H / G query heads share each key head.

    Blocks that several rows share form a tree, as their prompts do; what is left of a row's table
    are up to m blocks of its own. All scores of a row stand side by side, under one softmax:

        row 0   [ shared by 0 to 3 | shared by 0 and 1 | own blocks ........ ]
        row 1   [ shared by 0 to 3 | shared by 0 and 1 | own blocks ... pad  ]
        row 2   [ shared by 0 to 3 | shared by 2 and 3 | own blocks ........ ]
        row 3   [ shared by 0 to 3 | shared by 2 and 3 | own blocks ... pad  ]

    Own blocks are the entries of one batched product: entry i is a block and the row that owns it.
    """

    def __init__(self, pieces: Sequence[Piece], tables: torch.Tensor, block_size: int) -> None:
        device = tables.device
        host_tables = tables.tolist()
        order, skipped, shared = _share(pieces, host_tables, block_size)
        self.shared: list[SharedBlocks] = []
        shared_blocks: list[int] = []
        for start, end, column, count in shared:
            self.shared.append(SharedBlocks(start, end, column, len(shared_blocks), count))
            shared_blocks += host_tables[order[start].row][column : column + count]
        self.shared_blocks = torch.tensor(shared_blocks, dtype=torch.int64, device=device)
        self.num_rows = len(order)
        self.rows = [piece.row for piece in order]
        self.skipped_tokens = [skip * block_size for skip in skipped]
        self.shared_len = block_size * max(skipped)
        own = [
            host_tables[piece.row][skip : -(-piece.context // block_size)]
            for piece, skip in zip(order, skipped, strict=True)
        ]
        # One block a row, as while many ask the same: then entry i is row i, and there is nothing
        # to sort.
        self.one_each = all(len(blocks) == 1 for blocks in own)
        if self.one_each:
            every = [blocks[0] for blocks in own]
            self.blocks, owner, entry = every, list(range(len(own))), [[i] for i in range(len(own))]
        else:
            self.blocks, owner, entry = _entries(own)
        most = max(map(len, own))
        entry_of_place = [[*row, *([0] * (most - len(row)))] for row in entry]
        self.key = torch.arange(most * block_size, device=device)

        def index(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, device=device)

        self.tokens = index([piece.first for piece in order])
        # [entries]: the row of each; nobody's blocks go to an extra row that is dropped.
        self.owner = index(owner)
        # Whose query an entry is multiplied with; for nobody's blocks, any.
        self.asker = self.owner.clamp(max=self.num_rows - 1)
        # [b * m]: the entry that holds each place of each row; padding points anywhere.
        self.entry_of_place = index([e for row in entry_of_place for e in row])
        place = dict.fromkeys(range(len(owner)), 0)
        for row, entries in enumerate(entry):
            place.update({e: row * most + column for column, e in enumerate(entries)})
        self.place_of_entry = index(list(place.values()))
        if not isinstance(self.blocks, slice):
            self.blocks = index(self.blocks)
        contexts = {piece.row: piece.context for piece in order}
        self._hide(contexts.__getitem__)

    def set_contexts(self, context_lens: Sequence[int]) -> None:
        """The same blocks with other lengths, those of all rows of the batch."""
        self._hide(context_lens.__getitem__)

    def _hide(self, context_of: Callable[[int], int]) -> None:
        pairs = zip(self.rows, self.skipped_tokens, strict=True)
        left = torch.tensor([context_of(row) - skip for row, skip in pairs], device=self.key.device)
        # [b, 1, 1, own keys]: what lies past a row's context.
        self.hidden = (self.key >= left[:, None])[:, None, None]

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q: [b, H, D] -> [b, H, D]."""
        num_heads, head_size = q.shape[1:]
        block_size, num_kv_heads = k_cache.shape[1:3]
        queries = (q * scale).view(self.num_rows, num_kv_heads, -1, head_size)
        if self.one_each:
            own = _per_head(queries, self._own(k_cache).mT)
        else:
            own = _per_head(queries.index_select(0, self.asker), self._own(k_cache).mT)
            own = own.index_select(0, self.entry_of_place).unflatten(0, (self.num_rows, -1))
            own = own.permute(0, 2, 3, 1, 4).flatten(3)
        own = own.masked_fill(self.hidden, float("-inf"))
        if self.shared:
            scores = own.new_full((*own.shape[:3], self.shared_len), float("-inf"))
            # [G, D, shared tokens] and [G, shared tokens, D]: each block once for all who share it.
            keys = k_cache.index_select(0, self.shared_blocks).flatten(0, 1).permute(1, 2, 0)
            values = v_cache.index_select(0, self.shared_blocks).flatten(0, 1).transpose(0, 1)
            for shared in self.shared:
                _score_shared(shared, queries, keys, scores, block_size)
            own = torch.cat((scores, own), dim=-1)
        # In float32, as the kernels do: bfloat16 sums of many small weights lose their tail.
        weights = own.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        own = weights[..., self.shared_len :]
        if self.one_each:
            out = _per_head(own, self._own(v_cache))
        else:
            own = own.unflatten(3, (-1, block_size)).permute(0, 3, 1, 2, 4).flatten(0, 1)
            own = own.index_select(0, self.place_of_entry)
            out = queries.new_zeros(self.num_rows + 1, *queries.shape[1:])
            out.index_add_(0, self.owner, _per_head(own, self._own(v_cache)))
            out = out[:-1]
        for shared in self.shared:
            _add_shared(shared, weights, values, out, block_size)
        return out.view(-1, num_heads, head_size)

    def _own(self, cache: torch.Tensor) -> torch.Tensor:
        """The rows' own blocks as [G, entries, S, D]: a view of the pool where that is possible."""
        blocks = self.blocks
        own = cache[blocks] if isinstance(blocks, slice) else cache.index_select(0, blocks)
        return own.permute(2, 0, 1, 3)


def _score_shared(
    shared: SharedBlocks,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scores: torch.Tensor,
    block_size: int,
) -> None:
    """Some rows against the keys that they share; fills their part of scores [b, G, R, keys]."""
    here = slice(shared.place * block_size, (shared.place + shared.count) * block_size)
    rows = queries[shared.start : shared.end].transpose(0, 1)
    result = torch.bmm(rows.flatten(1, 2), keys[..., here])
    first = shared.column * block_size
    into = scores[shared.start : shared.end, :, :, first : first + shared.count * block_size]
    into.copy_(result.view(*rows.shape[:3], -1).transpose(0, 1))


def _add_shared(
    shared: SharedBlocks,
    weights: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    block_size: int,
) -> None:
    """The part that the shared values have in the result, added to out [b, G, R, D]."""
    here = slice(shared.place * block_size, (shared.place + shared.count) * block_size)
    first = shared.column * block_size
    rows = weights[shared.start : shared.end, :, :, first : first + shared.count * block_size]
    rows = rows.transpose(0, 1)
    result = torch.bmm(rows.flatten(1, 2), values[:, here])
    out[shared.start : shared.end] += result.view(*rows.shape[:3], -1).transpose(0, 1)


def _per_head(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left: [entries, G, R, X]; right: [G, entries, X, Y]. Returns products [entries, G, R, Y].

    A product for each head reads its strided part of the blocks in place; one for all heads would
    first copy them.
    """
    products = [torch.bmm(left[:, head], blocks) for head, blocks in enumerate(right)]
    return torch.stack(products, dim=1)


def _entries(own: list[list[int]]) -> tuple[slice | list[int], list[int], list[list[int]]]:
    """Which blocks to multiply, in which order.

    own: each row's own blocks. Returns the blocks of all entries, each entry's row (one past the
    last for a block that nobody owns), and each row's entries. If the rows' blocks lie close
    together, the entries are a whole slice of the pool, and nothing has to be gathered.
    """
    every = [block for row in own for block in row]
    low, high = min(every), max(every) + 1
    owner = [row for row, blocks in enumerate(own) for _ in blocks]
    if len(set(every)) == len(every) and high - low <= len(every) * 5 // 4:
        slots = [len(own)] * (high - low)
        for block, row in zip(every, owner, strict=True):
            slots[block - low] = row
        return slice(low, high), slots, [[block - low for block in row] for row in own]
    numbers = iter(range(len(every)))
    return every, owner, [[next(numbers) for _ in row] for row in own]


def _share(
    pieces: Sequence[Piece], tables: list[list[int]], block_size: int
) -> tuple[list[Piece], list[int], list[tuple[int, int, int, int]]]:
    """Find the tree of blocks that several decode rows have in common.

    Returns the rows in an order in which those that share are neighbours; how many blocks of each
    are shared; and the tree's nodes as (first row, row after the last, column, number of blocks).
    """
    order: list[Piece] = []
    skipped: list[int] = []
    nodes: list[tuple[int, int, int, int]] = []

    def grow(rows: Sequence[Piece], column: int) -> None:
        alike: dict[int, list[Piece]] = {}
        for piece in rows:
            alike.setdefault(tables[piece.row][column], []).append(piece)
        for group in alike.values():
            # The newest token's own block is never shared, whatever the tables say.
            end = min((piece.context - 1) // block_size for piece in group)
            # Of lists in order, the first and the last differ wherever any two do.
            alternatives = [tables[piece.row][column:end] for piece in group]
            both = zip(min(alternatives), max(alternatives), strict=True)
            count = sum(1 for _ in takewhile(lambda blocks: blocks[0] == blocks[1], both))
            spared = (len(group) - 1) * count * block_size
            if spared < max(MIN_TOKENS_SPARED, 1):
                order.extend(group)
                skipped.extend([column] * len(group))
            else:
                start = len(order)
                grow(group, column + count)
                nodes.append((start, len(order), column, count))

    grow(pieces, 0)
    return order, skipped, nodes


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
