"""The host's half of a decode step, and how much it sends: the engine's code, a pretended model.

    python -m chapters.chapter08_cuda_graphs.halves

CPU seconds of one thread, so that other programs disturb less. What the model would compute does
not matter here: the host's work is the same for the smallest and for the largest.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from chapters.chapter08_cuda_graphs import toy
from minivllm.engine.batches import lay_out, sampling_of
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.scheduler import Scheduler

BATCHES = (1, 8, 32, 128, 256)


@dataclass(frozen=True)
class Half:
    """Milliseconds a step at a batch, medians; and bytes sent a step, means.

    schedule: choose the step, and hand its tokens out afterwards. plain: lay all out anew, as
    chapter 7 does. prepare: find what has changed.
    """

    batch: int
    schedule: float
    plain: float
    prepare: float
    plain_bytes: float
    sent_bytes: float


def measure(batch: int, steps: int = 40) -> Half:
    """Decode ``batch`` sequences of some 20 tokens for ``steps`` steps."""
    runner = toy.ToyRunner(num_blocks=4 * batch + 4, taped=False, places=batch)
    manager = BlockManager(4 * batch + 4, toy.BLOCK_SIZE, enable_prefix_caching=False)
    scheduler = Scheduler(manager, max_num_seqs=batch, max_num_batched_tokens=8192)
    for place in range(batch):
        request = toy.Request(str(place), 100, 5 + place % 15, steps + 2)
        scheduler.add(toy.sequence_of(request, place))
    schedule, plain, prepare, plain_bytes, sent_bytes = ([] for _ in range(5))
    for number in range(steps):
        began = time.process_time()
        step = scheduler.schedule()
        chosen = time.process_time()
        host = lay_out(step.scheduled, toy.BLOCK_SIZE)
        sampling_of(step.sampling, toy.CONFIG.vocab_size)
        laid_out = time.process_time()
        message = runner.prepare(step)
        prepared = time.process_time()
        tokens, _ = runner.execute(message)
        ran = time.process_time()
        scheduler.commit(step, tokens.tolist())
        if number:  # the first runs the prompts
            plain.append(laid_out - chosen)
            prepare.append(prepared - laid_out)
            schedule.append(chosen - began + time.process_time() - ran)
            plain_bytes.append(_bytes_of(host.to(runner.device)))
            sent_bytes.append(8 * len(message.updates))
    milliseconds = [1e3 * statistics.median(times) for times in (schedule, plain, prepare)]
    return Half(batch, *milliseconds, statistics.mean(plain_bytes), statistics.mean(sent_bytes))


def _bytes_of(batch: Any) -> int:
    return sum(part.nbytes for part in vars(batch).values() if isinstance(part, torch.Tensor))


def main() -> int:
    torch.set_num_threads(1)
    print("a decode step, the host's half:")
    print("            ms a step                      bytes a step")
    print("   batch    schedule   lay out   prepare   laid out    sent")
    for batch in BATCHES:
        half = measure(batch)
        print(
            f"  {batch:>6}{half.schedule:>12.3f}{half.plain:>10.3f}{half.prepare:>10.3f}"
            f"{half.plain_bytes:>11,.0f}{half.sent_bytes:>8,.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
