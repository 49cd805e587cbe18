"""Chapter 7's toy, its event log, and what the ways of batching cost."""

import pytest
import torch

from chapters.chapter06_block_manager.driver import PretendModel, Request
from chapters.chapter07_scheduler import counts, gantt, toy
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.events import KINDS, EventLog
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.scheduler import POLICIES, Scheduler

CHARTS = {
    "prefill_first": """
step  0123456789012345678901234567
ann   Pddddddddd--dddddddddd
bob   Pddddddddd
dan       ......PPdddddx....Pddddd
eve         ................Pddddd
""",
    "mixed": """
step  012345678901234567890123456
ann   Pddddddddddddddddddd
bob   Pddddddddd
dan       ......PPddddx...ddddddd
eve         ..............Pddddd
""",
}


def chart(policy: str) -> list[str]:
    played = toy.play(policy)
    return gantt.as_text(gantt.rows(played.events.events), played.steps)


@pytest.mark.parametrize("policy", POLICIES)
def test_toy_chart(policy: str):
    wrong = [
        f"is        {line}\nshould be {wanted}"
        for line, wanted in zip(chart(policy), CHARTS[policy].strip("\n").split("\n"), strict=True)
        if line != wanted
    ]
    assert not wrong, "\n".join(wrong)


def test_toy_gaps():
    """From one of ann's tokens to her next: dan's 60, then one of each; or 31 of his, and hers."""
    widest = {policy: max(gantt.gaps(toy.play(policy).events.events)["ann"]) for policy in POLICIES}
    assert widest == {"prefill_first": 62, "mixed": 32}


@pytest.mark.parametrize("policy", POLICIES)
def test_toy_answers_do_not_depend_on_the_others_in_the_batch(policy: str):
    together = toy.play(policy).answers
    for request in toy.REQUESTS:
        assert together[request.name] == alone(request), f"{request.name} is told something else"


def alone(request: Request) -> str:
    seq = request.sequence()
    manager = BlockManager(toy.NUM_BLOCKS, toy.BLOCK_SIZE)
    model = PretendModel(toy.NUM_BLOCKS, toy.BLOCK_SIZE)
    assert manager.admit(seq)
    while not seq.finished:
        assert manager.grow(seq, len(seq))
        (token,) = model.run([(seq, seq.num_pending)])
        seq.num_computed = len(seq)
        seq.append(token)
    return "".join(map(chr, seq.output_token_ids))


def test_a_preempted_request_finds_its_blocks_again():
    """64 of dan's tokens lie in full blocks that nobody needed: of 66 he runs two, one again."""
    log = toy.play("prefill_first").events
    admitted = log.of("admitted", request_id="dan")
    assert len(admitted) == 2, "7.3 notes everybody who is let in: events.add('admitted', ...)"
    first, second = admitted
    assert (first["cached"], second["cached"]) == (0, 64)
    assert [event["tokens"] for event in log.of("prefill", request_id="dan")] == [32, 28, 2]


# ---------------------------------------------------------------------------- the event log


@pytest.mark.parametrize("policy", POLICIES)
def test_the_log_tells_what_the_steps_did(policy: str):
    played = toy.play(policy)
    log = played.events
    assert {event.kind for event in log.events} <= set(KINDS)
    assert sum(event["tokens"] for event in log.of("prefill", "decode")) == played.tokens
    begun, ended = log.of("step begun"), log.of("step ended")
    assert [event.step for event in begun] == [event.step for event in ended]
    assert [event.step for event in begun] == list(range(played.steps))
    assert sum(event["tokens"] for event in ended) == played.tokens
    assert ended[-1]["held"] == 0 and max(event["held"] for event in ended) == toy.NUM_BLOCKS
    assert len(log.of("preempted")) == played.preemptions
    for request in toy.REQUESTS:
        (arrived,) = log.of("arrived", request_id=request.name)
        assert (arrived.step, arrived["tokens"]) == (request.arrives, len(request.prompt))
        ends = log.of("finished", request_id=request.name)
        assert len(ends) == 1, f"7.1 notes once who has finished; {request.name}: {len(ends)} times"
        (finished,) = ends
        assert finished["tokens"] == request.new
        admitted = log.of("admitted", request_id=request.name)
        times = 1 + len(log.of("preempted", request_id=request.name))
        assert len(admitted) == times, "7.3 notes everybody who is let in"


def test_a_log_changes_nothing():
    def run(events: EventLog | None) -> list[tuple[int, int]]:
        manager = BlockManager(toy.NUM_BLOCKS, toy.BLOCK_SIZE, events=events)
        scheduler = Scheduler(manager, max_num_seqs=4, max_num_batched_tokens=32, events=events)
        for arrival, request in enumerate(toy.REQUESTS):
            scheduler.add(request.sequence(arrival))
        steps = []
        while scheduler.has_unfinished:
            step = scheduler.schedule()
            steps.append([(found.seq.request_id, found.num_tokens) for found in step.scheduled])
            scheduler.commit(step, [0] * len(step.sampling))
        return steps

    assert run(None) == run(EventLog())


def test_an_aborted_request_is_recorded():
    log = EventLog()
    scheduler = Scheduler(
        BlockManager(8, 16, events=log), max_num_seqs=4, max_num_batched_tokens=32, events=log
    )
    ann, bob = (request.sequence(i) for i, request in enumerate(toy.REQUESTS[:2]))
    scheduler.add(ann)
    scheduler.add(bob)
    step = scheduler.schedule()
    scheduler.commit(step, [0] * len(step.sampling))
    scheduler.finish(ann, "abort")
    (finished,) = log.of("finished")
    assert (finished.request_id, finished["tokens"]) == ("ann", 1)


def test_the_engine_keeps_the_log():
    """The engine's scheduler and block manager write to one log, and time is in it."""
    torch.set_num_threads(1)
    log = EventLog()
    engine = LLMEngine(
        events=log, num_kv_blocks=8, block_size=16, max_model_len=128, dtype="float32", device="cpu"
    )
    for name, new in (("ann", 3), ("bob", 5)):
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        engine.add_request(name, list(range(5, 25)), params)
    while engine.has_unfinished_requests:
        engine.step()
    engine.shutdown()
    assert [event.step for event in log.of("step ended")] == [0, 1, 2, 3, 4]
    assert [event["tokens"] for event in log.of("finished")] == [3, 5]
    assert log.of("taken") and log.of("cached")
    times = [event.time for event in log.events]
    assert times == sorted(times) and times[-1] > 0


# ---------------------------------------------------------------------------- the ways of batching


def test_counts_of_the_ways_of_batching():
    ways = counts.all_ways()
    steps = [way.steps for way in ways.values()]
    assert steps == sorted(steps, reverse=True), "each way takes fewer steps than the one before"
    static, driver, first, mixed = ways.values()
    assert static.steps > 3 * first.steps and driver.held < 0.75 < 0.95 < first.held
    assert first.preemptions > 0 and mixed.preemptions > 0
