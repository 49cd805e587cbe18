"""Attention over K and V that lie in pages (Kwon et al. 2023, "PagedAttention"), in PyTorch.

A sequence's tokens fill blocks of S slots anywhere in one large pool. Its block table lists them:
token t lies in block ``table[t // S]`` at offset ``t % S``, which is slot ``block * S + offset``.

    pool      block 0   block 1   block 2   block 3   block 4
              [S slots] [S slots] [S slots] [S slots] [S slots]
    table of one sequence: [3, 0, 4]  ->  its tokens lie in block 3, then 0, then 4

This is the form that runs on every device; the Triton kernels are checked against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from minivllm.attention.naive import naive_attention
from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Attend

PADDING_SLOT = -1

# No more than this many mask elements at once (64 MiB of bool): long prompts go in pieces.
MAX_MASK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class PagedBatch:
    """Everything one forward pass needs besides weights and cache, made once a step.

    T tokens of B sequences, laid end to end; M is the longest block table. Sequence b brings
    ``query_lens[b]`` new tokens, the last ones of its ``context_lens[b]``.

    input_ids, positions: int64 [T]. slot_mapping: int64 [T], where each token's K and V go.
    cu_query_lens: int32 [B + 1], the boundaries of the sequences' new tokens.
    context: int32 [B], ``context_lens`` on the device. block_tables: int32 [B, M], -1 past the end.
    query_lens, context_lens: the same lengths on the host, for the forms that loop there.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    cu_query_lens: torch.Tensor
    context: torch.Tensor
    block_tables: torch.Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]


class PagedKVCache:
    """The pool of blocks: k, v [layers, N, S, G, D].

    Zeroed, since attention multiplies masked-out values by 0, and 0 times a stray NaN is NaN.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (
            config.num_layers,
            num_blocks,
            block_size,
            config.num_kv_heads,
            config.head_size,
        )
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """What one block takes in all layers, K and V together."""
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_size
        return per_token * block_size * dtype.itemsize


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write every token's K and V to its slot.

    k, v: [T, G, D]; k_cache, v_cache: [N, S, G, D]; slot_mapping: int64 [T]. Tokens with slot -1
    (padding) are not written.
    """
    real = slot_mapping >= 0
    if not bool(real.all()):
        slot_mapping, k, v = slot_mapping[real], k[real], v[real]
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


def paged_attention_loop(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
) -> torch.Tensor:
    """The same by a plain loop: walk each sequence's table, then attend naively.

    q: [T, H, D]; k_cache, v_cache: [N, S, G, D]. Returns [T, H, D]. Slow, and right at a glance.
    """
    block_size = k_cache.shape[1]
    out = torch.zeros_like(q)
    start = 0
    for row, (num_queries, context) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        num_blocks = -(-context // block_size)
        table = batch.block_tables[row, :num_blocks].tolist()
        keys = torch.cat([k_cache[block] for block in table])[:context]
        values = torch.cat([v_cache[block] for block in table])[:context]
        end = start + num_queries
        out[start:end] = naive_attention(q[start:end], keys, values, scale)
        start = end
    return out


@dataclass(frozen=True)
class _Group:
    """Pieces of b sequences with about equally many queries Q, padded to one rectangle.

    tokens: int64 [b, Q], each query's row in the flattened batch; padding repeats the last one.
    whole: the group is the whole batch in its own order, so there is nothing to pick or to place.
    blocks: int64 [b * m], the block tables of m blocks end to end.
    mask: bool [b, 1, Q, m * S], which key each query sees.
    """

    tokens: torch.Tensor
    whole: bool
    blocks: torch.Tensor
    mask: torch.Tensor


class TorchPagedAttention:
    """``attend`` by a vectorised gather: K and V of a whole group in one look-up.

    Queries are grouped by the power of two above their number, so that decode rows (1 query) form
    one rectangle and prompts of like length share another. Everything that does not depend on the
    layer is prepared once, in the constructor.
    """

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
        if self.groups[0].whole:
            return self._attend(self.groups[0], q, k_cache, v_cache)
        out = torch.empty_like(q)
        for group in self.groups:
            picked = q[group.tokens.flatten()]
            out[group.tokens.flatten()] = self._attend(group, picked, k_cache, v_cache)
        return out

    def _attend(
        self, group: _Group, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        """q: [b * Q, H, D], in the order of ``group.tokens``. Returns the same shape and order."""
        num_heads, head_size = q.shape[1:]
        num_kv_heads = k_cache.shape[2]
        rows, num_queries = group.tokens.shape
        # [b, m * S, G, D], then heads before tokens.
        gathered = (rows, -1, num_kv_heads, head_size)
        keys = k_cache.index_select(0, group.blocks).view(gathered).transpose(1, 2)
        values = v_cache.index_select(0, group.blocks).view(gathered).transpose(1, 2)
        if num_queries == 1:
            # The query heads that share a key head become its rows: one product for all of them.
            queries = q.reshape(rows, num_kv_heads, -1, head_size)
            out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=group.mask, scale=self.scale
            )
            return out.reshape(rows, num_heads, head_size)
        out = F.scaled_dot_product_attention(
            q.unflatten(0, (rows, num_queries)).transpose(1, 2),
            keys,
            values,
            attn_mask=group.mask,
            scale=self.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(-1, num_heads, head_size)


def bind_torch_attention(cache: PagedKVCache, batch: PagedBatch, scale: float) -> Attend:
    """The PyTorch path as a backend: one ``attend`` for one step."""
    return TorchPagedAttention(cache, batch, scale)


def _make_groups(batch: PagedBatch, block_size: int) -> list[_Group]:
    """Cut long queries into pieces, then group the pieces by like length."""
    buckets: dict[int, list[tuple[int, int, int, int]]] = {}
    start = 0
    for row, (num_queries, context) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        most = max(1, MAX_MASK_ELEMENTS // context)
        for first in range(0, num_queries, most):
            count = min(most, num_queries - first)
            position = context - num_queries + first
            buckets.setdefault((count - 1).bit_length(), []).append(
                (row, start + first, count, position)
            )
        start += num_queries
    groups = []
    for pieces in buckets.values():
        widest = max(piece[2] for piece in pieces)
        longest = max(piece[3] + piece[2] for piece in pieces)
        if len(pieces) * widest * longest > MAX_MASK_ELEMENTS:
            pieces.sort(key=lambda piece: piece[3] + piece[2], reverse=True)
        while pieces:
            longest = max(piece[3] + piece[2] for piece in pieces)
            fit = max(1, MAX_MASK_ELEMENTS // (widest * longest))
            one_group = len(buckets) == 1 and not groups and fit >= len(pieces)
            whole = one_group and widest * len(pieces) == sum(batch.query_lens)
            groups.append(_make_group(batch, pieces[:fit], whole, block_size))
            pieces = pieces[fit:]
    return groups


def _make_group(
    batch: PagedBatch,
    pieces: Sequence[tuple[int, int, int, int]],
    whole: bool,
    block_size: int,
) -> _Group:
    """pieces: (sequence, first token in the batch, number of queries, first position) each."""
    device = batch.block_tables.device
    rows, firsts, counts, positions = torch.tensor(pieces, device=device).unbind(1)
    step = torch.arange(max(piece[2] for piece in pieces), device=device)
    # A padded query repeats the piece's last one, and so writes the same result once more.
    step = step.minimum(counts[:, None] - 1)
    num_blocks = -(-max(piece[3] + piece[2] for piece in pieces) // block_size)
    key = torch.arange(num_blocks * block_size, device=device)
    mask = key <= (positions[:, None] + step)[:, None, :, None]
    # Past a table's end any block will do: the mask hides its tokens.
    blocks = batch.block_tables[rows, :num_blocks].clamp(min=0).long()
    return _Group(firsts[:, None] + step, whole, blocks.flatten(), mask)
