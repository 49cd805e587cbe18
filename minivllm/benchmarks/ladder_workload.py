"""The ladder's prompts: lengths and prefixes from which every chapter can gain something."""

from __future__ import annotations

import random

from minivllm.benchmarks.workload import Workload

NUM_PREFIXES = 4


def ladder_workload(
    num_requests: int, *, scale: int = 1, vocab_size: int = 10001, seed: int = 0
) -> Workload:
    """Requests of which every rung can make something, in a random order.

    Three in four prompts begin with one of four prefixes of 192 tokens and go on with 8 to 96 of
    their own; of the others, each fourth has 512, the rest 24 to 160. Three in four answers have 8
    to 32 tokens, the others 64 to 128. All times ``scale``.
    """
    if num_requests < 1:
        raise ValueError(f"requests={num_requests} must be at least 1")
    # Two sources, so that the scale stretches all lengths and changes nothing else.
    rng, words = random.Random(seed), random.Random(seed + 1)
    top = min(10000, vocab_size - 1)

    def tokens(count: int) -> list[int]:
        return [words.randint(0, top) for _ in range(count * scale)]

    prefixes = [tokens(192) for _ in range(NUM_PREFIXES)]
    requests = []
    for number in range(num_requests):
        if number % 4 < 3:
            prompt = prefixes[rng.randrange(NUM_PREFIXES)] + tokens(rng.randint(8, 96))
        else:
            prompt = tokens(512 if number % 16 == 3 else rng.randint(24, 160))
        long = rng.random() < 0.25
        requests.append((prompt, scale * (rng.randint(64, 128) if long else rng.randint(8, 32))))
    rng.shuffle(requests)
    return Workload([prompt for prompt, _ in requests], [count for _, count in requests])


def subset_of(workload: Workload, count: int) -> list[int]:
    """Places of ``count`` requests that stand for all, short ones as well as long ones.

    Sorted by answer, then prompt, the middle one of each of ``count`` equal parts is taken.
    """
    order = sorted(
        range(len(workload.prompts)),
        key=lambda place: (workload.max_tokens[place], len(workload.prompts[place])),
    )
    count = min(count, len(order))
    return sorted(order[int((part + 0.5) * len(order) / count)] for part in range(count))


def pick(workload: Workload, places: list[int]) -> Workload:
    """The requests at these places."""
    return Workload(
        [workload.prompts[place] for place in places],
        [workload.max_tokens[place] for place in places],
    )
