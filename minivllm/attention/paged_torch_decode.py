"""The PyTorch path of attention on pages, for decoding: one query a sequence, all at once.

Blocks that many rows share at their beginning are read once for all of them (Juravsky et al. 2024,
"Hydragen"; the same idea is called cascade attention in vLLM).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch

from minivllm.attention.paged_torch_prefill import Piece

# Shared blocks are treated apart if that spares reading so many tokens a second time.
MIN_TOKENS_SPARED = 256


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
    Key heads come first in every tensor, so that what rows share is one product a head.

    ``tokens`` int64 [b] are the queries' rows in the batch.
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
        self.block_size = block_size
        self.rows = [piece.row for piece in order]
        self.skipped_tokens = [skip * block_size for skip in skipped]
        self.shared_len = block_size * max(skipped)
        own = [
            host_tables[piece.row][skip : -(-piece.context // block_size)]
            for piece, skip in zip(order, skipped, strict=True)
        ]
        self._lay_out(own, device)
        self.tokens = torch.tensor([piece.first for piece in order], device=device)
        self.key = torch.arange(self.most * block_size, device=device)
        contexts = {piece.row: piece.context for piece in order}
        self._hide(contexts.__getitem__)
        # Scores of the last layer, whose place the next one's take; made where they are needed.
        self._scores: torch.Tensor | None = None

    def _lay_out(self, own: list[list[int]], device: torch.device) -> None:
        """Which blocks to multiply with whose query, and where the products belong."""
        self.most = max(map(len, own))
        # One block a row, as while many ask the same: then entry i is row i, and there is nothing
        # to sort.
        self.one_each = all(len(blocks) == 1 for blocks in own)
        if self.one_each:
            blocks: slice | list[int] = [row[0] for row in own]
        else:
            blocks, owner, entry = _entries(own)
            # [entries]: the row of each; nobody's blocks go to an extra row that is dropped.
            self.owner = torch.tensor(owner, device=device)
            # Whose query an entry is multiplied with; for nobody's blocks, any.
            self.asker = self.owner.clamp(max=self.num_rows - 1)
            # [b * m]: the entry that holds each place of each row; padding points anywhere.
            padded = [[*row, *([0] * (self.most - len(row)))] for row in entry]
            self.entry_of_place = torch.tensor([e for row in padded for e in row], device=device)
            place = dict.fromkeys(range(len(owner)), 0)
            for row, entries in enumerate(entry):
                place.update({e: row * self.most + column for column, e in enumerate(entries)})
            self.place_of_entry = torch.tensor(list(place.values()), device=device)
        if not isinstance(blocks, slice):
            blocks = torch.tensor(blocks, device=device)
        self.blocks: slice | torch.Tensor = blocks

    def set_contexts(self, context_lens: Sequence[int]) -> None:
        """The same blocks with other lengths, those of all rows of the batch."""
        self._hide(context_lens.__getitem__)

    def _hide(self, context_of: Callable[[int], int]) -> None:
        pairs = zip(self.rows, self.skipped_tokens, strict=True)
        left = torch.tensor([context_of(row) - skip for row, skip in pairs], device=self.key.device)
        # [b, own keys]: what lies past a row's context.
        self.hidden = self.key >= left[:, None]

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q: [b, H, D] -> [b, H, D]."""
        num_heads, head_size = q.shape[1:]
        queries = (q * scale).view(self.num_rows, k_cache.shape[2], -1, head_size)
        queries = queries.transpose(0, 1).contiguous()
        scores = self._scores_for(queries)
        self._score_own(queries, k_cache, self._own_part(scores))
        places = list(self._places(queries.shape[2]))
        if places:
            # [G, D, shared tokens] and [G, shared tokens, D]: each block once for all who share it.
            keys = k_cache.index_select(0, self.shared_blocks).flatten(0, 1).permute(1, 2, 0)
            values = v_cache.index_select(0, self.shared_blocks).flatten(0, 1).transpose(0, 1)
        for rows, columns, here in places:
            into = scores.flatten(1, 2)[:, rows, columns]
            torch.bmm(queries.flatten(1, 2)[:, rows], keys[..., here], out=into)
        # In float32, as the kernels do: bfloat16 sums of many small weights lose their tail.
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        out = self._read_own(self._own_part(weights), v_cache)
        for rows, columns, here in places:
            read = weights.flatten(1, 2)[:, rows, columns]
            out.flatten(1, 2)[:, rows].baddbmm_(read, values[:, here])
        return out.transpose(0, 1).reshape(-1, num_heads, head_size)

    def _scores_for(self, queries: torch.Tensor) -> torch.Tensor:
        """Room for all scores: [G, b, R, keys], -inf wherever a row has no key."""
        shape = (*queries.shape[:3], self.shared_len + len(self.key))
        if (
            self._scores is None
            or self._scores.shape != shape
            or self._scores.dtype != queries.dtype
        ):
            self._scores = queries.new_full(shape, float("-inf"))
        return self._scores

    def _own_part(self, scores: torch.Tensor) -> torch.Tensor:
        """[G, b, R, keys] -> the part of own blocks, as a view [G, b, R, m, S]."""
        return scores[..., self.shared_len :].unflatten(-1, (self.most, self.block_size))

    def _places(self, repeats: int) -> Iterator[tuple[slice, slice, slice]]:
        """For all shared blocks: whose queries, where in their scores, where among the blocks."""
        size = self.block_size
        for start, end, column, place, count in self.shared:
            yield (
                slice(start * repeats, end * repeats),
                slice(column * size, (column + count) * size),
                slice(place * size, (place + count) * size),
            )

    def _score_own(self, queries: torch.Tensor, k_cache: torch.Tensor, into: torch.Tensor) -> None:
        """Every row against its own blocks: queries [G, b, R, D] -> into [G, b, R, m, S]."""
        if not self.one_each:
            queries = queries.index_select(1, self.asker)
        products = queries.new_empty(*queries.shape[:3], self.block_size)
        # A product for each head reads its strided part of the blocks in place; one for all heads
        # would first copy them.
        for head, blocks in enumerate(self._own(k_cache)):
            torch.bmm(queries[head], blocks.mT, out=products[head])
        if not self.one_each:
            products = products.index_select(1, self.entry_of_place)
        products = products.unflatten(1, (-1, self.most)).transpose(2, 3)
        hidden = self.hidden.view(-1, 1, self.most, self.block_size)
        into.copy_(products.masked_fill_(hidden, float("-inf")))

    def _read_own(self, weights: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """The own blocks' part of the result: weights [G, b, R, m, S] -> [G, b, R, D]."""
        weights = weights.transpose(2, 3).flatten(1, 2)
        if not self.one_each:
            weights = weights.index_select(1, self.place_of_entry)
        products = weights.new_empty(*weights.shape[:3], v_cache.shape[3])
        for head, blocks in enumerate(self._own(v_cache)):
            torch.bmm(weights[head], blocks, out=products[head])
        if self.one_each:
            return products
        out = products.new_zeros(len(products), self.num_rows + 1, *products.shape[2:])
        return out.index_add_(1, self.owner, products)[:, :-1]

    def _own(self, cache: torch.Tensor) -> torch.Tensor:
        """The rows' own blocks as [G, entries, S, D]: a view of the pool where that is possible."""
        blocks = self.blocks
        own = cache[blocks] if isinstance(blocks, slice) else cache.index_select(0, blocks)
        return own.permute(2, 0, 1, 3)


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

    def pays(times: int, num_blocks: int) -> bool:
        return (times - 1) * num_blocks * block_size >= max(MIN_TOKENS_SPARED, 1)

    def grow(rows: Sequence[Piece], column: int, end: int) -> None:
        """``rows`` have the blocks up to ``end`` in common; somebody reads those to ``column``."""
        parts = [
            (group, end + count if pays(len(group), count) else None)
            for group, count in _parts(rows, end, tables, block_size)
        ]
        # A part with a node of its own can read this node's blocks as well, once for all its rows.
        readers = sum(1 if further else len(group) for group, further in parts)
        if not pays(readers, end - column):
            end = column
        start = len(order)
        for group, further in parts:
            if further:
                grow(group, end, further)
            else:
                order.extend(group)
                skipped.extend([end] * len(group))
        if end > column:
            nodes.append((start, len(order), column, end - column))

    grow(pieces, 0, 0)
    return order, skipped, nodes


def _parts(
    rows: Sequence[Piece], column: int, tables: list[list[int]], block_size: int
) -> Iterator[tuple[list[Piece], int]]:
    """The rows by their block ``column``; how many blocks, from there on, each part shares."""
    alike: dict[int, list[Piece]] = {}
    for piece in rows:
        alike.setdefault(tables[piece.row][column], []).append(piece)
    for group in alike.values():
        # The newest token's own block is never shared, whatever the tables say.
        end = min((piece.context - 1) // block_size for piece in group)
        # Of lists in order, the first and the last differ wherever any two do.
        alternatives = [tables[piece.row][column:end] for piece in group]
        both = zip(min(alternatives), max(alternatives), strict=True)
        yield group, sum(1 for _ in takewhile(lambda blocks: blocks[0] == blocks[1], both))
