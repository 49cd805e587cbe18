"""Linear layers, plain and fused.

A GPU runs one large matrix product faster than three small ones over the same input, so q, k and v
share one weight, and so do gate and up. The checkpoint knows nothing of this: it holds the parts.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from minivllm.layers.checkpoint import CheckpointSource, new_parameter


class Linear(nn.Module):
    """``y = x @ weight.T + bias``: [..., in_features] -> [..., out_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = new_parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = new_parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        for name, parameter in self.named_parameters(recurse=False):
            yield CheckpointSource(f"{prefix}.{name}", tuple(parameter.shape), parameter)


class MergedLinear(Linear):
    """Several linear layers over one input, computed as one.

    parts: checkpoint name -> out_features, in the order in which they lie side by side in the
    output, which is [..., sum of the parts]. A layer at ``mlp.gate_up_proj`` with parts
    ``gate_proj`` and ``up_proj`` is filled from ``mlp.gate_proj.*`` and ``mlp.up_proj.*``.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias, dtype=dtype, device=device)
        self.parts = dict(parts)

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        parent = prefix.rpartition(".")[0]
        for name, parameter in self.named_parameters(recurse=False):
            row = 0
            for part, size in self.parts.items():
                target = parameter[row : row + size]
                yield CheckpointSource(f"{parent}.{part}.{name}", tuple(target.shape), target)
                row += size


class QKVLinear(MergedLinear):
    """The projections of attention as one matrix: [..., E] -> [..., (H + 2 * G) * D].

    The output holds H query heads, then G key heads, then G value heads, D numbers each.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        parts = {
            "q_proj": num_heads * head_size,
            "k_proj": num_kv_heads * head_size,
            "v_proj": num_kv_heads * head_size,
        }
        super().__init__(hidden_size, parts, bias=bias, dtype=dtype, device=device)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv: [T, (H + 2 * G) * D] -> views q [T, H, D], k [T, G, D], v [T, G, D]."""
        heads = qkv.view(qkv.shape[0], -1, self.head_size)
        return heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
