"""The toy example of chapter 4: 6 tokens, one head of 2 numbers, in tiles of 2 x 2.

As in chapter 3 the dot products are small whole numbers and the scale is ln 2, so exp(score) is a
power of two. The last token's dot products are 0 0 | 2 2 | 2 1: its maximum moves once, from 0 to 2
with the second tile, and all that was summed before shrinks to a quarter.

T = 6, H = G = 1, D = 2.
"""

import math

import torch

SCALE = math.log(2)
TILE = 2

ASKING = torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, 0], [-1, 0], [1, 0]])
KEYS = torch.tensor([[0.0, 1], [0, 0], [2, 0], [2, 1], [2, -1], [1, 0]])
VALUES = torch.tensor([[8.0, 0], [0, 16], [0, 4], [6, 2], [4, 2], [8, 8]])

Q, K, V = ASKING[:, None], KEYS[:, None], VALUES[:, None]  # [T, H, D], [T, G, D], [T, G, D]

# The last token, tile by tile. MAX, SUM and ACC stand as they are after the tile. WEIGHTS are
# exp(score - MAX) of its two keys. SHRINK multiplies the old sums; at first there are none.
DOTS = torch.tensor([[0.0, 0], [2, 2], [2, 1]])
MAX = torch.tensor([0.0, 2, 2])  # of the dot products
SHRINK = torch.tensor([0, 1 / 4, 1])
WEIGHTS = torch.tensor([[1, 1], [1, 1], [1, 1 / 2]])
SUM = torch.tensor([2, 2.5, 4])
ACC = torch.tensor([[8.0, 16], [8, 10], [16, 16]])
LAST = torch.tensor([4.0, 4])  # ACC / SUM after the last tile: the output

# A second sequence, the first 3 tokens once more; both laid end to end.
BATCH = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2])
CU_SEQLENS = [0, 6, 9]
# Tiles that causal attention visits: 1 + 2 + 3 of the 3 x 3, and 1 + 2 of the 2 x 2.
VISITED = [6, 3]
