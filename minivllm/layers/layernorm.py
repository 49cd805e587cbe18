"""RMSNorm (Zhang and Sennrich 2019), with the residual addition that precedes it in a decoder."""

from collections.abc import Iterator

import torch
from torch import nn

from minivllm.layers.checkpoint import CheckpointSource, new_parameter


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale every vector of ``x`` to root mean square 1, then by ``weight``.

    x: [..., E]; weight: [E]. Returns [..., E] in the dtype of ``x``.
    """
    # The mean of squares of bfloat16 numbers needs more than 8 bits of mantissa.
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse_rms).to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``x`` to the residual stream and normalise the sum.

    x, residual: [..., E]; weight: [E]. Returns (normalised sum, sum), both [..., E].
    """
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, of ``size`` elements."""

    def __init__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(size, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., E] -> [..., E]."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [..., E] -> (norm(residual + x), residual + x)."""
        return add_rms_norm(x, residual, self.weight, self.eps)

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        yield CheckpointSource(f"{prefix}.weight", tuple(self.weight.shape), self.weight)
