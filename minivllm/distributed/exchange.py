"""What a step asks of the other ranks, by the collectives of their group.

Any number of tokens, any device that our kernels run on, any number of hosts. :mod:`one_shot` does
the same faster for few tokens on one host, and falls back to this.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from minivllm.distributed.group import Group
from minivllm.distributed.parallel_layers import RowParallelLinear, VocabularyParallelEmbedding
from minivllm.layers.layernorm import RMSNorm

MOST_BYTES_IN_PARTS = 1 << 16


class Exchange:
    """Sums over the ranks of ``group``, and what comes right after them.

    pdl: launch kernels while the one in front still runs (programmatic dependent launch).
    """

    name = "collectives"

    def __init__(self, group: Group, *, pdl: bool = False) -> None:
        # Here, for it imports Triton, which has no wheel for every machine.
        from minivllm.engine import fused_kernels

        self.group = group
        self.pdl = pdl
        self._kernels = fused_kernels

    def summand(self, layer: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
        """x [T, this rank's inputs] -> what this rank adds to the layer's outputs [T, E]."""
        # The bias, which all ranks hold, goes into the sum once.
        return F.linear(x, layer.weight, layer.bias if self.group.rank == 0 else None)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, E] of every rank, residual [T, E] -> norm(total) and total = residual + their sum.

        The memory of x may be used.
        """
        total = self.group.all_reduce(x)
        return self._kernels.add_rms_norm(total, residual, norm.weight, norm.eps, pdl=self.pdl)

    def add_norm_of_parts(
        self,
        parts: torch.Tensor,
        residual: torch.Tensor,
        norm: RMSNorm,
        total: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """total float32 [P, E] = residual [P, E] + the sum of parts; out [P, E] = norm(total).

        parts: float32 [parts, P, E] of every rank.
        """
        from minivllm.engine.skinny_gemv_kernels import Stream
        from minivllm.engine.skinny_sum_kernels import sum_and_norm

        stream = Stream(residual, None, self.sum_parts(parts))
        sum_and_norm(stream, norm.weight, total, out, eps=norm.eps, dependent=self.pdl)

    def add_gain_of_parts(
        self,
        parts: torch.Tensor,
        residual: torch.Tensor,
        gain: torch.Tensor,
        total: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The norm but for its division: total float32 [P, E] = residual [P, E] + the sum of parts.

        parts: float32 [parts, P, E] of every rank; gain: [E]. out: [P, E], becomes total * gain.
        Returns float32 [n, P], which add up to the sum of the squares of each row of total.
        """
        from minivllm.engine.skinny_gemv_kernels import Stream
        from minivllm.engine.skinny_sum_kernels import sum_and_gain

        stream = Stream(residual, None, self.sum_parts(parts))
        squares = total.new_empty(1, len(total))
        sum_and_gain(stream, gain, total, out, squares, dependent=self.pdl)
        return squares

    def embed(
        self, embedding: VocabularyParallelEmbedding, ids: torch.Tensor, norm: RMSNorm | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ids: int64 [T] -> norm(vectors), or vectors if there is none, and vectors, [T, E]."""
        x = embedding(ids)
        if norm is None:
            return x, x
        return self._kernels.rms_norm(x, norm.weight, norm.eps, pdl=self.pdl), x

    def sum_parts(self, parts: torch.Tensor) -> torch.Tensor:
        """parts: float32 [parts, P, E] of every rank -> [fewer parts, P, E] with the same sum."""
        # The kernel behind adds up parts in any case. Few bytes travel as fast as fewer, so a
        # kernel that added them up here would only cost its launch.
        if parts.nbytes > MOST_BYTES_IN_PARTS:
            parts = parts.sum(dim=0)[None]
        return self.group.all_reduce(parts)

    def close(self) -> None:
        """Give back what is shared with other ranks, once no kernel uses it; here, nothing."""
