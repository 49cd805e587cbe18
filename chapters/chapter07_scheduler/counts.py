"""What the ways of batching cost, counted in steps on the real block manager and scheduler.

    python -m chapters.chapter07_scheduler.counts
    python -m chapters.chapter07_scheduler.counts --workspace

Chapter 6's 256 requests, a pool of 8 GiB, no model: every figure is a count, and the same on every
machine. ``--workspace`` counts with your own code.
"""

import argparse
import random
import sys
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from chapters.chapter03_naive_attention.memory import GIB, workload
from chapters.chapter06_block_manager.memory import MAX_LEN, POOL_GIB, SYSTEM_TOKENS, TOKEN
from chapters.chapter06_block_manager.memory import run as run_driver
from chapters.machine.asking import choose_package

BLOCK_SIZE, MAX_SEQS, MAX_TOKENS = 16, 256, 4096
POOL = POOL_GIB * GIB // TOKEN  # tokens


@dataclass(frozen=True)
class Way:
    """steps: until the last answer. running, held: means over the steps in which somebody waits;
    held is a share of the pool. preemptions; again: tokens that had to be run once more."""

    steps: int
    running: float
    held: float
    preemptions: int = 0
    again: int = 0


def static() -> Way:
    """Batches of as many rows of MAX_LEN as fit; the next one begins when the last row is done."""
    rows = POOL // MAX_LEN
    answers = [new for _, new in workload()]
    batches = [answers[start : start + rows] for start in range(0, len(answers), rows)]
    steps = sum(map(max, batches))
    # The last batch has nobody waiting behind it.
    early = batches[:-1]
    running = sum(map(sum, early)) / sum(map(max, early))
    return Way(steps, running, rows * MAX_LEN / POOL)


def careful() -> Way:
    """Chapter 6's driver, which promises everybody all the blocks that they may need."""
    counter = run_driver(POOL // BLOCK_SIZE, BLOCK_SIZE)
    running, held = zip(*counter.waited_for, strict=True)
    return Way(len(counter.held), _mean(running), _mean(held) / POOL)


def scheduled(policy: str) -> Way:
    """This chapter's scheduler."""
    from minivllm.engine.block_manager import BlockManager
    from minivllm.engine.sampling_params import SamplingParams
    from minivllm.engine.scheduler import Scheduler
    from minivllm.engine.sequence import Sequence

    generator = random.Random(1)
    tokens = range(150_000)
    system = generator.choices(tokens, k=SYSTEM_TOKENS)
    manager = BlockManager(POOL // BLOCK_SIZE, BLOCK_SIZE)
    scheduler = Scheduler(
        manager, max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS, policy=policy
    )
    for arrival, (prompt, new) in enumerate(workload()):
        token_ids = [*system, *generator.choices(tokens, k=prompt)]
        params = SamplingParams(temperature=0, max_tokens=new)
        scheduler.add(
            Sequence(str(arrival), token_ids, params, arrival=arrival, seed=0, max_len=MAX_LEN)
        )
    steps = again = 0
    running, held = [], []
    furthest: dict[str, int] = {}
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        steps += 1
        if scheduler.waiting:
            running.append(len(scheduler.running))
            held.append(manager.num_held * BLOCK_SIZE)
        for item in step.scheduled:
            name, start = item.seq.request_id, item.seq.num_computed
            before = furthest.get(name, 0)
            end = start + item.num_tokens
            again += max(0, min(before, end) - start)
            furthest[name] = max(before, end)
        scheduler.commit(step, [0] * len(step.sampling))
    assert manager.num_held == 0, "somebody kept a block"
    return Way(steps, _mean(running), _mean(held) / POOL, scheduler.num_preemptions, again)


def _mean(values: Tokens[int]) -> float:
    return sum(values) / len(values)


def all_ways() -> dict[str, Way]:
    """The rows of the table."""
    return {
        "static batches (chapter 3's rows)": static(),
        "chapter 6's driver": careful(),
        "prefill_first": scheduled("prefill_first"),
        "mixed": scheduled("mixed"),
    }


def main(argv: Tokens[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    arguments = parser.parse_args(argv)
    try:
        choose_package(arguments.workspace)
        ways = all_ways()
    except (ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"256 requests in a pool of {POOL_GIB} GiB; while somebody waits:")
    print(
        f"  {'':<34}{'steps':>6}{'running':>9}{'pool held':>11}{'preempted':>11}{'run again':>11}"
    )
    for name, way in ways.items():
        print(
            f"  {name:<34}{way.steps:>6,}{way.running:>9.0f}{way.held:>11.0%}"
            f"{way.preemptions:>11,}{way.again:>11,}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
