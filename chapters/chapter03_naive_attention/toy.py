"""The toy example of chapter 3: 4 tokens, 4 query heads on 2 KV heads, 2 numbers a head.

The dot products of queries and keys are small whole numbers, and the scale is ln 2. So exp(score)
is a power of two, the weights are halves, quarters and eighths, and every result is a whole number.

T = 4, H = 4, G = 2, D = 2. KV head 1 has the keys of KV head 0 and its values with the sign turned,
so that a query head which reads the wrong one gives the wrong sign.
"""

import math

import torch

SCALE = math.log(2)

# Query head 0 looks for something; head 1 asks for nothing and so gets the mean of what it sees.
# Heads 2 and 3 do the same on KV head 1.
ASKING = torch.tensor([[1.0, 1], [-1, 1], [0, 1], [1, 0]])
KEYS = torch.tensor([[2.0, 2], [1, 1], [0, 1], [0, 3]])
VALUES = torch.tensor([[8.0, 0], [0, 8], [16, 16], [0, 16]])

Q = torch.stack((ASKING, torch.zeros(4, 2), ASKING, torch.zeros(4, 2)), dim=1)  # [T, H, D]
K = torch.stack((KEYS, KEYS), dim=1)  # [T, G, D]
V = torch.stack((VALUES, -VALUES), dim=1)  # [T, G, D]

# What attention makes of them: the dot products, the weights of head 0, and the output.
DOTS = torch.tensor([[4.0, 2, 1, 3], [0, 0, 1, 3], [2, 1, 1, 3], [2, 1, 0, 0]])
WEIGHTS = torch.tensor([[8.0, 0, 0, 0], [4, 4, 0, 0], [4, 2, 2, 0], [4, 2, 1, 1]]) / 8
FOUND = torch.tensor([[8.0, 0], [4, 4], [8, 6], [6, 6]])
MEAN = torch.tensor([[8.0, 0], [4, 4], [8, 8], [6, 10]])
OUT = torch.stack((FOUND, MEAN, -FOUND, -MEAN), dim=1)  # [T, H, D]

# A second sequence that begins like the first and has only 2 tokens; both laid end to end.
BATCH = torch.tensor([0, 1, 2, 3, 0, 1])
CU_SEQLENS = [0, 4, 6]

# The cache of the toy: one layer, 2 rows of 8 tokens, of which the sequences fill 4 and 2.
NUM_LAYERS, NUM_ROWS, MAX_LEN = 1, 2, 8
BYTES_PER_TOKEN = 2 * NUM_LAYERS * 2 * 2 * 4  # k and v * layers * G * D * bytes of a float32
