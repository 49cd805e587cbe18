"""Throughput against the size of the batch, and what a long prompt does to those who decode.

    python -m chapters.chapter07_scheduler.measure
    python -m chapters.chapter07_scheduler.measure --json served.json

A CPU is timed with one thread and in CPU seconds, so that other programs disturb less; a GPU by the
clock on the wall. It runs on the reference; the engine has no graphs and does not overlap steps.
"""

import argparse
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence as Strings
from itertools import pairwise

import torch

from minivllm.engine.events import EventLog
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.sampling_params import SamplingParams

BATCHES = (1, 2, 4, 8, 16, 32)
REQUESTS, PROMPT, NEW = 32, 24, 32
# Policy and tokens a step.
SERVED = (("prefill_first", 1024), ("prefill_first", 128), ("mixed", 128), ("mixed", 32))
LONG = 960


@dataclasses.dataclass(frozen=True)
class Throughput:
    """With at most ``batch`` sequences at once: steps, and tokens generated a second."""

    batch: int
    steps: int
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Served:
    """A prompt of LONG tokens comes while others decode. In ms: the usual and the longest time
    from one of their tokens to the next, and the newcomer's time to the first token."""

    policy: str
    budget: int
    usual_gap: float
    longest_gap: float
    first_token: float


def clock() -> Callable[[], float]:
    return time.perf_counter if torch.cuda.is_available() else time.process_time


def engine_of(events: EventLog | None = None, **settings: object) -> LLMEngine:
    """An engine on the embedded model, or on the one that ``model`` names."""
    defaults = {"num_kv_blocks": 256, "block_size": 16, "max_model_len": 1024}
    if not torch.cuda.is_available():
        defaults["dtype"] = "float32"
    return LLMEngine(events=events, enable_prefix_caching=False, **{**defaults, **settings})


def add(engine: LLMEngine, name: str, length: int, new: int) -> None:
    """Queue a request of random tokens that answers exactly ``new``."""
    vocabulary = range(engine.model_config.vocab_size)
    prompt = random.Random(name).choices(vocabulary, k=length)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    engine.add_request(name, prompt, params)


def run(engine: LLMEngine) -> int:
    """Step until nobody is left; how many steps it took."""
    steps = 0
    while engine.has_unfinished_requests:
        engine.step()
        steps += 1
    return steps


def throughput(batch: int, **settings: object) -> Throughput:
    """REQUESTS requests, ``batch`` at a time."""
    engine = engine_of(max_num_seqs=batch, **settings)
    add(engine, "warm up", PROMPT, 2)
    run(engine)
    for index in range(REQUESTS):
        add(engine, str(index), PROMPT, NEW)
    now = clock()
    begun = now()
    steps = run(engine)
    seconds = now() - begun
    engine.shutdown()
    return Throughput(batch, steps, REQUESTS * NEW / seconds)


def served(policy: str, budget: int, **settings: object) -> tuple[Served, EventLog]:
    """Four requests decode; after 12 of their tokens a long prompt arrives."""
    log = EventLog(clock())
    engine = engine_of(
        log, policy=policy, max_num_batched_tokens=budget, max_num_seqs=8, **settings
    )
    for name in ("ann", "bob", "cem", "dan"):
        add(engine, name, 8, 56)
    for _ in range(13):
        engine.step()
    add(engine, "eve", LONG, 8)
    run(engine)
    engine.shutdown()
    gaps = gaps_of(log, "ann")
    (arrived,) = log.of("arrived", request_id="eve")
    last = log.of("prefill", request_id="eve")[-1].step
    first = next(event for event in log.of("step ended") if event.step == last)
    milliseconds = (1e3 * (first.time - arrived.time), 1e3 * max(gaps))
    found = Served(policy, budget, 1e3 * statistics.median(gaps), milliseconds[1], milliseconds[0])
    return found, log


def gaps_of(log: EventLog, name: str) -> list[float]:
    """Seconds from each of a request's decoded tokens to the next."""
    ends = {event.step: event.time for event in log.of("step ended")}
    times = [ends[event.step] for event in log.of("decode", request_id=name)]
    return [b - a for a, b in pairwise(times)]


def main(argv: Strings[str] | None = None) -> int:
    from minivllm.benchmarks.report import machine_facts, write_report

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the results")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    facts = machine_facts()
    print(f"{facts['device']}; torch {torch.__version__}; {facts['date']}")
    print(f"{'batch':>6}  {'steps':>6}  {'tokens/s':>9}")
    rows = []
    for batch in BATCHES:
        rows.append(throughput(batch))
        print(f"{batch:>6}  {rows[-1].steps:>6,}  {rows[-1].tokens_per_second:>9,.0f}", flush=True)
    print(f"\n{'':<14} {'budget':>6}  {'usual gap':>9}  {'longest':>8}  {'first token, ms':>15}")
    waits = []
    served("mixed", 128)  # the first run of anything is slower
    for policy, budget in SERVED:
        waits.append(served(policy, budget)[0])
        one = waits[-1]
        print(
            f"{policy:<14} {budget:>6,}  {one.usual_gap:>9.1f}  {one.longest_gap:>8.1f}"
            f"  {one.first_token:>15.0f}",
            flush=True,
        )
    result = {
        "throughput": [dataclasses.asdict(row) for row in rows],
        "served": [dataclasses.asdict(row) for row in waits],
    }
    write_report(arguments.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
