"""What blocks and sharing save: memory and prompt tokens, counted on the real block manager.

    python -m chapters.chapter06_block_manager.memory
    python -m chapters.chapter06_block_manager.memory --workspace

256 requests with chapter 3's lengths, all at once, behind one system prompt. No model runs: every
figure is a count, and the same on every machine. ``--workspace`` counts with your own code.
"""

import argparse
import random
import sys
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chapters.chapter03_naive_attention.memory import (
    GIB,
    MODELS,
    bytes_per_token,
    share_used,
    workload,
)
from chapters.machine.asking import choose_package

if TYPE_CHECKING:
    from minivllm.engine.block_manager import BlockManager

SYSTEM_TOKENS = 500
POOL_GIB = 8
MAX_LEN = SYSTEM_TOKENS + 2048
MODEL = "Qwen3-0.6B"
TOKEN = bytes_per_token(MODELS[MODEL])


@dataclass(frozen=True)
class Count:
    """What one way of keeping K and V took.

    peak_tokens: places reserved or held at once, at most. used: the mean share of them that holds a
    token, while they are held. prompt_tokens: how many of the prompts' tokens ran. held: places
    held in each step.
    """

    peak_tokens: int
    used: float
    prompt_tokens: int
    held: tuple[int, ...] = ()

    @property
    def peak_gib(self) -> float:
        return self.peak_tokens * TOKEN / GIB


class Counter:
    """In place of a model: looks at the blocks in every step, and always says 0."""

    def __init__(self, manager: "BlockManager") -> None:
        self.manager = manager
        self.held: list[int] = []
        # How many ran and what they held, in steps in which somebody had to wait.
        self.waited_for: list[tuple[int, int]] = []
        self.queue: Tokens[Any] = ()
        self.filled = self.prompt_tokens = 0

    def run(self, scheduled: Tokens[tuple[Any, int]]) -> list[int]:
        size = self.manager.block_size
        # Only a sequence's last block has empty places, and nobody shares that one.
        empty = sum(len(seq.block_table) * size - len(seq) for seq, _ in scheduled)
        self.held.append(self.manager.num_held * size)
        if self.queue:
            self.waited_for.append((len(scheduled), self.held[-1]))
        self.filled += self.held[-1] - empty
        self.prompt_tokens += sum(count for seq, count in scheduled if not seq.num_output_tokens)
        return [0] * len(scheduled)


def count_rows() -> Count:
    """Chapter 3: a row of MAX_LEN places for each request."""
    requests = [(SYSTEM_TOKENS + prompt, new) for prompt, new in workload()]
    prompts = sum(prompt for prompt, _ in requests)
    return Count(len(requests) * MAX_LEN, share_used(requests, MAX_LEN), prompts)


def count_blocks(block_size: int, *, sharing: bool) -> Count:
    """The same requests through the block manager, with room for all."""
    counter = run(256 * -(-MAX_LEN // block_size), block_size, sharing=sharing)
    used = counter.filled / sum(counter.held)
    peak = counter.manager.peak_held * block_size
    return Count(peak, used, counter.prompt_tokens, tuple(counter.held))


def run(num_blocks: int, block_size: int, *, sharing: bool = True) -> Counter:
    """All requests through the block manager of a pool; what was counted on the way."""
    from chapters.chapter06_block_manager.driver import Driver, Request
    from minivllm.engine.block_manager import BlockManager

    generator = random.Random(1)
    tokens = range(150_000)
    system = generator.choices(tokens, k=SYSTEM_TOKENS)
    requests = [
        Request(str(name), [*system, *generator.choices(tokens, k=prompt)], new)
        for name, (prompt, new) in enumerate(workload())
    ]
    manager = BlockManager(num_blocks, block_size, enable_prefix_caching=sharing)
    counter = Counter(manager)
    driver = Driver(manager, counter)
    counter.queue = driver.waiting
    driver.run(requests)
    assert manager.num_held == 0, "somebody kept a block"
    return counter


def main(argv: Tokens[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    arguments = parser.parse_args(argv)
    try:
        choose_package(arguments.workspace)
        alone = count_blocks(16, sharing=False)
        sizes = {size: count_blocks(size, sharing=True) for size in (16, 32, 64, 128, 256)}
        small = run(POOL_GIB * GIB // (16 * TOKEN), 16).waited_for
    except (ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"256 requests of 100 to 1,024 tokens in and out on {MODEL},")
    print(f"all behind the same {SYSTEM_TOKENS} tokens of system prompt:")
    print(f"  {'':<24}  {'at once, GiB':>12}  {'used':>5}  {'prompt tokens run':>17}")
    ways = {f"a row of {MAX_LEN:,} for each": count_rows(), "blocks of 16": alone}
    for name, found in {**ways, "blocks of 16, shared": sizes[16]}.items():
        print(
            f"  {name:<24}  {found.peak_gib:>12.1f}  {found.used:>5.0%}  {found.prompt_tokens:>17,}"
        )
    print("\nshared, by block size:")
    print(f"  {'block size':>10}  {'at once, GiB':>12}  {'used':>6}  {'prompt tokens run':>17}")
    for size, found in sizes.items():
        print(
            f"  {size:>10}  {found.peak_gib:>12.1f}  {found.used:>6.1%}  {found.prompt_tokens:>17,}"
        )
    running, held = (sum(column) / len(small) for column in zip(*small, strict=True))
    print(f"\nshared, in a pool of {POOL_GIB} GiB, while somebody waits:")
    print(f"  {running:.0f} requests run, and hold {held * TOKEN / GIB:.1f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
