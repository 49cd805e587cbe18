"""The PyTorch path of attention on pages, for prompts: several of like length at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


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


class PrefillGroup:
    """b pieces with about equally many queries, padded to one rectangle of Q queries.

    Padding repeats a piece's last query, and so writes the same result once more. ``tokens`` int64
    [b * Q] are the queries' rows in the batch.
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
