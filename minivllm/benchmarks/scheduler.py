"""The scheduler alone, without a model: how many decisions a second, and does it stay linear?"""

import random
import time

from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import Sequence


def simulate(num_requests: int, *, seed: int = 0) -> dict[str, float]:
    """Run ``num_requests`` through the scheduler, tokens made up on the spot.

    Half the prompts begin with one of 16 shared prefixes of 64 tokens; prompts have 16 to 256
    tokens, answers 1 to 64; the pool is small enough that sequences are preempted.
    Returns counts, seconds, and decisions (a sequence chosen for a step) a second.
    """
    rng = random.Random(seed)
    block_size = 16
    manager = BlockManager(1024, block_size)
    scheduler = Scheduler(manager, max_num_seqs=256, max_num_batched_tokens=4096)
    prefixes = [[rng.randrange(1000) for _ in range(64)] for _ in range(16)]
    remaining = num_requests
    steps = decisions = tokens = 0
    spent = 0.0
    while remaining or scheduler.has_unfinished:
        # Requests arrive as fast as they are served, so that the queue stays short.
        while remaining and len(scheduler.waiting) < 64:
            prefix = rng.choice(prefixes) if rng.random() < 0.5 else []
            prompt = prefix + [rng.randrange(1000) for _ in range(rng.randint(16, 192))]
            remaining -= 1
            scheduler.add(
                Sequence(
                    str(remaining),
                    prompt,
                    SamplingParams(temperature=0, max_tokens=rng.randint(1, 64)),
                    arrival=num_requests - remaining,
                    seed=0,
                    max_len=4096,
                )
            )
        started = time.perf_counter()
        step = scheduler.schedule()
        spent += time.perf_counter() - started
        new_tokens = [rng.randrange(1000) for item in step.scheduled if item.samples]
        started = time.perf_counter()
        scheduler.commit(step, new_tokens)
        spent += time.perf_counter() - started
        steps += 1
        decisions += len(step.scheduled)
        tokens += step.num_tokens
    manager.check([])
    return {
        "requests": num_requests,
        "steps": steps,
        "decisions": decisions,
        "tokens": tokens,
        "preemptions": scheduler.num_preemptions,
        "seconds": spent,
        "decisions_per_second": decisions / spent,
        "microseconds_per_request": spent / num_requests * 1e6,
    }


def run_scheduler(num_requests: int, *, output: str | None = None) -> None:
    """Simulate an eighth, a quarter, half and all of ``num_requests``, and print a table."""
    if num_requests < 8:
        raise ValueError(f"requests={num_requests} must be at least 8")
    print(f"{'requests':>10} {'steps':>9} {'decisions':>11} {'decisions/s':>12} {'us/request':>11}")
    rows = []
    for count in (num_requests // 8, num_requests // 4, num_requests // 2, num_requests):
        row = simulate(count)
        rows.append(row)
        print(
            f"{count:10,} {row['steps']:9,} {row['decisions']:11,} "
            f"{row['decisions_per_second']:12,.0f} {row['microseconds_per_request']:11.1f}"
        )
    print(f"on {machine_facts()['device']}; linear growth keeps the last column level")
    write_report(output, {"rows": rows})
