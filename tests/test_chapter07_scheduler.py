"""Chapter 7: the scheduler, in plain Python.

No model runs here. A cache of fingerprints stands for the KV cache, and the pretended model chooses
each token from the fingerprint that it reads; so a request that was scheduled wrongly, shared a
wrong block or lost its place does not only look wrong, it also says something else.
"""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import SimulatedCache, choose_token, generate_alone

from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.scheduler import POLICIES, Scheduler, Step
from minivllm.engine.sequence import Sequence, Status

S = 16


@dataclass
class Request:
    """prompt: token ids. max_tokens: how many it wants. arrives: at which step."""

    prompt: list[int]
    max_tokens: int
    arrives: int = 0


@dataclass
class World:
    """A scheduler with everything around it pretended."""

    policy: str = "prefill_first"
    num_blocks: int = 8
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 64
    caching: bool = True
    hash_function: object = hash_block
    arrivals: int = 0
    num_steps: int = 0
    first_scheduled: list[int] = field(default_factory=list)
    # Of the newest step, before it ran: whether each scheduled sequence samples, and decodes.
    samples: list[bool] = field(default_factory=list)
    decodes: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = BlockManager(
            self.num_blocks,
            S,
            enable_prefix_caching=self.caching,
            hash_function=self.hash_function,
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            policy=self.policy,
        )
        self.kv = SimulatedCache(self.num_blocks, S)

    def add(self, prompt: list[int], max_tokens: int = 8) -> Sequence:
        seq = Sequence(
            f"r{self.arrivals}",
            prompt,
            SamplingParams(max_tokens=max_tokens),
            arrival=self.arrivals,
            seed=0,
            max_len=self.num_blocks * S,
        )
        self.arrivals += 1
        self.scheduler.add(seq)
        return seq

    def step(self, *, fails: bool = False) -> Step:
        """Schedule, check everything that must hold of any step, pretend to run, commit."""
        scheduler = self.scheduler
        running = list(scheduler.running)
        decoding = [seq for seq in running if seq.num_pending == 1]
        step = scheduler.schedule()
        self.num_steps += 1
        self.check_step(step, running, decoding)
        self.check_state()
        for item in step.scheduled:
            if item.seq.arrival not in self.first_scheduled:
                self.first_scheduled.append(item.seq.arrival)
        self.samples = [item.samples for item in step.scheduled]
        self.decodes = [item.decodes for item in step.scheduled]
        batch = [(item.seq, item.num_tokens) for item in step.scheduled]
        ends = self.kv.run(batch, fails=fails)
        if fails:
            scheduler.recover()
            assert not scheduler.running and self.blocks.num_held == 0
            self.check_state()
            return step
        sampling = list(zip(step.scheduled, ends, self.samples, strict=True))
        lengths = [len(item.seq) for item in step.scheduled]
        advanced = scheduler.commit(
            step, [choose_token(end) for _, end, wanted in sampling if wanted]
        )
        assert advanced == [item.seq for item, _, wanted in sampling if wanted]
        grown = [
            len(item.seq) - length for item, length in zip(step.scheduled, lengths, strict=True)
        ]
        assert grown == self.samples
        self.check_state()
        return step

    def check_step(self, step: Step, running: list[Sequence], decoding: list[Sequence]) -> None:
        """running, decoding: the sequences that held blocks when the step was chosen."""
        sequences = [item.seq for item in step.scheduled]
        assert len({id(seq) for seq in sequences}) == len(sequences) <= self.max_num_seqs
        assert step.num_tokens <= self.max_num_batched_tokens
        assert all(1 <= item.num_tokens <= item.seq.num_pending for item in step.scheduled)
        assert all(seq.status is Status.RUNNING for seq in sequences)
        assert bool(step.scheduled) == self.scheduler.has_unfinished
        # The newest make room, and nobody who is newer keeps what an older one had to give.
        gone = [seq.arrival for seq in step.preempted]
        assert gone == [seq.arrival for seq in running[::-1]][: len(gone)]
        survivors = [seq for seq in decoding if seq not in step.preempted]
        chunks = any(item.num_tokens > 1 for item in step.scheduled)
        if self.policy == "mixed":
            assert all(seq in sequences for seq in survivors), "a decode had to wait"
        elif chunks:
            assert not any(seq in sequences for seq in decoding), "decodes beside a prompt"
        else:
            # Prompts that need one more token only look like decodes.
            ran = [seq in sequences for seq in survivors]
            assert all(ran) or not any(ran)

    def check_state(self) -> None:
        scheduler = self.scheduler
        self.blocks.check(scheduler.running)
        assert len(scheduler.running) <= self.max_num_seqs
        order = [seq.arrival for seq in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order), "somebody has been overtaken"
        assert all(seq.num_computed < len(seq) for seq in scheduler.running)
        assert all(not seq.block_table for seq in scheduler.waiting)

    def finish_all(self, limit: int = 10_000) -> None:
        while self.scheduler.has_unfinished:
            assert self.num_steps < limit, "a livelock"
            self.step()
        assert self.blocks.num_free == self.num_blocks


def ran(step: Step) -> list[tuple[int, int]]:
    """(arrival, number of tokens) of everything that a step runs."""
    return [(item.seq.arrival, item.num_tokens) for item in step.scheduled]


# ---------------------------------------------------------------------------- anything at all


# Few different tokens and prompts, so that prefixes meet often.
PROMPTS = st.builds(
    lambda values, last, tail: [v for v in values for _ in range(S)] + [last] * tail,
    st.lists(st.integers(0, 1), max_size=3),
    st.integers(0, 1),
    st.integers(0, S),
).filter(bool)
REQUESTS = st.lists(
    st.builds(Request, PROMPTS, st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=9
)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    max_num_seqs = draw(st.integers(1, 6))
    return World(
        policy=draw(st.sampled_from(POLICIES)),
        num_blocks=draw(st.integers(1, 12)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.sampled_from([0, 1, 7, 30, 100])),
        caching=draw(st.booleans()),
        hash_function=draw(st.sampled_from([hash_block, lambda previous, tokens: 7])),
    )


def steps_allowed(world: World, requests: list[Request], failures: int) -> int:
    """More steps than any workload needs.

    Between two steps that bring the oldest request a token, every other one is prefilled at most
    once; a failed step costs everybody one more prefill.
    """
    longest = world.num_blocks * S
    prefills = len(requests) * -(-longest // world.max_num_batched_tokens)
    tokens = sum(min(request.max_tokens, longest) for request in requests)
    last_arrival = max(request.arrives for request in requests)
    return last_arrival + (tokens + failures + 1) * (prefills + 1)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    worlds(),
    REQUESTS,
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), max_size=4),
    st.sets(st.integers(0, 40), max_size=2),
)
def test_any_workload(world, requests, aborts, failures):
    """Everybody finishes, in order of arrival, with the tokens that they would get alone."""
    limit = steps_allowed(world, requests, len(failures))
    coming = deque(sorted(requests, key=lambda request: request.arrives))
    sequences: list[Sequence] = []
    aborted: set[int] = set()
    while coming or world.scheduler.has_unfinished:
        assert world.num_steps < limit, "a livelock"
        now = world.num_steps
        while coming and (coming[0].arrives <= now or not world.scheduler.has_unfinished):
            request = coming.popleft()
            room = world.num_blocks * S - 1
            sequences.append(world.add(request.prompt[:room], request.max_tokens))
        for at, place in aborts:
            if at == now and place < len(sequences) and not sequences[place].finished:
                world.scheduler.finish(sequences[place], "abort")
                aborted.add(place)
                world.check_state()
        if world.scheduler.has_unfinished:
            world.step(fails=now in failures)
        else:
            world.num_steps += 1
    assert world.blocks.num_free == world.num_blocks
    for place, seq in enumerate(sequences):
        alone = generate_alone(seq.token_ids[: seq.num_prompt_tokens], seq.max_tokens)
        if place in aborted:
            assert seq.finish_reason == "abort"
            assert seq.output_token_ids == alone[: seq.num_output_tokens]
        else:
            assert seq.finish_reason == "length"
            assert seq.output_token_ids == alone
    assert world.first_scheduled == sorted(world.first_scheduled), "somebody was overtaken"
    assert world.scheduler.num_preemptions == sum(seq.num_preemptions for seq in sequences)


# ---------------------------------------------------------------------------- step by step


def test_prefill_first_runs_prompts_before_decodes():
    world = World()
    world.add([1] * 20)
    assert ran(world.step()) == [(0, 20)]
    assert ran(world.step()) == [(0, 1)]
    world.add([2] * 10)
    world.add([3] * 11)
    assert ran(world.step()) == [(1, 10), (2, 11)]
    assert ran(world.step()) == [(0, 1), (1, 1), (2, 1)]


def test_mixed_runs_decodes_and_chunks_together():
    world = World(policy="mixed", max_num_batched_tokens=10)
    world.add([1] * 9)
    assert ran(world.step()) == [(0, 9)]
    world.add([2] * 25)
    assert [ran(world.step()) for _ in range(4)] == [
        [(0, 1), (1, 9)],
        [(0, 1), (1, 9)],
        [(0, 1), (1, 7)],
        [(0, 1), (1, 1)],
    ]


def test_prefill_first_cuts_a_long_prompt_into_chunks():
    world = World(max_num_batched_tokens=10)
    world.add([1] * 24)
    world.add([2] * 3)
    steps = [(ran(world.step()), world.samples) for _ in range(4)]
    assert steps == [
        ([(0, 10)], [False]),
        ([(0, 10)], [False]),
        ([(0, 4), (1, 3)], [True, True]),
        ([(0, 1), (1, 1)], [True, True]),
    ]


def test_a_prompt_of_one_token_is_no_decode():
    world = World()
    world.add([1])
    world.step()
    assert world.decodes == [False]
    world.step()
    assert world.decodes == [True]


def test_a_request_with_its_whole_prompt_cached_runs_its_last_block():
    world = World()
    world.add([1] * 32, max_tokens=1)
    assert ran(world.step()) == [(0, 32)]
    second = world.add([1] * 32, max_tokens=1)
    assert ran(world.step()) == [(1, 16)]
    assert second.num_cached == 16
    assert second.output_token_ids == generate_alone([1] * 32, 1)


def test_equal_prompts_in_one_step_are_computed_once():
    world = World(num_blocks=12, max_num_seqs=6, max_num_batched_tokens=100)
    sequences = [world.add([1] * 33, max_tokens=3) for _ in range(6)]
    assert ran(world.step()) == [(0, 33), *((arrival, 1) for arrival in range(1, 6))]
    assert world.blocks.num_held == 2 + 6
    world.finish_all()
    assert {tuple(seq.output_token_ids) for seq in sequences} == {
        tuple(generate_alone([1] * 33, 3))
    }


def test_a_small_request_does_not_overtake_a_large_one():
    """The pool has room for the small one, but its turn comes after the large one."""
    world = World(num_blocks=4)
    world.add([1] * 40, max_tokens=4)
    large = world.add([2] * 40, max_tokens=2)
    small = world.add([3] * 4, max_tokens=2)
    world.step()
    while world.scheduler.running and world.scheduler.running[0].arrival == 0:
        assert large.status is small.status is Status.WAITING
        world.step()
    world.finish_all()
    assert world.first_scheduled == [0, 1, 2]


def test_no_more_than_max_num_seqs_run():
    world = World(max_num_seqs=2)
    for value in range(5):
        world.add([value] * 3, max_tokens=4)
    world.step()
    assert len(world.scheduler.running) == 2 and len(world.scheduler.waiting) == 3
    world.finish_all()
    assert world.first_scheduled == [0, 1, 2, 3, 4]


def preempting_world(policy: str) -> tuple[World, list[Sequence]]:
    """Three requests of 15 tokens that soon need two blocks each, in a pool of four."""
    world = World(policy=policy, num_blocks=4, max_num_seqs=3, caching=False)
    sequences = [world.add([value] * 15, max_tokens=6) for value in (1, 2, 3)]
    return world, sequences


@pytest.mark.parametrize("policy", POLICIES)
def test_the_newest_makes_room(policy):
    world, (first, second, third) = preempting_world(policy)
    preempted = []
    while world.scheduler.has_unfinished:
        preempted += [(seq.arrival, len(seq)) for seq in world.step().preempted]
    # Token 17 of the first takes the last block. The second finds none, and the third must go.
    assert preempted[0] == (2, 17)
    assert {arrival for arrival, _ in preempted} == {2}
    assert first.num_preemptions == second.num_preemptions == 0
    assert world.scheduler.num_preemptions == third.num_preemptions == len(preempted)
    for value, seq in ((1, first), (2, second), (3, third)):
        assert seq.output_token_ids == generate_alone([value] * 15, 6)


@pytest.mark.parametrize("policy", POLICIES)
def test_who_was_preempted_waits_at_the_head(policy):
    world, (_, _, third) = preempting_world(policy)
    fourth = world.add([4] * 2, max_tokens=1)
    while not third.num_preemptions:
        world.step()
    assert list(world.scheduler.waiting) == [third, fourth]
    assert not third.block_table and third.num_computed == 0


def test_a_victim_is_not_admitted_again_in_the_same_step():
    world, (_, _, third) = preempting_world("mixed")
    while not third.num_preemptions:
        step = world.step()
    assert step.preempted == [third]
    assert third not in [item.seq for item in step.scheduled]


def test_one_request_can_use_the_whole_pool():
    world = World(num_blocks=2, max_num_batched_tokens=4)
    seq = world.add([1] * 5, max_tokens=1000)
    world.add([2] * 31, max_tokens=1000)
    world.finish_all()
    assert len(seq) == 32 and seq.num_preemptions == 0
    assert seq.output_token_ids == generate_alone([1] * 5, 27)


def test_ample_blocks_preempt_nobody():
    world = World(num_blocks=100, max_num_seqs=8)
    for value in range(12):
        world.add([value] * (5 * value + 1), max_tokens=20)
    world.finish_all()
    assert world.scheduler.num_preemptions == 0


def test_some_blocks_stay_free_for_those_that_run():
    """A pool of 8 keeps one block back, unless nobody runs."""
    world = World(num_blocks=8, max_num_batched_tokens=200)
    world.add([1] * 60)
    world.add([2] * 64)
    world.step()
    assert [seq.arrival for seq in world.scheduler.running] == [0]
    alone = World(num_blocks=8, max_num_batched_tokens=200)
    alone.add([1] * 127)
    assert ran(alone.step()) == [(0, 127)]


def test_finish_where_it_stands():
    world = World(max_num_seqs=2)
    running, other, waiting = (world.add([value] * 20) for value in (1, 2, 3))
    world.step()
    world.scheduler.finish(waiting, "abort")
    world.scheduler.finish(running, "abort")
    world.check_state()
    assert running.finish_reason == waiting.finish_reason == "abort"
    assert list(world.scheduler.waiting) == [] and world.scheduler.running == [other]
    assert world.blocks.num_held == 2
    world.finish_all()
    assert other.output_token_ids == generate_alone([2] * 20, 8)


def test_recover_keeps_order_and_trusts_no_block():
    world = World(max_num_batched_tokens=70)
    sequences = [world.add([value] * 20, max_tokens=5) for value in (1, 1, 2, 3, 4)]
    world.step()
    world.step(fails=True)
    assert list(world.scheduler.waiting) == sequences
    # The blocks of the failed step hold garbage: the first request computes all of its own anew.
    assert ran(world.step())[:2] == [(0, 21), (1, 5)]
    world.finish_all()
    for value, seq in zip((1, 1, 2, 3, 4), sequences, strict=True):
        assert seq.output_token_ids == generate_alone([value] * 20, 5)


def test_an_empty_scheduler_schedules_nothing():
    world = World()
    assert not world.scheduler.has_unfinished
    assert world.scheduler.schedule().scheduled == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        (
            {"max_num_seqs": 9, "max_num_batched_tokens": 8},
            "max_num_batched_tokens=8 is less than max_num_seqs=9.*raise the first or lower",
        ),
        ({"policy": "random"}, "policy='random' must be one of"),
    ],
)
def test_settings_that_will_not_do(settings, message):
    with pytest.raises(ValueError, match=message):
        World(**settings)
