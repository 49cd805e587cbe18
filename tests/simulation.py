"""A KV cache that holds, instead of K and V, a fingerprint of what they were computed from.

K and V of a token depend on that token and on all before it, and on nothing else. So one number
made of exactly these stands for them, and a block that is handed out wrongly shows at the next
read. Pure Python: this module knows nothing of minivllm, nor of torch.
"""

from collections.abc import Iterable, Sequence
from typing import Any

# What a step that failed may have left behind.
GARBAGE = -1


def fingerprints(token_ids: Sequence[int]) -> list[int]:
    """For each token, a number made of it and all tokens before it."""
    found, last = [], 0
    for token in token_ids:
        last = hash((last, token))
        found.append(last)
    return found


def choose_token(fingerprint: int) -> int:
    """The token that the pretended model generates after a text with this fingerprint: 0 to 4."""
    return (fingerprint >> 11) % 5


def generate_alone(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What the pretended model makes of ``prompt`` when nobody else is there."""
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(choose_token(fingerprints(token_ids)[-1]))
    return token_ids[len(prompt) :]


class SimulatedCache:
    """The content of every slot, slot = block * S + offset."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[int | None] = [None] * (num_blocks * block_size)

    def run(self, scheduled: Iterable[tuple[Any, int]], *, fails: bool = False) -> list[int]:
        """One forward pass over ``count`` pending tokens of each sequence.

        As in every layer of the model, all K and V are stored before any are read. fails: the step
        breaks off half-way and leaves garbage. Returns each sequence's fingerprint at the last
        token that it ran.
        """
        scheduled = list(scheduled)
        written: set[int] = set()
        for seq, count in scheduled:
            wanted = fingerprints(seq.token_ids)
            for position in range(seq.num_computed, seq.num_computed + count):
                slot = self._slot(seq, position)
                assert slot not in written, f"two tokens of one step in slot {slot}"
                written.add(slot)
                self.slots[slot] = GARBAGE if fails else wanted[position]
        if fails:
            return []
        ends = []
        for seq, count in scheduled:
            context = seq.num_computed + count
            read = [self.slots[self._slot(seq, position)] for position in range(context)]
            assert read == fingerprints(seq.token_ids)[:context], f"{seq} reads foreign K and V"
            ends.append(read[-1])
        return ends

    def _slot(self, seq: Any, position: int) -> int:
        block = seq.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size
