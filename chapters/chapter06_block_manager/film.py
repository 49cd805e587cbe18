"""The film of the block table: who holds which block in which step, replayed from the event log.

    python -m chapters.chapter06_block_manager.film
    python -m chapters.chapter06_block_manager.film --no-sharing
    python -m chapters.chapter06_block_manager.film --events toy.jsonl
    python -m chapters.chapter06_block_manager.film --workspace

It plays the toy. ``--workspace`` runs your own code instead of the reference.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

from chapters.machine.asking import choose_package

if TYPE_CHECKING:
    from minivllm.engine.events import Event


class Pool:
    """The blocks as far as events tell: who holds each one, and whether it can be found."""

    def __init__(self, num_blocks: int) -> None:
        self.holders: list[list[str]] = [[] for _ in range(num_blocks)]
        self.findable = [False] * num_blocks

    def apply(self, event: "Event") -> None:
        """Bring the picture up to date with one event more."""
        for block in event.blocks:
            if event.kind in ("shared", "taken"):
                self.holders[block].append(event.request_id)
            elif event.kind == "released":
                self.holders[block].remove(event.request_id)
            elif event.kind in ("cached", "evicted"):
                self.findable[block] = event.kind == "cached"


@dataclass(frozen=True)
class Frame:
    """The pool while step ``step`` runs: for each block its holders, and whether it is findable."""

    step: int
    holders: tuple[tuple[str, ...], ...]
    findable: tuple[bool, ...]


def frames(events: Iterable["Event"], num_blocks: int) -> Iterator[Frame]:
    """One frame for each step from 0 to the last.

    What a step gives back at its end, because a request is done, was held while the step ran.
    """
    pool = Pool(num_blocks)
    shown = 0
    of_blocks = (event for event in events if event.blocks)
    for step, found in groupby(of_blocks, key=lambda event: event.step):
        while shown < step:
            yield _frame(pool, shown)
            shown += 1
        of_step = list(found)
        last = list(takewhile(lambda event: event.kind == "released", reversed(of_step)))
        for event in of_step[: len(of_step) - len(last)]:
            pool.apply(event)
        yield _frame(pool, step)
        shown += 1
        for event in reversed(last):
            pool.apply(event)


def _frame(pool: Pool, step: int) -> Frame:
    return Frame(step, tuple(tuple(found) for found in pool.holders), tuple(pool.findable))


def as_text(pictures: Sequence[Frame]) -> Iterator[str]:
    """A line for each block, a letter for each step."""
    for block in range(len(pictures[0].holders)):
        letters = (_letter(frame.holders[block], frame.findable[block]) for frame in pictures)
        yield f"  block {block}  {''.join(letters)}"


def _letter(holders: tuple[str, ...], findable: bool) -> str:
    if not holders:
        return "+" if findable else "."
    return str(len(holders)) if len(holders) > 1 else holders[0][0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--no-sharing", action="store_true", help="without prefix caching")
    parser.add_argument("--events", metavar="FILE", help="write the event log as JSON lines")
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    arguments = parser.parse_args(argv)
    try:
        choose_package(arguments.workspace)
        from chapters.chapter06_block_manager import toy

        driver = toy.play(caching=not arguments.no_sharing)
    except (ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
    log = driver.manager.events
    for request in toy.REQUESTS:
        print(
            f"  {request.name}  {len(request.prompt)} tokens, {driver.found[request.name]:>2} found"
            f"  answer {driver.answers[request.name]}"
        )
    steps = "".join(str(step % 10) for step in range(driver.steps))
    print(f"\n  step     {steps}")
    print("\n".join(as_text(list(frames(log.events, toy.NUM_BLOCKS)))))
    print("\n  a to e: who holds it; 2: two hold it; +: nobody, but it can be found; .: blank")
    print(
        f"  {driver.model.num_run} tokens ran, at most {driver.manager.peak_held} blocks were held"
    )
    if arguments.events:
        log.write(arguments.events)
    return 0


if __name__ == "__main__":
    sys.exit(main())
