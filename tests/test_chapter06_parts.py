"""Chapter 6's methods one by one, on managers whose state was put there by hand."""

import pytest
from block_helpers import S, blocks_of, free, holding, make_sequence, manager_of

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sequence import Sequence

# ---------------------------------------------------------------------------- finding a prefix


def found(manager: BlockManager, token_ids: list[int]) -> list[int]:
    """The ids of the cached blocks that hold the beginning of a prompt."""
    return [block.block_id for block in manager._find_prefix(make_sequence(token_ids))]


def test_find_prefix_stops_at_the_first_block_that_differs():
    manager = manager_of(8)
    holding(manager, [*blocks_of(1, 2, 3), 4], [5, 2, 7, 0])
    cases = {
        "all three blocks": ([*blocks_of(1, 2, 3), 9], [5, 2, 7]),
        "two, then another": ([*blocks_of(1, 2, 4), 9], [5, 2]),
        "another, then the same": ([*blocks_of(4, 2, 3), 9], []),
        "two, and one cut short": ([*blocks_of(1, 2), 3, 3, 3], [5, 2]),
        "less than a block": ([1] * (S - 1), []),
        "the same blocks in another order": ([*blocks_of(2, 1, 3), 9], []),
    }
    for name, (prompt, blocks) in cases.items():
        assert found(manager, prompt) == blocks, (
            f"{name}: found blocks {found(manager, prompt)}, should be {blocks}"
        )


def test_find_prefix_leaves_the_last_token_to_run():
    manager = manager_of(8)
    holding(manager, blocks_of(1, 2, 3), [0, 1, 2])
    cases = {S: 0, S + 1: 1, 2 * S: 1, 2 * S + 1: 2, 3 * S - 1: 2, 3 * S: 2}
    for length, blocks in cases.items():
        number = len(found(manager, blocks_of(1, 2, 3)[:length]))
        assert number == blocks, f"{length} cached tokens: {number} blocks, should be {blocks}"
    assert len(found(manager, [*blocks_of(1, 2, 3), 4])) == 3
    back = make_sequence(blocks_of(1))
    back.token_ids += [*blocks_of(2), 3]
    number = len(manager._find_prefix(back))
    assert number == 2, f"a prompt of 16 tokens and an answer of 17: {number} blocks, should be 2"


def test_find_prefix_compares_the_tokens():
    """All names are equal here, so only the tokens tell blocks apart."""
    manager = manager_of(8, hash_function=lambda previous, tokens: 7)
    holding(manager, [*blocks_of(1), 9], [0, 1])
    assert found(manager, [*blocks_of(1), 5]) == [0]
    assert found(manager, [*blocks_of(2), 5]) == [], "the name collides, but the tokens differ"


def test_find_prefix_compares_what_stands_before():
    """Names without a chain: the block after 2 has the name and the tokens of the one after 1."""
    manager = manager_of(8, hash_function=lambda previous, tokens: tokens[0])
    holding(manager, blocks_of(1, 5), [0, 1])
    holding(manager, blocks_of(2), [2])
    assert found(manager, [*blocks_of(1, 5), 9]) == [0, 1]
    assert found(manager, [*blocks_of(2, 5), 9]) == [2], "block 1 was computed after 1, not after 2"


def test_find_prefix_when_there_is_nothing_to_find():
    assert found(manager_of(2), blocks_of(1, 2)) == []
    manager = manager_of(8, enable_prefix_caching=False)
    holding(manager, blocks_of(1, 2), [0, 1])
    assert found(manager, blocks_of(1, 2)) == []


def test_find_prefix_changes_nothing():
    """A hit counts only when its request is let in, so looking must not count as use."""
    manager = manager_of(4)
    holding(manager, blocks_of(1, 2), [0, 1])
    free(manager, [1, 0])
    seq = make_sequence([*blocks_of(1, 2), 3])
    assert len(manager._find_prefix(seq)) == 2
    assert list(manager._evictable) == [1, 0] and manager.num_held == 0
    assert (seq.block_table, seq.prefix_chain, seq.num_computed) == ([], [], 0)


# ---------------------------------------------------------------------------- a block to write in


def test_take_new_gives_blank_blocks_first():
    manager = manager_of(4)
    holding(manager, blocks_of(1), [2])
    free(manager, [2])
    taken = [manager._take_new() for _ in range(3)]
    assert taken == [0, 1, 3], (
        f"gave {taken}, should be [0, 1, 3]: block 2 is cached, and self._blank is a queue"
    )
    counts = [manager.ref_count(block) for block in taken]
    assert counts == [1, 1, 1], f"holders of the three: {counts}, should be [1, 1, 1]"
    assert list(manager._evictable) == [2], "block 2 had to stay findable"
    assert manager.num_free == 1


def test_take_new_evicts_the_least_recently_used():
    manager = manager_of(3)
    holding(manager, blocks_of(1, 2, 3), [0, 1, 2])
    free(manager, [2, 0, 1])
    taken = [manager._take_new() for _ in range(3)]
    assert taken == [2, 0, 1], f"evicted {taken}; they were given back in the order [2, 0, 1]"
    assert manager.num_free == 0


def test_take_new_deletes_the_name_of_what_it_evicts():
    manager = manager_of(2)
    holding(manager, blocks_of(1, 2), [0, 1])
    free(manager, [1, 0])
    block = manager._blocks[manager._take_new()]
    assert block.hash is None, "the evicted block still has its name"
    assert list(manager._cached.values()) == [manager._blocks[0]], (
        "the evicted block can still be found by its old name"
    )
    seq = make_sequence([9])
    seq.block_table = [block.block_id]
    manager.check([seq])


# ---------------------------------------------------------------------------- counting holders


def sharing(manager: BlockManager) -> tuple[Sequence, Sequence]:
    """Two sequences with blocks 0 and 1 in common; 2 and 3 are their own."""
    first = holding(manager, [*blocks_of(1, 2), 3], [0, 1, 2])
    return first, holding(manager, [*blocks_of(1, 2), 4], [0, 1, 3])


def test_take_counts_one_holder_more():
    manager = manager_of(6)
    first, _ = sharing(manager)
    manager._take([manager._blocks[block] for block in (0, 1)])
    counts = [manager.ref_count(block) for block in first.block_table]
    assert counts == [3, 3, 1], f"holders of blocks 0, 1 and 2: {counts}, should be [3, 3, 1]"


def test_take_saves_a_free_block_from_eviction():
    manager = manager_of(3)
    holding(manager, blocks_of(1, 2), [0, 1])
    free(manager, [1, 0])
    manager._take([manager._blocks[0]])
    assert manager.ref_count(0) == 1
    assert list(manager._evictable) == [1], "a block that somebody holds must not be evicted"


def test_put_back_counts_one_holder_less():
    manager = manager_of(6)
    first, second = sharing(manager)
    manager._put_back(first.block_table)
    counts = [manager.ref_count(block) for block in range(4)]
    assert counts == [1, 1, 0, 1], f"holders of blocks 0 to 3: {counts}, should be [1, 1, 0, 1]"
    assert manager.num_held == 3 and not manager._evictable
    manager.check([second])


def test_put_back_keeps_what_is_cached():
    manager = manager_of(4)
    seq = holding(manager, [*blocks_of(1), 2], [3, 1])
    manager._put_back(seq.block_table)
    assert list(manager._evictable) == [3], "block 3 is full and cached: it stays findable"
    assert 1 in manager._blank, "block 1 was never full: its content is worthless now"
    manager.check([])


def test_put_back_begins_at_the_end():
    manager = manager_of(4)
    seq = holding(manager, blocks_of(1, 2, 3), [2, 0, 3])
    manager._put_back(seq.block_table)
    order = list(manager._evictable)
    assert order == [3, 0, 2], (
        f"evicted in the order {order}; block 2 is the beginning and must be last"
    )


def test_put_back_of_a_shared_prefix():
    """The second to go gives the shared blocks back, and they come after what built on them."""
    manager = manager_of(6)
    first = holding(manager, blocks_of(1, 2), [0, 1])
    second = holding(manager, blocks_of(1, 3), [0, 4])
    manager._put_back(first.block_table)
    assert list(manager._evictable) == [1]
    manager._put_back(second.block_table)
    assert list(manager._evictable) == [1, 4, 0]
    manager.check([])


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_put_back_is_the_inverse_of_take_new(num_blocks: int):
    manager = manager_of(num_blocks)
    for _ in range(3):
        manager._put_back([manager._take_new() for _ in range(num_blocks)])
        assert manager.num_free == num_blocks
        manager.check([])
