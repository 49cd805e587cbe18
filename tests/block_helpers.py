"""Shared by the tests of chapter 6: sequences, and block managers in a state put there by hand.

A test of one method must not need another one that a reader has still to write.
"""

from collections.abc import Sequence as Tokens

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.sequence import Sequence

S = 16


def make_sequence(token_ids: Tokens[int], max_tokens: int | None = None, **settings: object):
    """A sequence that nothing but the block manager will touch."""
    params = SamplingParams(max_tokens=max_tokens, **settings)
    return Sequence("r", list(token_ids), params, arrival=0, seed=0, max_len=10_000)


def blocks_of(*values: int) -> list[int]:
    """A prompt of full blocks, each of S equal tokens."""
    return [value for value in values for _ in range(S)]


def simple_name(previous: int, token_ids: Tokens[int]) -> int:
    """A name that needs no ``hash_block``."""
    return hash((previous, *token_ids))


def manager_of(num_blocks: int, **settings: object) -> BlockManager:
    """A manager that names blocks without ``hash_block``."""
    return BlockManager(num_blocks, S, **{"hash_function": simple_name, **settings})


def holding(manager: BlockManager, token_ids: Tokens[int], table: list[int]) -> Sequence:
    """A sequence that holds the blocks ``table``, put there by hand, its full ones cached."""
    seq = make_sequence(token_ids)
    for block_id in table:
        if manager.ref_count(block_id) == 0:
            manager._evictable.pop(block_id, None)
            if block_id in manager._blank:
                manager._blank.remove(block_id)
        manager._blocks[block_id].ref_count += 1
    seq.block_table = list(table)
    manager.cache_full_blocks(seq, len(seq))
    seq.num_computed = len(seq)
    return seq


def free(manager: BlockManager, block_ids: Tokens[int]) -> None:
    """Take blocks with one holder away from it by hand, the first to be evicted first."""
    for block_id in block_ids:
        block = manager._blocks[block_id]
        assert block.ref_count == 1
        block.ref_count = 0
        if block.hash is None:
            manager._blank.append(block_id)
        else:
            manager._evictable[block_id] = None
