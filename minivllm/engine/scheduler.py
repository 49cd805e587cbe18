"""Which sequences run in the next step, in plain Python.

Scheduling is iteration-level (Yu et al. 2022, "Orca"): the batch is chosen anew at every step.
Running sequences are kept in order of arrival, and every waiting one arrived later, or was
preempted from behind them; so the oldest request always makes progress.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.events import EventLog
from minivllm.engine.sequence import Sequence, Status

POLICIES = ("prefill_first", "mixed")


class ScheduledSequence(NamedTuple):
    """``num_tokens`` pending tokens of ``seq`` run in this step.

    samples: whether the step reaches the last token, so that the next one can be chosen.
    decodes: whether it only turns the newest generated token into the next one.
    """

    seq: Sequence
    num_tokens: int
    samples: bool
    decodes: bool


@dataclass
class Step:
    """What one step runs, and who lost their blocks for it. number: counted from 0."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    number: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the tokens."""
        return [item.seq for item in self.scheduled if item.samples]


class Scheduler:
    """Continuous batching with chunked prefill and preemption by recompute.

    max_num_seqs: the most sequences that hold blocks at a time. max_num_batched_tokens: the most
    tokens in a step; a longer prompt is prefilled in chunks.
    policy: ``prefill_first`` runs prompts whenever one can be admitted, else all decodes;
    ``mixed`` runs all decodes and fills the rest of the step with prompt chunks.
    events: where to record what is decided, best the block manager's own log; None: nowhere.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: str = "prefill_first",
        events: EventLog | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs={max_num_seqs} must be at least 1")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens} is less than "
                f"max_num_seqs={max_num_seqs}, whose decodes would not fit into one step; "
                "raise the first or lower the second"
            )
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} must be one of {POLICIES}")
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.policy = policy
        self.events = events
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence behind all others."""
        self.waiting.append(seq)
        if self.events is not None:
            number = self._num_steps
            self.events.add("arrived", seq.request_id, (), seq.num_prompt_tokens, step=number)

    def schedule(self) -> Step:
        """Choose the next step.

        Empty when no sequence is left, or when all that are left wait for tokens that a step
        already chose (see :meth:`advance`).
        """
        step = Step(number=self._num_steps)
        self._num_steps += 1
        if self.events is not None:
            self.events.step = step.number
            self.events.add("step begun", None, (), len(self.waiting), len(self.running))
        if self.policy == "mixed":
            self._schedule_decodes(step)
            self._schedule_prefills(step)
        else:
            self._schedule_prefills(step)
            if not step.scheduled:
                self._schedule_decodes(step)
        assert step.scheduled or self._all_exhausted(), "no progress"
        if self.events is not None:
            for seq, num_tokens, _, decodes in step.scheduled:
                kind = "decode" if decodes else "prefill"
                self.events.add(kind, seq.request_id, (), seq.num_computed, num_tokens)
        return step

    def commit(self, step: Step, token_ids: list[int]) -> list[Sequence]:
        """Record that ``step`` ran.

        token_ids: the new token of every scheduled sequence that samples, in order.
        Returns the sequences that got a token; the finished ones have given back their blocks.
        """
        self.advance(step)
        pairs = zip(step.sampling, token_ids, strict=True)
        resolved = [seq for seq, token_id in pairs if self.resolve(seq, token_id)]
        self.record_end(step)
        return resolved

    def advance(self, step: Step) -> None:
        """Record that ``step`` is on its way: the half of a commit that needs no token's value.

        The device runs steps in order, so the next one can be scheduled before this one's tokens
        have been read; each gets a place now and its value by :meth:`resolve`.
        """
        for seq, num_tokens, samples, _ in step.scheduled:
            seq.num_computed += num_tokens
            if samples:
                seq.reserve()

    def resolve(self, seq: Sequence, token_id: int) -> bool:
        """Give ``seq`` the token that a step chose for it.

        False if it has finished in the meantime: then the token is nobody's.
        """
        if seq.finished:
            return False
        seq.resolve(token_id)
        if seq.finished:
            if seq.block_table:
                self._drop(seq)
            else:
                # Preempted while the token was on its way.
                self.waiting.remove(seq)
            self._record_finish(seq)
        return True

    def record_end(self, step: Step) -> None:
        """Tell the event log that the tokens of ``step`` are all there."""
        if self.events is not None:
            numbers = step.num_tokens, self.block_manager.num_held
            self.events.add("step ended", None, (), *numbers, step=step.number)

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence wherever it stands, and give back its blocks.

        One that has ended already, with its last token, only gets another reason.
        """
        ended = seq.finished
        if seq.status is Status.RUNNING:
            self._drop(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        seq.finish(reason)
        if not ended:
            self._record_finish(seq)

    def recover(self) -> None:
        """After a step that failed: recompute everything that ran, and trust no cached block."""
        while self.running:
            self._preempt(self.running[-1], Step())
        for seq in self.waiting:
            seq.forget_unknown()
        self.block_manager.forget_all()

    def _all_exhausted(self) -> bool:
        """Whether nobody can run before the tokens that are on their way have come."""
        return all(seq.exhausted for seq in self.running) and (
            bool(self.running) or not self.waiting
        )

    def _schedule_decodes(self, step: Step) -> None:
        """Every decoding sequence runs one token, oldest first; the newest make room."""
        index = 0
        block_size = self.block_manager.block_size
        while index < len(self.running):
            seq = self.running[index]
            if seq.num_pending > 1 or seq.exhausted:
                index += 1
                continue
            length = len(seq.token_ids)
            # A block has its name as soon as its tokens are known: now, or a step late.
            if seq.num_computed % block_size < 2:
                self.block_manager.share_last_block(seq)
            # Only every S-th token asks for a block.
            while length > len(seq.block_table) * block_size and not self.block_manager.grow(
                seq, length
            ):
                victim = self.running[-1]
                self._preempt(victim, step)
                if victim is seq:
                    break
            else:
                self._schedule(seq, 1, step)
                index += 1

    def _schedule_prefills(self, step: Step) -> None:
        """Chunks of prompts that are under way, then new ones in order of arrival."""
        budget = self.max_num_batched_tokens - step.num_tokens
        for seq in self.running:
            if seq.num_pending > 1 and budget > 0:
                budget -= self._schedule(seq, budget, step)
        # Whoever was just preempted would take back the blocks that it made room with.
        while self.waiting and budget > 0 and not step.preempted:
            seq = self.waiting[0]
            if len(self.running) >= self.max_num_seqs:
                break
            # One block in a hundred stays free for those that run, lest they preempt at once.
            spare = -(-self.block_manager.num_blocks // 100) if self.running else 0
            if not self.block_manager.admit(seq, spare=spare):
                break
            self.waiting.popleft()
            seq.status = Status.RUNNING
            self.running.append(seq)
            if self.events is not None:
                self.events.add("admitted", seq.request_id, (), seq.num_computed)
            budget -= self._schedule(seq, budget, step)

    def _schedule(self, seq: Sequence, budget: int, step: Step) -> int:
        """Run as many pending tokens of ``seq`` as the budget allows; returns how many."""
        pending = seq.num_pending
        count = min(pending, budget)
        decodes = pending == 1 and seq.num_output_tokens > 0
        step.scheduled.append(ScheduledSequence(seq, count, count == pending, decodes))
        # Now, so that the next prompt of this very step finds the blocks that this one fills.
        self.block_manager.cache_full_blocks(seq, seq.num_computed + count)
        return count

    def _preempt(self, victim: Sequence, step: Step) -> None:
        """Take all blocks of ``victim`` and put it first in the queue; it recomputes later."""
        self._drop(victim)
        victim.status = Status.WAITING
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(victim)
        step.preempted.append(victim)
        if self.events is not None:
            self.events.add("preempted", victim.request_id)

    def _drop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.block_manager.release(seq)

    def _record_finish(self, seq: Sequence) -> None:
        if self.events is not None:
            self.events.add("finished", seq.request_id, (), seq.num_output_tokens)
