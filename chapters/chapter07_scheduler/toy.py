"""The toy of chapter 7: four requests, 7 blocks of 16 tokens, at most 32 tokens a step.

A letter is a token, as in chapter 6, and the model is chapter 6's, which only pretends.
"""

from collections import deque
from dataclasses import dataclass

from chapters.chapter06_block_manager.driver import PretendModel, Request
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.events import EventLog
from minivllm.engine.scheduler import Scheduler

NUM_BLOCKS, BLOCK_SIZE, MAX_SEQS, MAX_TOKENS = 7, 16, 4, 32

# Name, prompt, how many letters to answer, and the step before which the request arrives.
REQUESTS = (
    Request("ann", "Any tea for three?", 20, 0),
    Request("bob", "Salad now?", 10, 0),
    Request("dan", "List all prime numbers up to one hundred. Say them in words.", 12, 4),
    Request("eve", "Is there soup?", 6, 6),
)
ASKED = {request.name: request for request in REQUESTS}


@dataclass(frozen=True)
class Played:
    """What a run of the toy came to. answers: by name."""

    events: EventLog
    answers: dict[str, str]
    steps: int
    preemptions: int
    tokens: int


def play(policy: str = "prefill_first", *, num_blocks: int = NUM_BLOCKS) -> Played:
    """Run the toy to its end."""
    log = EventLog()
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, events=log),
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
        policy=policy,
        events=log,
    )
    model = PretendModel(num_blocks, BLOCK_SIZE)
    coming = deque(enumerate(REQUESTS))
    answers: dict[str, str] = {}
    steps = 0
    while coming or scheduler.has_unfinished:
        while coming and coming[0][1].arrives <= steps:
            arrival, request = coming.popleft()
            scheduler.add(request.sequence(arrival))
        step = scheduler.schedule()
        chosen = model.run([(item.seq, item.num_tokens) for item in step.scheduled])
        pairs = zip(step.scheduled, chosen, strict=True)
        for seq in scheduler.commit(step, [token for item, token in pairs if item.samples]):
            if seq.finished:
                answers[seq.request_id] = "".join(map(chr, seq.output_token_ids))
        steps += 1
        if steps > 200:
            raise RuntimeError(f"not done after {steps} steps: {scheduler.running} never end")
    return Played(log, answers, steps, scheduler.num_preemptions, model.num_run)
