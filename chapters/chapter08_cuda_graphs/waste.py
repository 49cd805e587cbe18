"""What a ladder of batch sizes costs: graphs to record against places that run for nobody.

python -m chapters.chapter08_cuda_graphs.waste
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from minivllm.engine.cuda_graphs import GraphLadder, NoRecorder, ladder_sizes

MOST = 256


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... ``most``: another ladder, to compare with."""
    sizes = [1]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return [*sizes, most]


LADDERS: dict[str, Callable[[int], list[int]]] = {
    "only the largest": lambda most: [most],
    "powers of two": powers_of_two,
    "ours": ladder_sizes,
    "every size": lambda most: list(range(1, most + 1)),
}


@dataclass(frozen=True)
class Waste:
    """graphs: how many are recorded. padding: for each batch from 1 on, places for nobody."""

    graphs: int
    padding: list[int]

    @property
    def share(self) -> float:
        """Padding among all places that run, if every batch size is equally frequent."""
        real = sum(range(1, len(self.padding) + 1))
        return sum(self.padding) / (sum(self.padding) + real)


def waste_of(sizes: list[int]) -> Waste:
    """By the real ladder's own choice."""
    ladder = GraphLadder(sizes, lambda size: None, NoRecorder())
    return Waste(len(sizes), [ladder.size_for(n) - n for n in range(1, sizes[-1] + 1)])


def main() -> int:
    print(f"batches of 1 to {MOST}, each as often as any other:")
    print("                    graphs   padding   at most")
    for name, ladder in LADDERS.items():
        waste = waste_of(ladder(MOST))
        print(f"  {name:<18}{waste.graphs:>6}{waste.share:>9.1%}{max(waste.padding):>8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
