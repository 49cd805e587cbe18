"""SiLU-and-mul, the gate of a SwiGLU MLP (Shazeer 2020, "GLU Variants Improve Transformer")."""

import torch
from torch import nn
from torch.nn import functional as F


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` where ``x`` is the two side by side.

    x: [..., 2 * F], the gate in the first half and the up projection in the second.
    Returns [..., F] in the dtype of ``x``.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class SiluAndMul(nn.Module):
    """:func:`silu_and_mul` as a module: [..., 2 * F] -> [..., F]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu_and_mul(x)
