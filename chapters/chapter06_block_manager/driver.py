"""A scheduler just good enough for this chapter, and a model that only pretends.

Every step runs the whole prompts of those who were let in, and one token of everybody else who
holds blocks. Nobody is ever thrown out: a request is let in only if all who run can still finish.
Chapter 7 does this properly.
"""

import string
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Protocol

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens to answer, and the step before which the request comes.

    prompt: token ids, or a text of which each letter is a token.
    """

    name: str
    prompt: str | Tokens[int]
    new: int
    arrives: int = 0

    def sequence(self, arrival: int = 0) -> Sequence:
        """The request as the engine sees it."""
        return Sequence(
            self.name,
            [ord(token) if isinstance(token, str) else token for token in self.prompt],
            SamplingParams(temperature=0, max_tokens=self.new),
            arrival=arrival,
            seed=0,
            max_len=len(self.prompt) + self.new,
        )


class Model(Protocol):
    """What the driver needs of a model."""

    def run(self, scheduled: Tokens[tuple[Sequence, int]]) -> list[int]:
        """Run so many pending tokens of each sequence, and choose the next token of each."""
        ...


class PretendModel:
    """Instead of K and V, a slot holds a number made of its token and of all that the token read.

    As in a model, what is stored for a token depends on all earlier tokens, through what their
    slots hold. So a block with somebody else's content changes the answer, and nothing else tells.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[int] = [0] * (num_blocks * block_size)
        self.num_run = 0

    def run(self, scheduled: Tokens[tuple[Sequence, int]]) -> list[int]:
        """The next tokens are small letters."""
        chosen = []
        for seq, count in scheduled:
            assert count > 0, f"{seq} has nothing to run, so there are no logits for its next token"
            state = 0
            for position in range(seq.num_computed + count):
                if position >= seq.num_computed:
                    self.slots[self._slot(seq, position)] = hash((state, seq.token_ids[position]))
                state = hash((state, self.slots[self._slot(seq, position)]))
            self.num_run += count
            chosen.append(ord(string.ascii_lowercase[(state >> 11) % 26]))
        return chosen

    def _slot(self, seq: Sequence, position: int) -> int:
        block = seq.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size


class Driver:
    """Plays the scheduler over a block manager, until all requests are answered."""

    def __init__(self, manager: BlockManager, model: Model) -> None:
        self.manager = manager
        self.model = model
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.answers: dict[str, str] = {}
        self.found: dict[str, int] = {}
        self.steps = 0

    def run(self, requests: Iterable[Request]) -> None:
        """Let the requests come when they want to, and run until the last is answered."""
        coming = deque(sorted(requests, key=lambda request: request.arrives))
        while coming or self.waiting or self.running:
            while coming and coming[0].arrives <= self.steps:
                self.waiting.append(coming.popleft().sequence())
            self.step()

    def step(self) -> None:
        """One step: everybody who runs grows, whoever fits is let in, the model runs them all."""
        if self.manager.events is not None:
            self.manager.events.step = self.steps
        scheduled = [self._schedule(seq) for seq in self.running]
        while self.waiting and self._admit(self.waiting[0]):
            seq = self.waiting.popleft()
            seq.status = Status.RUNNING
            self.running.append(seq)
            self.found[seq.request_id] = seq.num_computed
            scheduled.append(self._schedule(seq))
        assert scheduled or not self.waiting, f"{self.waiting[0]} does not fit into the pool"
        for (seq, count), token in zip(scheduled, self.model.run(scheduled), strict=True):
            seq.num_computed += count
            seq.append(token)
            if seq.finished:
                self.running.remove(seq)
                self.manager.release(seq)
                self.answers[seq.request_id] = "".join(map(chr, seq.output_token_ids))
        self.steps += 1

    def _schedule(self, seq: Sequence) -> tuple[Sequence, int]:
        """All pending tokens of ``seq``; the blocks that they fill are findable from now on."""
        assert self.manager.grow(seq, len(seq)), f"no block for {seq}, and it was promised one"
        self.manager.cache_full_blocks(seq, len(seq))
        return seq, seq.num_pending

    def _admit(self, seq: Sequence) -> bool:
        """Let ``seq`` in if afterwards everybody can still get all blocks that they may need."""
        return self.manager.admit(seq, spare=sum(map(self._later, [*self.running, seq])))

    def _later(self, seq: Sequence) -> int:
        """Blocks that ``seq`` may ask for when it grows; its last token is never stored."""
        has = max(len(seq.block_table), self.manager.blocks_for(len(seq)))
        return self.manager.blocks_for(seq.num_prompt_tokens + seq.max_tokens - 1) - has
