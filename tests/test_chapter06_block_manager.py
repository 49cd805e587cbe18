"""Chapter 6: sequences and the block manager, in plain Python.

The central test runs random operations and pretends to compute: a cache of fingerprints shows
whether a shared block really holds what the sequence's prefix would have put there.
"""

from collections.abc import Sequence as Tokens

import pytest
from block_helpers import S, blocks_of, make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation import SimulatedCache, choose_token, fingerprints

from chapters.chapter06_block_manager.film import Pool
from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.events import EventLog
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.sequence import Sequence, Status


def compute(manager: BlockManager, seq: Sequence, count: int | None = None) -> None:
    """Pretend that a step ran ``count`` pending tokens of ``seq``, all by default."""
    end = len(seq) if count is None else seq.num_computed + count
    manager.cache_full_blocks(seq, end)
    seq.num_computed = end


def admitted(manager: BlockManager, token_ids: Tokens[int]) -> Sequence:
    """A sequence that holds blocks and is computed as far as it goes."""
    seq = make_sequence(token_ids)
    assert manager.admit(seq)
    compute(manager, seq)
    return seq


# ---------------------------------------------------------------------------- sequence


def test_sequence_keeps_its_own_copy_of_the_prompt():
    prompt = [1, 2, 3]
    seq = make_sequence(prompt)
    seq.append(4)
    prompt.append(9)
    assert seq.token_ids == [1, 2, 3, 4]
    assert prompt == [1, 2, 3, 9]
    assert seq.output_token_ids == [4]
    assert (seq.num_prompt_tokens, seq.num_output_tokens, len(seq)) == (3, 1, 4)


def test_sequence_ends_at_max_tokens():
    seq = make_sequence([1], max_tokens=2)
    seq.append(5)
    assert not seq.finished and seq.finish_reason is None
    seq.append(6)
    assert seq.finished and seq.finish_reason == "length"


def test_sequence_ends_where_its_context_is_full():
    for max_tokens in (None, 100):
        params = SamplingParams(max_tokens=max_tokens)
        seq = Sequence("r", [1, 2], params, arrival=0, seed=0, max_len=5)
        for token in (3, 4):
            seq.append(token)
            assert not seq.finished
        seq.append(5)
        assert seq.finish_reason == "length" and len(seq) == 5


@pytest.mark.parametrize(
    "ignore_eos, stop_token_ids, ends",
    [
        (False, None, {7}),
        (True, None, set()),
        (False, [3], {3, 7}),
        (True, [3], {3}),
        (True, [7], {7}),
    ],
)
def test_sequence_ends_at_an_end_token(ignore_eos, stop_token_ids, ends):
    params = SamplingParams(max_tokens=9, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids)
    for token in (3, 7):
        seq = Sequence("r", [7, 3], params, arrival=0, seed=0, max_len=99, eos_token_ids=(7,))
        assert seq.status is Status.WAITING
        seq.append(token)
        assert seq.finish_reason == ("stop" if token in ends else None)


def test_an_end_token_at_the_last_place_counts_as_stop():
    params = SamplingParams(max_tokens=1)
    seq = Sequence("r", [1], params, arrival=0, seed=0, max_len=9, eos_token_ids=(2,))
    seq.append(2)
    assert seq.finish_reason == "stop"


# ---------------------------------------------------------------------------- names of blocks


def test_block_names_chain():
    block = list(range(S))
    name = hash_block(0, block)
    assert name == hash_block(0, tuple(block)), "a name depends on the tokens alone"
    assert isinstance(name, int), f"a name is a number, not a {type(name).__name__}"
    assert 0 <= name < 2**64, f"{name} is no xxHash64: those lie from 0 to 2**64 - 1"
    others = {
        "behind block 1": hash_block(1, block),
        "behind the block itself": hash_block(name, block),
        "its tokens in another order": hash_block(0, block[::-1]),
        "another last token": hash_block(0, [*block[:-1], 99]),
        "another first token": hash_block(0, [99, *block[1:]]),
        "tokens above 2**32": hash_block(0, [token + 2**32 for token in block]),
    }
    same = [what for what, other in others.items() if other == name]
    assert not same, f"the same name although different: {', '.join(same)}"
    assert len({*others.values()}) == 6, f"two of these have one name: {', '.join(others)}"


# ---------------------------------------------------------------------------- one thing at a time


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_blocks_for(block_size):
    manager = BlockManager(3, block_size)
    wanted = {0: 0, 1: 1, block_size: 1, block_size + 1: 2, 2 * block_size: 2}
    assert {n: manager.blocks_for(n) for n in wanted} == wanted


@pytest.mark.parametrize("block_size", [0, 1, 8, 15, 17, 48, 512])
def test_block_sizes_that_will_not_do(block_size):
    with pytest.raises(ValueError, match=rf"block_size={block_size} must be a power of two"):
        BlockManager(3, block_size)


def test_a_pool_needs_a_block():
    with pytest.raises(ValueError, match="num_blocks=0 must be at least 1"):
        BlockManager(0, S)


def test_admit_takes_just_enough_blocks():
    manager = BlockManager(4, S)
    seq = make_sequence([1] * (S + 1))
    assert manager.admit(seq), "2 blocks of 4 free ones: admit says True"
    assert len(seq.block_table) == len(set(seq.block_table)) == 2, (
        f"17 tokens fill 2 blocks of 16; the table is {seq.block_table}"
    )
    assert (manager.num_held, manager.num_free) == (2, 2)
    assert seq.num_computed == 0 and seq.num_cached == 0, "nothing was cached"
    manager.check([seq])
    back = make_sequence([2] * S)
    back.append(3)
    assert manager.admit(back) and len(back.block_table) == 2, (
        "a prompt of 16 tokens that comes back with one of its answer needs 2 blocks"
    )


def test_admit_refuses_without_a_trace():
    manager = BlockManager(3, S)
    first = admitted(manager, blocks_of(1, 2))
    # It shares one block and needs two more, of which there is one.
    seq = make_sequence([*blocks_of(1, 3), 4])
    assert not manager.admit(seq), "it needs two new blocks, and one is free"
    left = seq.block_table, seq.prefix_chain, seq.num_computed, seq.num_cached
    assert left == ([], [], 0, None), (
        f"refused, but its table, chain, num_computed and num_cached are {left}"
    )
    assert manager.num_free == 1 and manager.ref_count(first.block_table[0]) == 1, (
        "refused, but it holds blocks"
    )
    manager.check([first])


def test_spare_blocks_stay_free():
    manager = BlockManager(4, S)
    assert not manager.admit(make_sequence(blocks_of(1, 2, 3)), spare=2), (
        "3 of 4 blocks leave 1, and 2 had to stay"
    )
    assert manager.num_free == 4
    assert manager.admit(make_sequence(blocks_of(1, 2, 3)), spare=1), (
        "3 of 4 blocks leave 1, and no more had to stay"
    )


def test_cached_blocks_that_nobody_holds_are_not_counted_twice():
    manager = BlockManager(3, S)
    manager.release(admitted(manager, blocks_of(1, 2, 3)))
    # All three blocks are free; two would be shared, which leaves one for the rest: 1 is needed.
    seq = make_sequence([*blocks_of(1, 2), 9])
    assert not manager.admit(seq, spare=1), "of 3 free blocks 2 are its own: 1 is left, not 3"
    assert manager.admit(seq), "two blocks are shared, the third is free: it fits"
    assert seq.num_computed == 2 * S and manager.num_free == 0
    manager.check([seq])


def test_grow():
    manager = BlockManager(2, S)
    seq = admitted(manager, [1] * S)
    for tokens, blocks in ((S, 1), (S + 1, 2), (2 * S, 2)):
        assert manager.grow(seq, tokens), f"there is room for {tokens} tokens"
        number = len(seq.block_table)
        assert number == blocks, f"room for {tokens} tokens: {number} blocks, should be {blocks}"
    assert not manager.grow(seq, 2 * S + 1), "33 tokens need a third block, and there are two"
    assert len(seq.block_table) == 2 and manager.num_held == 2
    manager.check([seq])
    wide = BlockManager(4, S)
    seq = admitted(wide, [1] * S)
    assert wide.grow(seq, 3 * S + 1) and len(seq.block_table) == 4, "49 tokens fill 4 blocks"


def test_the_same_prefix_is_stored_once():
    manager = BlockManager(8, S)
    first = admitted(manager, [*blocks_of(1, 2), 7])
    second = make_sequence([*blocks_of(1, 2), 8])
    assert manager.admit(second)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2], "a block that is not full is private"
    assert second.num_computed == second.num_cached == 2 * S
    assert [manager.ref_count(block) for block in second.block_table] == [2, 2, 1]
    assert manager.num_held == 4
    manager.check([first, second])
    manager.release(first)
    assert [manager.ref_count(block) for block in second.block_table] == [1, 1, 1]
    manager.check([second])


def test_the_same_block_after_another_prefix_is_another_block():
    manager = BlockManager(8, S)
    admitted(manager, blocks_of(1, 2))
    seq = make_sequence([*blocks_of(3, 2), 9])
    assert manager.admit(seq)
    assert seq.num_computed == 0


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_prompt_that_is_cached_whole_computes_its_last_block(num_blocks):
    """Its last token must run, for its logits choose the next one."""
    prompt = blocks_of(*range(num_blocks))
    manager = BlockManager(8, S)
    manager.release(admitted(manager, prompt))
    seq = make_sequence(prompt)
    assert manager.admit(seq)
    assert seq.num_pending == S, (
        f"all {len(prompt)} tokens are cached: {seq.num_pending} run, should be the last {S}"
    )
    assert seq.num_computed == (num_blocks - 1) * S
    # One token more, and the last full block may be shared as well.
    longer = make_sequence([*prompt, 5])
    assert manager.admit(longer)
    assert longer.num_pending == 1


def test_a_prompt_of_one_block_that_fills_the_pool_can_come_again():
    manager = BlockManager(1, S)
    for _ in range(3):
        manager.release(admitted(manager, blocks_of(1)))
    assert manager.num_free == 1


def test_two_equal_prompts_in_one_step_share():
    """The second finds what the first is only about to compute."""
    manager = BlockManager(8, S)
    first, second = (make_sequence([*blocks_of(1, 2), 3]) for _ in range(2))
    assert manager.admit(first)
    manager.cache_full_blocks(first, len(first))
    assert manager.admit(second)
    assert second.num_computed == 2 * S
    assert second.block_table[:2] == first.block_table[:2]


def test_only_what_is_scheduled_is_shared():
    """The second chunk of a long prompt is not there yet."""
    manager = BlockManager(16, S)
    first, second = (make_sequence([*blocks_of(1, 2, 3), 4]) for _ in range(2))
    assert manager.admit(first)
    compute(manager, first, 2 * S - 1)
    assert manager.admit(second)
    assert second.num_computed == S


def test_equal_blocks_computed_side_by_side_stay_private():
    manager = BlockManager(8, S)
    first, second = (make_sequence([*blocks_of(1), 2]) for _ in range(2))
    assert manager.admit(first) and manager.admit(second)
    compute(manager, first)
    compute(manager, second)
    assert not set(first.block_table) & set(second.block_table)
    manager.check([first, second])
    third = make_sequence([*blocks_of(1), 3])
    assert manager.admit(third)
    assert third.block_table[0] == first.block_table[0]
    for seq in (first, second, third):
        manager.release(seq)
    manager.check([])
    assert manager.num_free == 8


def test_without_prefix_caching_nothing_is_shared():
    manager = BlockManager(8, S, enable_prefix_caching=False)
    manager.release(admitted(manager, blocks_of(1, 2)))
    seq = make_sequence([*blocks_of(1, 2), 3])
    assert manager.admit(seq)
    assert seq.num_computed == 0 and seq.num_cached == 0


def test_num_cached_is_what_was_found_at_first():
    """A request that comes back after preemption did not find its prompt by itself."""
    manager = BlockManager(8, S)
    seq = admitted(manager, [*blocks_of(1, 2), 3])
    manager.release(seq)
    assert manager.admit(seq)
    assert seq.num_computed == 2 * S and seq.num_cached == 0


def test_a_reused_block_loses_its_old_name():
    """A block's old name must not lead to its new content."""
    manager = BlockManager(2, S)
    manager.release(admitted(manager, blocks_of(1, 2)))
    # Both blocks are overwritten, and nothing of the new content is a full block.
    manager.release(admitted(manager, [9] * (S - 1)))
    manager.release(admitted(manager, [8] * (S - 1)))
    other = make_sequence([7] * (S + 1))
    assert manager.admit(other)
    compute(manager, other, S - 1)
    manager.release(other)
    seq = make_sequence([*blocks_of(1), 2])
    assert manager.admit(seq)
    assert seq.num_computed == 0, "found by its old name a block that others have written over"
    manager.check([seq])


def test_a_name_that_a_newer_block_took_over_survives_the_older_block():
    """With colliding names, dropping one block must not make another one unfindable."""
    manager = BlockManager(4, S, hash_function=lambda previous, tokens: 7)
    manager.release(admitted(manager, blocks_of(1)))
    manager.release(admitted(manager, blocks_of(2)))
    manager.check([])
    seq = make_sequence([*blocks_of(2), 3])
    assert manager.admit(seq)
    assert seq.num_computed == S
    manager.check([seq])


def test_colliding_names_are_told_apart_by_their_tokens():
    manager = BlockManager(8, S, hash_function=lambda previous, tokens: 7)
    first = admitted(manager, blocks_of(1, 2))
    seq = make_sequence([*blocks_of(3), 3])
    assert manager.admit(seq)
    assert seq.num_computed == 0
    manager.check([first, seq])


def test_colliding_names_are_told_apart_by_what_stands_before():
    """Equal tokens with equal names after different prefixes: here only the first block differs."""
    manager = BlockManager(8, S, hash_function=lambda previous, tokens: tokens[0])
    held = [admitted(manager, blocks_of(1, 5)), admitted(manager, blocks_of(2))]
    seq = make_sequence([*blocks_of(2, 5), 9])
    assert manager.admit(seq)
    assert seq.num_computed == S, "block 5 was computed after block 1, not after block 2"
    manager.check([*held, seq])


def test_a_colliding_block_does_not_adopt_what_follows_another():
    """Block 6 was computed after blocks 2 and 5, and must not be found after blocks 1 and 5."""
    manager = BlockManager(12, S, hash_function=lambda previous, tokens: tokens[0])
    held = [admitted(manager, blocks_of(1, 5)), admitted(manager, blocks_of(2, 5, 6))]
    seq = make_sequence([*blocks_of(1, 5, 6), 9])
    assert manager.admit(seq)
    assert seq.num_computed <= 2 * S
    manager.check([*held, seq])


def num_found(manager: BlockManager, token_ids: Tokens[int]) -> int:
    """How many blocks are cached for this beginning; looking does not count as use."""
    return len(manager._find_prefix(make_sequence([*token_ids, 0])))


def test_the_least_recently_used_block_is_evicted_first():
    manager = BlockManager(4, S)
    for value in (1, 2, 3):
        manager.release(admitted(manager, blocks_of(value)))
    # A hit makes block 1 the most recently used.
    manager.release(admitted(manager, [*blocks_of(1), 0]))
    evicted = []
    for _ in range(3):
        before = {value for value in (1, 2, 3) if num_found(manager, blocks_of(value))}
        # The first of these takes the blank block as well.
        seq = make_sequence([9] * (2 * S - 1 if not evicted else S - 1))
        assert manager.admit(seq)
        after = {value for value in (1, 2, 3) if num_found(manager, blocks_of(value))}
        evicted += before - after
    assert evicted == [2, 3, 1]


def test_a_prefix_outlives_what_builds_on_it():
    manager = BlockManager(3, S)
    manager.release(admitted(manager, blocks_of(1, 2, 3)))
    for left in (2, 1, 0):
        assert manager.admit(make_sequence([9]))
        found = num_found(manager, blocks_of(1, 2, 3))
        assert found == left, f"{3 - left} of 3 blocks evicted, from the end: found {found}"


def test_blank_blocks_go_before_cached_ones():
    manager = BlockManager(3, S)
    manager.release(admitted(manager, blocks_of(1)))
    for value in (2, 3):
        assert manager.admit(make_sequence([value]))
    assert num_found(manager, blocks_of(1)) == 1
    assert manager.admit(make_sequence([4])), "a cached block that nobody holds is free"
    assert num_found(manager, blocks_of(1)) == 0


def test_release_leaves_a_clean_sequence():
    manager = BlockManager(4, S)
    seq = admitted(manager, [*blocks_of(1), 2])
    manager.release(seq)
    assert (seq.block_table, seq.prefix_chain, seq.num_computed) == ([], [], 0)
    assert manager.num_free == 4
    manager.release(seq)
    assert manager.num_free == 4, "releasing nothing changes nothing"


def test_forget_all_while_blocks_are_held():
    manager = BlockManager(6, S)
    held = admitted(manager, [*blocks_of(1, 2), 3])
    manager.release(admitted(manager, blocks_of(4, 5)))
    manager.forget_all()
    manager.check([held])
    assert manager.num_held == 3
    for prompt in ([*blocks_of(1, 2), 3], [*blocks_of(4, 5), 6]):
        seq = make_sequence(prompt)
        assert manager.admit(seq) and seq.num_computed == 0
        manager.release(seq)
    # The held sequence goes on, and what it fills from now on is found only behind its own prefix.
    held.token_ids += [3] * S
    assert manager.grow(held, len(held))
    compute(manager, held)
    manager.check([held])
    manager.release(held)
    assert manager.num_free == 6


def test_peak_counts_shared_blocks_once():
    manager = BlockManager(8, S)
    assert manager.peak_held == 0
    first = admitted(manager, [*blocks_of(1, 2), 3])
    second = admitted(manager, [*blocks_of(1, 2), 4])
    assert manager.peak_held == 4
    manager.release(first)
    assert manager.grow(second, 4 * S)
    assert manager.peak_held == 4
    assert manager.grow(second, 5 * S)
    manager.release(second)
    assert manager.peak_held == 5 and manager.num_held == 0


# ---------------------------------------------------------------------------- anything at all

# Few different blocks, and tails that begin like a block, so that prefixes meet often.
BLOCK_VALUES = st.integers(0, 1)
PROMPTS = st.builds(
    lambda values, last, tail: [*blocks_of(*values), *[last] * tail],
    st.lists(BLOCK_VALUES, max_size=4),
    BLOCK_VALUES,
    st.integers(0, S),
).filter(bool)
CHUNKS = st.sampled_from([1, 5, S, 2 * S, 100])
ACTIONS = st.one_of(
    st.tuples(st.just("admit"), PROMPTS, CHUNKS, st.integers(0, 2)),
    st.tuples(st.just("go on"), st.integers(0, 20), CHUNKS),
)
HASHES = {
    "xxhash": hash_block,
    "all collide": lambda previous, tokens: 7,
    "many collide": lambda previous, tokens: sum(tokens) % 2,
    "no chain": lambda previous, tokens: hash_block(0, tokens),
}


class Blocks(RuleBasedStateMachine):
    """Sequences come, run in chunks, generate, and go; every read is checked.

    Beside them the event log is replayed, and must tell the same.
    """

    @initialize(
        num_blocks=st.integers(1, 12), caching=st.booleans(), naming=st.sampled_from(list(HASHES))
    )
    def start(self, num_blocks: int, caching: bool, naming: str) -> None:
        self.log = EventLog()
        self.replayed, self.pool = 0, Pool(num_blocks)
        self.manager = BlockManager(
            num_blocks,
            S,
            enable_prefix_caching=caching,
            hash_function=HASHES[naming],
            events=self.log,
        )
        self.kv = SimulatedCache(num_blocks, S)
        self.live: list[Sequence] = []
        self.peak = 0

    @rule(actions=st.lists(ACTIONS, min_size=1, max_size=4))
    def step(self, actions: list[tuple]) -> None:
        scheduled: dict[int, tuple[Sequence, int]] = {}
        for kind, what, chunk, *rest in actions:
            seq = self._admit(what, *rest) if kind == "admit" else self._pick(what)
            if seq is None or id(seq) in scheduled:
                continue
            count = min(chunk, seq.num_pending)
            assert count > 0, "nothing to compute"
            self.manager.cache_full_blocks(seq, seq.num_computed + count)
            scheduled[id(seq)] = seq, count
            self.manager.check(self.live)
        ends = self.kv.run(scheduled.values())
        for (seq, count), end in zip(scheduled.values(), ends, strict=True):
            seq.num_computed += count
            if seq.num_pending == 0:
                seq.append(choose_token(end))

    def _admit(self, prompt: list[int], spare: int) -> Sequence | None:
        seq, free = make_sequence(prompt), self.manager.num_free
        if not self.manager.admit(seq, spare=spare):
            assert self.manager.blocks_for(len(seq)) + spare > free
            assert self.manager.num_free == free and not seq.block_table
            return None
        self.live.append(seq)
        assert len(seq.block_table) == self.manager.blocks_for(len(seq))
        assert self.manager.num_free >= spare
        assert 0 <= seq.num_computed < len(seq)
        return seq

    def _pick(self, index: int) -> Sequence | None:
        if not self.live:
            return None
        seq = self.live[index % len(self.live)]
        needed = self.manager.blocks_for(len(seq)) - len(seq.block_table)
        free = self.manager.num_free
        grown = self.manager.grow(seq, len(seq))
        assert grown == (needed <= free)
        assert self.manager.num_free == (free - max(0, needed) if grown else free)
        return seq if grown else None

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 20))
    def release(self, index: int) -> None:
        self.manager.release(self.live.pop(index % len(self.live)))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 20))
    def preempt(self, index: int) -> None:
        """Release, and come back at once with all that was generated so far."""
        seq = self.live.pop(index % len(self.live))
        self.manager.release(seq)
        free = self.manager.num_free
        if self.manager.admit(seq):
            self.live.append(seq)
        else:
            assert self.manager.num_free == free

    @rule()
    def forget_all(self) -> None:
        self.manager.forget_all()

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check(self.live)
        assert self.manager.num_free + self.manager.num_held == self.manager.num_blocks
        self.peak = max(self.peak, self.manager.num_held)
        assert self.manager.peak_held == self.peak
        for event in self.log.events[self.replayed :]:
            self.pool.apply(event)
        self.replayed = len(self.log.events)
        for block in self.manager._blocks:
            assert len(self.pool.holders[block.block_id]) == block.ref_count
            assert self.pool.findable[block.block_id] == (block.hash is not None)

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for seq in self.live:
            self.manager.release(seq)
        self.manager.check([])
        assert self.manager.num_free == self.manager.num_blocks


Blocks.TestCase.settings = settings(
    derandomize=True, deadline=None, max_examples=100, stateful_step_count=25
)
test_blocks_under_any_operations = Blocks.TestCase


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.tuples(PROMPTS, st.booleans()), min_size=2, max_size=12))
def test_every_block_that_can_be_shared_is_shared(requests):
    """With room for all and honest names, hits are exactly the full blocks seen before."""
    manager, seen = BlockManager(100, S), set()
    for prompt, stays in requests:
        seq = make_sequence(prompt)
        assert manager.admit(seq)
        marks = fingerprints(prompt)[S - 1 :: S]
        usable = marks[: (len(prompt) - 1) // S]
        hits = 0
        while hits < len(usable) and usable[hits] in seen:
            hits += 1
        assert seq.num_computed == hits * S
        compute(manager, seq)
        seen.update(marks)
        if not stays:
            manager.release(seq)
