"""Attention over K and V that lie in pages (Kwon et al. 2023, "PagedAttention"), in PyTorch.

A sequence's tokens fill blocks of S slots anywhere in one large pool. Its block table lists them:
token t lies in block ``table[t // S]`` at offset ``t % S``, which is slot ``block * S + offset``.

    pool      block 0   block 1   block 2   block 3   block 4
              [S slots] [S slots] [S slots] [S slots] [S slots]
    table of one sequence: [3, 0, 4]  ->  its tokens lie in block 3, then 0, then 4

Here are the pool, what a step says about it, and attention as a plain loop over the blocks, against
which every faster form is checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minivllm.attention.naive import naive_attention
from minivllm.models.config import ModelConfig

PADDING_SLOT = -1


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


def slots_of(table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Where the tokens ``start`` to ``end`` - 1 of a sequence lie: one slot for each.

    table: the sequence's blocks in order, as many as its tokens need at least.
    """
    return [
        table[token // block_size] * block_size + token % block_size for token in range(start, end)
    ]


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
    """Attention over pages by a plain loop: walk each sequence's table, then attend naively.

    q: [T, H, D], the queries of all sequences end to end, whose own K and V are stored already;
    k_cache, v_cache: [N, S, G, D]. Returns [T, H, D]. Slow, and right at a glance.
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
