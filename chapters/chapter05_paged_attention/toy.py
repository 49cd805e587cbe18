"""The toy example of chapter 5: chapter 3's four tokens and two more, on pages of four slots.

Sequence A has 6 tokens in blocks 4 and 1, sequence B has 3 in block 2. B is the beginning of A.
Slots that nobody owns hold 99, as if an earlier sequence had left it there.

    block    0           1           2           3           4           5
    slots    0 .. 3      4 .. 7      8 .. 11     12 .. 15    16 .. 19    20 .. 23
    tokens               A4 A5       B0 B1 B2                A0 A1 A2 A3

The scale is ln 2 as in chapter 3, so exp(score) is 2 to the power of the dot product.

B = 2, H = 4, G = 2, D = 2, S = 4, N = 6. Query heads 1 and 3 ask for nothing and so get the mean;
KV head 1 has the keys of KV head 0 and its values with the sign turned.
"""

import torch

from chapters.chapter03_naive_attention import toy as chapter03

SCALE = chapter03.SCALE
BLOCK_SIZE, NUM_BLOCKS = 4, 6
STALE = 99.0

LENGTHS = [6, 3]
TABLES = [[4, 1], [2]]
SLOTS = [[16, 17, 18, 19, 4, 5], [8, 9, 10]]

_keys = torch.cat((chapter03.KEYS, torch.tensor([[4.0, 0], [3, 0]])))
_values = torch.cat((chapter03.VALUES, torch.tensor([[0.0, 10], [6, 10]])))
K = torch.stack((_keys, _keys), dim=1)  # [6, G, D]; B has the first 3 of them
V = torch.stack((_values, -_values), dim=1)

# The newest token's query of each sequence: A asks as token 3 of chapter 3 did, B as its token 2.
ASKING = torch.tensor([[1.0, 0], [0, 1]])
Q = torch.stack((ASKING, torch.zeros(2, 2), ASKING, torch.zeros(2, 2)), dim=1)  # [B, H, D]

# What query head 0 of A finds: dot products 2 1 0 0 | 4 3, exp(score) 4 2 1 1 | 16 8.
DENOMINATORS = torch.tensor([8.0, 24.0])  # of the first four keys, and of the other two
FOUND_IN_PIECES = torch.tensor([[6.0, 6], [2, 10]])
MEAN_IN_PIECES = torch.tensor([[6.0, 10], [3, 10]])  # query head 1, denominators 4 and 2
FOUND = torch.tensor([[3.0, 9], [8, 6]])  # query head 0 of A and of B
MEAN = torch.tensor([[5.0, 10], [8, 8]])  # query head 1
OUT = torch.stack((FOUND, MEAN, -FOUND, -MEAN), dim=1)  # [B, H, D]


def new_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All tokens of A, then those of B: k, v [9, G, D] and their slots, int64 [9]."""
    rows = torch.tensor([*range(LENGTHS[0]), *range(LENGTHS[1])])
    return K[rows], V[rows], torch.tensor([slot for slots in SLOTS for slot in slots])


def pool() -> tuple[torch.Tensor, torch.Tensor]:
    """A pool nobody has written to yet: k_cache, v_cache [N, S, G, D], full of 99."""
    shape = (NUM_BLOCKS, BLOCK_SIZE, 2, 2)
    return torch.full(shape, STALE), torch.full(shape, STALE)


def filled_pool() -> tuple[torch.Tensor, torch.Tensor]:
    """The pool with the tokens of both sequences in their slots."""
    caches, (k, v, slots) = pool(), new_tokens()
    for cache, new in zip(caches, (k, v), strict=True):
        cache.flatten(0, 1)[slots] = new
    return caches


def block_tables() -> torch.Tensor:
    """[B, 2] int32; past the end of B's table stands -1."""
    return torch.tensor([[4, 1], [2, -1]], dtype=torch.int32)
