"""Chapter 7's methods one by one, on schedulers and engines whose state was put there by hand."""

from types import SimpleNamespace

import pytest
import torch
from block_helpers import make_sequence

from minivllm.engine.batches import lay_out
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.model_runner import ModelRunner, StepResult
from minivllm.engine.request import Request
from minivllm.engine.scheduler import ScheduledSequence, Scheduler, Step
from minivllm.engine.sequence import UNKNOWN, Sequence, Status

S = 16


def scheduler_of(num_blocks: int, **settings: int) -> Scheduler:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 32, **settings}
    manager = BlockManager(num_blocks, S, enable_prefix_caching=False)
    return Scheduler(manager, policy="mixed", **settings)


def sequence_of(name: str, length: int, max_tokens: int = 100) -> Sequence:
    seq = make_sequence(range(length), max_tokens)
    seq.request_id = name
    return seq


def running(scheduler: Scheduler, name: str, prompt: int, computed: int, new: int = 0) -> Sequence:
    """A sequence that holds blocks; of its prompt and ``new`` tokens so many are computed."""
    seq = sequence_of(name, prompt)
    seq.token_ids += range(1000, 1000 + new)
    assert scheduler.block_manager.admit(seq)
    seq.num_computed, seq.status = computed, Status.RUNNING
    scheduler.running.append(seq)
    return seq


def waiting(scheduler: Scheduler, name: str, prompt: int) -> Sequence:
    seq = sequence_of(name, prompt)
    scheduler.waiting.append(seq)
    return seq


def names(sequences: object) -> list[str]:
    return [seq.request_id for seq in sequences]


def ran(step: Step) -> list[tuple[str, int]]:
    return [(item.seq.request_id, item.num_tokens) for item in step.scheduled]


# ---------------------------------------------------------------------------- a step is recorded


def item(seq: Sequence, num_tokens: int, *, samples: bool) -> ScheduledSequence:
    return ScheduledSequence(seq, num_tokens, samples, False)


def test_advance_counts_and_reserves():
    scheduler = scheduler_of(8)
    chunk, last, decode = (
        running(scheduler, "chunk", 50, 0),
        running(scheduler, "last", 20, 16),
        running(scheduler, "decode", 10, 11, new=2),
    )
    step = Step(
        [item(chunk, 32, samples=False), item(last, 4, samples=True), item(decode, 1, samples=True)]
    )
    scheduler.advance(step)
    computed = [seq.num_computed for seq in (chunk, last, decode)]
    assert computed == [32, 20, 12], f"computed {computed}, should be 0 + 32, 16 + 4, 11 + 1"
    lengths = [len(seq) for seq in (chunk, last, decode)]
    assert lengths == [50, 21, 13], (
        f"lengths {lengths}, were [50, 20, 12]; who samples, and only who does, gets a place"
    )
    assert last.token_ids[-1] == decode.token_ids[-1] == UNKNOWN


def test_resolve_puts_the_token_in_its_place():
    scheduler = scheduler_of(8)
    seq = running(scheduler, "ann", 10, 10)
    seq.reserve()
    assert scheduler.resolve(seq, 7) is True, "the token is ann's: resolve says True"
    tokens = seq.token_ids[10:]
    assert tokens == [7], f"{tokens} behind the prompt; token 7 goes into the place that waits"
    assert seq.num_unknown == 0
    assert scheduler.running == [seq] and seq.block_table, "ann has not finished"


def test_resolve_gives_back_the_blocks_of_who_finished():
    scheduler = scheduler_of(8)
    ann, bob = running(scheduler, "ann", 10, 10), running(scheduler, "bob", 10, 10)
    ann.max_tokens = 1
    ann.reserve()
    assert scheduler.resolve(ann, 7) is True, "the token is ann's, even if it is her last"
    still = names(scheduler.running)
    assert ann.finished and still == ["bob"], f"running: {still}; ann has finished"
    assert not ann.block_table, "ann has finished, but holds blocks"
    scheduler.block_manager.check([bob])


def test_resolve_when_a_token_comes_too_late():
    """With one step ahead of another, its token may belong to a request that has ended."""
    scheduler = scheduler_of(8)
    seq = running(scheduler, "ann", 10, 10)
    scheduler.finish(seq, "abort")
    assert scheduler.resolve(seq, 7) is False
    assert seq.output_token_ids == []


def test_resolve_of_who_was_preempted_meanwhile():
    scheduler = scheduler_of(8)
    seq = running(scheduler, "ann", 10, 10)
    seq.max_tokens = 1
    seq.reserve()
    scheduler._preempt(seq, Step())
    assert scheduler.resolve(seq, 7) is True
    assert seq.finished and not scheduler.waiting, "a finished request waits in the queue"


# ---------------------------------------------------------------------------- decodes


def test_decodes_run_one_token_each_oldest_first():
    scheduler = scheduler_of(8)
    running(scheduler, "ann", 10, 11, new=2)
    running(scheduler, "bob", 40, 16)
    running(scheduler, "cem", 5, 5, new=1)
    step = Step()
    scheduler._schedule_decodes(step)
    assert ran(step) == [("ann", 1), ("cem", 1)], "bob is still in his prompt"
    assert not step.preempted


def test_decodes_wait_for_nobody_who_is_exhausted():
    """All tokens that ann may generate have a place already; nothing is left to run."""
    scheduler = scheduler_of(8)
    ann = running(scheduler, "ann", 10, 10)
    running(scheduler, "bob", 10, 10, new=1)
    ann.max_tokens = 1
    ann.reserve()
    step = Step()
    scheduler._schedule_decodes(step)
    assert ran(step) == [("bob", 1)], f"ran {ran(step)}; ann is exhausted"


def test_a_decode_asks_for_a_block_only_when_it_needs_one():
    scheduler = scheduler_of(3)
    ann = running(scheduler, "ann", 10, 15, new=6)
    ann.num_computed, ann.token_ids = 15, list(range(16))
    scheduler._schedule_decodes(Step())
    assert len(ann.block_table) == 1, "16 tokens fit into one block"
    ann.num_computed, ann.token_ids = 16, list(range(17))
    scheduler._schedule_decodes(Step())
    assert len(ann.block_table) == 2, "the 17th token needs a second block"


def full_pool() -> tuple[Scheduler, list[Sequence]]:
    """Three decodes in a pool of three; ann's next token needs a block."""
    scheduler = scheduler_of(3)
    ann = running(scheduler, "ann", 16, 16)
    bob, cem = (running(scheduler, name, 9, 9, new=1) for name in ("bob", "cem"))
    ann.token_ids.append(1000)
    return scheduler, [ann, bob, cem]


def test_the_newest_makes_room_for_a_decode():
    scheduler, (ann, bob, cem) = full_pool()
    step = Step()
    scheduler._schedule_decodes(step)
    assert names(step.preempted) == ["cem"], (
        f"preempted {names(step.preempted)}; cem is the newest, and his block is enough"
    )
    assert ran(step) == [("ann", 1), ("bob", 1)]
    assert list(scheduler.waiting) == [cem] and scheduler.running == [ann, bob]
    scheduler.block_manager.check([ann, bob])


def test_who_needs_a_block_and_is_the_newest_goes():
    scheduler, (ann, bob, cem) = full_pool()
    scheduler.running = [bob, cem, ann]
    step = Step()
    scheduler._schedule_decodes(step)
    assert names(step.preempted) == ["ann"], (
        f"preempted {names(step.preempted)}; ann, the newest, needs a block: only she goes"
    )
    assert ran(step) == [("bob", 1), ("cem", 1)]


def test_as_many_make_room_as_it_takes():
    """cem's blocks are shared with bob, so that taking cem's gives nothing back."""
    scheduler = Scheduler(BlockManager(3, S), max_num_seqs=4, max_num_batched_tokens=32)
    ann = running(scheduler, "ann", 16, 16)
    ann.token_ids.append(1000)
    other = [5] * 32 + [6]
    bob = make_sequence(other[:32])
    bob.request_id = "bob"
    assert scheduler.block_manager.admit(bob)
    scheduler.block_manager.cache_full_blocks(bob, 32)
    bob.status, bob.num_computed = Status.RUNNING, 31
    scheduler.running.append(bob)
    cem = make_sequence(other[:17])
    cem.request_id = "cem"
    cem.status, cem.num_computed, cem.block_table = Status.RUNNING, 16, bob.block_table[:1]
    scheduler.block_manager._take([scheduler.block_manager._blocks[bob.block_table[0]]])
    scheduler.running.append(cem)
    step = Step()
    scheduler._schedule_decodes(step)
    assert names(step.preempted) == ["cem", "bob"], f"preempted {names(step.preempted)}"
    assert ran(step) == [("ann", 1)]
    assert names(scheduler.waiting) == ["bob", "cem"], "the older one stands in front"


# ---------------------------------------------------------------------------- prompts


def test_prompts_are_admitted_in_order_until_the_step_is_full():
    scheduler = scheduler_of(20)
    for name, length in (("ann", 10), ("bob", 50), ("cem", 3)):
        waiting(scheduler, name, length)
    step = Step()
    scheduler._schedule_prefills(step)
    assert ran(step) == [("ann", 10), ("bob", 22)], "32 tokens, and no more"
    samples = [found.samples for found in step.scheduled]
    assert samples == [True, False], "only the chunk that reaches the end of its prompt samples"
    queues = names(scheduler.running), names(scheduler.waiting)
    assert queues == (["ann", "bob"], ["cem"]), f"running and waiting: {queues}"
    assert all(seq.status is Status.RUNNING for seq in scheduler.running), (
        "who is let in has the status RUNNING"
    )


def test_a_prompt_under_way_goes_on_first():
    scheduler = scheduler_of(20)
    running(scheduler, "bob", 50, 22)
    waiting(scheduler, "cem", 30)
    step = Step()
    scheduler._schedule_prefills(step)
    assert ran(step) == [("bob", 28), ("cem", 4)], (
        f"ran {ran(step)}; 28 of bob's tokens are pending, and cem has the rest of 32"
    )


def test_prompts_fill_what_the_decodes_leave():
    scheduler = scheduler_of(20)
    ann = running(scheduler, "ann", 10, 10, new=1)
    waiting(scheduler, "bob", 50)
    step = Step()
    scheduler._schedule(ann, 1, step)
    scheduler._schedule_prefills(step)
    assert ran(step) == [("ann", 1), ("bob", 31)], (
        f"ran {ran(step)}; ann's token counts towards the 32 of the step"
    )


def test_prompts_of_a_full_step_wait():
    scheduler = scheduler_of(20)
    running(scheduler, "ann", 80, 0)
    running(scheduler, "bob", 50, 0)
    waiting(scheduler, "cem", 3)
    step = Step()
    scheduler._schedule_prefills(step)
    assert ran(step) == [("ann", 32)], f"ran {ran(step)}; ann's chunk fills the step"
    assert names(scheduler.waiting) == ["cem"]


def test_nobody_overtakes_who_does_not_fit():
    scheduler = scheduler_of(4)
    running(scheduler, "ann", 30, 30)
    waiting(scheduler, "bob", 60)
    waiting(scheduler, "cem", 3)
    step = Step()
    scheduler._schedule_prefills(step)
    assert not step.scheduled, "cem must not overtake bob, who would wait for ever"
    assert names(scheduler.waiting) == ["bob", "cem"], "bob came first and keeps his place"


def test_admission_stops_at_max_num_seqs():
    scheduler = scheduler_of(20, max_num_seqs=2)
    for name in ("ann", "bob", "cem"):
        waiting(scheduler, name, 3)
    step = Step()
    scheduler._schedule_prefills(step)
    assert names(scheduler.running) == ["ann", "bob"], "max_num_seqs is 2"
    assert names(scheduler.waiting) == ["cem"]


def test_nobody_is_admitted_in_a_step_that_preempts():
    scheduler = scheduler_of(20)
    running(scheduler, "ann", 10, 10, new=1)
    bob = waiting(scheduler, "bob", 3)
    step = Step(preempted=[bob])
    scheduler._schedule_prefills(step)
    assert not step.scheduled, "bob takes back the blocks that he made room with"


def test_one_block_stays_free_while_somebody_runs():
    scheduler = scheduler_of(4)
    running(scheduler, "ann", 16, 15)
    bob = waiting(scheduler, "bob", 48)
    scheduler._schedule_prefills(Step())
    assert names(scheduler.waiting) == ["bob"], "of 4 blocks one must stay free"
    alone = scheduler_of(3)
    alone.waiting.append(bob)
    alone._schedule_prefills(Step())
    assert alone.running == [bob], "nobody runs, so bob may have all blocks"


# ---------------------------------------------------------------------------- one batch


def placed(start: int, length: int, table: list[int]) -> Sequence:
    """A sequence of tokens 100, 101, ... whose first ``start`` are computed."""
    seq = make_sequence(range(100, 100 + length))
    seq.num_computed, seq.block_table = start, table
    return seq


def test_lay_out_of_the_toy():
    """Step 10 of the toy with the mixed policy: ann decodes, dan's prompt begins."""
    ann, dan = placed(27, 28, [0, 2]), placed(0, 60, [1, 3, 4, 5])
    batch = lay_out([item(ann, 1, samples=True), item(dan, 31, samples=False)], S)
    assert batch.input_ids == [127, *range(100, 131)], (
        f"input_ids are {batch.input_ids}; should be ann's 28th token and dan's first 31"
    )
    assert batch.positions == [27, *range(31)], f"positions are {batch.positions}"
    assert batch.slots == [2 * 16 + 11, *range(16, 32), *range(48, 63)], (
        f"slots are {batch.slots}; ann's is block 2, offset 11, dan's are in blocks 1 and 3"
    )
    lengths = batch.query_lens, batch.context_lens
    assert lengths == ([1, 31], [28, 31]), (
        f"query_lens and context_lens are {lengths}: what runs, and up to where that reaches"
    )
    assert batch.tables == [[0, 2], [1, 3, 4, 5]]


@pytest.mark.parametrize("start", [0, 1, 15, 16, 17, 31, 32, 40])
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33])
def test_lay_out_of_any_chunk(start: int, count: int):
    table = [7, 2, 9, 4, 0]
    batch = lay_out([item(placed(start, 80, table), count, samples=False)], S)
    positions = list(range(start, start + count))
    assert batch.positions == positions
    assert batch.input_ids == [100 + p for p in positions]
    assert batch.slots == [table[p // S] * S + p % S for p in positions]
    assert (batch.query_lens, batch.context_lens) == ([count], [start + count])


def test_last_rows():
    """Of 6 rows only those are needed after which somebody samples."""
    runner = object.__new__(ModelRunner)
    runner.device = torch.device("cpu")
    hidden = torch.arange(6.0)[:, None].expand(6, 3)
    seq = placed(0, 80, [0, 1])
    step = Step(
        [item(seq, 2, samples=True), item(seq, 3, samples=False), item(seq, 1, samples=True)]
    )
    rows = runner.last_rows(step, hidden)[:, 0].tolist()
    assert rows == [1, 5], "the second of the three does not sample"
    every = Step([item(seq, 1, samples=True)] * 6)
    assert runner.last_rows(every, hidden)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------- handing out


class FakeScheduler:
    """Appends what it is given; ``late`` names requests that have ended meanwhile."""

    def __init__(self, late: tuple[str, ...] = ()) -> None:
        self.late = late

    def resolve(self, seq: Sequence, token_id: int) -> bool:
        if seq.request_id in self.late:
            return False
        seq.append(token_id)
        return True


class HandOut(LLMEngine):
    """An engine of nothing but requests; it notes what is done with each."""

    def __init__(
        self,
        requests: dict[str, bool],
        late: tuple[str, ...] = (),
        stopped: tuple[str, ...] = (),
    ) -> None:
        """requests: name -> whether it is streamed; stopped: whose text has a stop string."""
        self.stopped = stopped
        self.scheduler = FakeScheduler(late)
        self.followed: list[tuple[str, float]] = []
        self.forgotten: list[str] = []
        self._requests = {}
        for name, stream in requests.items():
            seq = sequence_of(name, 5, max_tokens=2)
            seq.status = Status.RUNNING
            self._requests[name] = Request(seq, None, None, stream=stream)

    def _follow_up(self, request: Request, now: float) -> None:
        self.followed.append((request.seq.request_id, now))
        if request.seq.request_id in self.stopped:
            request.seq.finish("stop")

    def _output(self, request: Request) -> object:
        return SimpleNamespace(name=request.seq.request_id, tokens=request.seq.output_token_ids)

    def _forget(self, request: Request) -> None:
        self.forgotten.append(request.seq.request_id)

    def step_of(self, *sampling: str, others: tuple[str, ...] = ()) -> Step:
        chosen = [(name, False) for name in others] + [(name, True) for name in sampling]
        return Step([item(self._requests[name].seq, 1, samples=yes) for name, yes in chosen])


def test_tokens_go_to_who_sampled_them():
    engine = HandOut({"ann": True, "bob": True, "cem": True})
    step = engine.step_of("ann", "cem", others=("bob",))
    outputs = engine._take_tokens(step, StepResult([7, 9], [None, None]), 3.5)
    reported = [(out.name, out.tokens) for out in outputs]
    assert reported == [("ann", [7]), ("cem", [9])], f"reported {reported}; ann got 7 and cem 9"
    assert engine.followed == [("ann", 3.5), ("cem", 3.5)], "text and times of who got a token"
    assert not engine.forgotten


def test_only_streamed_and_finished_requests_are_reported():
    engine = HandOut({"ann": True, "bob": False})
    step = engine.step_of("ann", "bob")
    first = engine._take_tokens(step, StepResult([1, 2], [None, None]), 0.0)
    assert [out.name for out in first] == ["ann"], "bob is not streamed"
    second = engine._take_tokens(step, StepResult([3, 4], [None, None]), 0.0)
    assert [(out.name, out.tokens) for out in second] == [("ann", [1, 3]), ("bob", [2, 4])]
    assert engine.forgotten == ["ann", "bob"], "both have finished"
    engine = HandOut({"cem": False}, stopped=("cem",))
    ended = engine._take_tokens(engine.step_of("cem"), StepResult([5], [None]), 0.0)
    assert [out.name for out in ended] == engine.forgotten == ["cem"], (
        "_follow_up has found a stop string in cem's text: he has finished in this step"
    )


def test_a_token_that_is_nobodys_is_dropped():
    engine = HandOut({"ann": True, "bob": True}, late=("ann",))
    step = engine.step_of("ann", "bob")
    outputs = engine._take_tokens(step, StepResult([7, 9], [None, None]), 0.0)
    reported = [(out.name, out.tokens) for out in outputs]
    assert reported == [("bob", [9])], f"reported {reported}; resolve said that ann's is nobody's"
    assert [name for name, _ in engine.followed] == ["bob"]


def test_logprobs_are_kept_with_their_request():
    engine = HandOut({"ann": True, "bob": True})
    step = engine.step_of("ann", "bob")
    asked = object()
    engine._take_tokens(step, StepResult([7, 9], [None, asked]), 0.0)
    kept = [request.logprobs for request in engine._requests.values()]
    assert kept == [[], [asked]], "ann asked for none, and None is not kept"
