"""The toy example of chapter 1: 3 tokens of 6 numbers, chosen so that every result is exact.

The sum of the two rows of a token has root mean square 1, 2 and 3 (eps = 0), so the norm can be
checked by eye. Six is no power of two, so a Triton tile of 8 lanes needs a mask.
"""

import torch

EPS = 0.0
BLOCK = 8  # lanes of a program of the norms: the power of two that holds 6
TILE = 4  # lanes of a program of SiLU-and-mul

X = torch.tensor([[1.0, -1, 1, -1, 0, 1], [1, -2, 1, 1, -2, 0], [2, 2, -3, 1, -2, 0]])
RESIDUAL = torch.tensor([[1.0, 0, 0, 1, 0, -1], [2, -1, 1, 0, 1, 0], [4, 1, 0, -1, 2, 0]])
WEIGHT = torch.tensor([1.0, 1, 1, 2, 2, 2])
# What add_rms_norm makes of them.
TOTAL = torch.tensor([[2.0, -1, 1, 0, 0, 0], [3, -3, 2, 1, -1, 0], [6, 3, -3, 0, 0, 0]])
NORMED = torch.tensor([[2.0, -1, 1, 0, 0, 0], [1.5, -1.5, 1, 1, -1, 0], [2, 1, -1, 0, 0, 0]])
# Gate and up side by side, as the fused projection writes them: 3 rows of 12.
GATE_UP = torch.cat((TOTAL, RESIDUAL), dim=-1)
