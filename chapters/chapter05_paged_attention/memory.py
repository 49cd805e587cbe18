"""What the KV cache of 256 requests reserves and what it uses, in rows and in pages.

    python -m chapters.chapter05_paged_attention.memory

The requests are those of chapter 3, all begun at once. Pure arithmetic; the tests hold it against
the caches themselves.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from chapters.chapter03_naive_attention.memory import GIB, MODELS, bytes_per_token, workload

ROWS = (40_960, 2048)
BLOCK_SIZES = (256, 64, 16)


@dataclass(frozen=True)
class Film:
    """Tokens in the cache after every step: what is reserved, what is held.

    running: how many requests are under way.
    """

    reserved: list[int]
    held: list[int]
    running: list[int]

    @property
    def used(self) -> float:
        """The mean share of what is reserved that holds a token."""
        return sum(self.held) / sum(self.reserved)

    @property
    def empty(self) -> float:
        """The mean number of empty places of a running request."""
        return (sum(self.reserved) - sum(self.held)) / sum(self.running)


def film(requests: Sequence[tuple[int, int]], unit: int) -> Film:
    """Run requests of (prompt, new) tokens side by side; places are reserved ``unit`` at a time.

    A contiguous row is one unit of the longest length allowed; a page is a small one. Step s of a
    request, counted from 0, leaves prompt + s tokens in the cache.
    """
    reserved, held, running = [], [], []
    for step in range(max(new for _, new in requests)):
        tokens = [prompt + step for prompt, new in requests if step < new]
        reserved.append(sum(-(-count // unit) * unit for count in tokens))
        held.append(sum(tokens))
        running.append(len(tokens))
    return Film(reserved, held, running)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="Qwen3-0.6B")
    arguments = parser.parse_args(argv)
    requests = workload()
    token = bytes_per_token(MODELS[arguments.model])
    print(f"{len(requests)} requests of 100 to 1,024 tokens in and out on {arguments.model},")
    print("all begun at once:")
    print(f"  {'':<15}  {'peak, GiB':>9}  {'used':>5}  {'empty places a request':>22}")
    kinds = [(f"rows of {unit:,}", unit) for unit in ROWS]
    kinds += [(f"pages of {unit}", unit) for unit in BLOCK_SIZES]
    for name, unit in kinds:
        run = film(requests, unit)
        peak = max(run.reserved) * token / GIB
        print(f"  {name:<15}  {peak:>9,.1f}  {run.used:>5.1%}  {run.empty:>22,.1f}")
    run = film(requests, 1)
    print(f"  {'the tokens':<15}  {max(run.reserved) * token / GIB:>9,.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
