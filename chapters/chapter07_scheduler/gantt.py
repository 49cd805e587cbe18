"""Who ran in which step, replayed from the event log.

    python -m chapters.chapter07_scheduler.gantt
    python -m chapters.chapter07_scheduler.gantt --workspace
    python -m chapters.chapter07_scheduler.gantt --events toy.jsonl

It plays the toy under both policies. ``--workspace`` runs your own code instead of the reference.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from chapters.machine.asking import choose_package

if TYPE_CHECKING:
    from minivllm.engine.events import Event


@dataclass(frozen=True)
class Cell:
    """What a request did in a step. kind: ``prefill``, ``decode``, ``idle`` (it held blocks, but
    did not run), ``waiting`` or ``preempted``. tokens: how many of its tokens ran."""

    kind: str
    tokens: int = 0


def rows(events: Iterable["Event"]) -> dict[str, dict[int, Cell]]:
    """request -> step -> what it did; requests in order of arrival."""
    found: dict[str, dict[int, Cell]] = {}
    state: dict[str, str] = {}
    for event in events:
        name = event.request_id
        if event.kind == "arrived":
            found[name], state[name] = {}, "waiting"
        elif event.kind == "admitted":
            state[name] = "idle"
        elif event.kind == "preempted":
            state[name] = "waiting"
            found[name][event.step] = Cell("preempted")
        elif event.kind in ("prefill", "decode"):
            found[name][event.step] = Cell(event.kind, event["tokens"])
        elif event.kind == "finished":
            del state[name]
            found[name].setdefault(event.step, Cell("idle"))
        elif event.kind == "step ended":
            for left, kind in state.items():
                found[left].setdefault(event.step, Cell(kind))
    return found


def gaps(events: Iterable["Event"]) -> dict[str, list[int]]:
    """request -> tokens, anybody's, that ran from each of its tokens to its next."""
    ran: dict[str, list[int]] = {}
    total = 0
    of_step: list[Event] = []
    length: dict[str, int] = {}
    for event in events:
        if event.kind == "arrived":
            length[event.request_id] = event["tokens"]
        elif event.kind in ("prefill", "decode"):
            of_step.append(event)
        elif event.kind == "step ended":
            total += event["tokens"]
            for one in of_step:
                # It samples if it reaches the last token that there is.
                if one["start"] + one["tokens"] == length[one.request_id]:
                    length[one.request_id] += 1
                    ran.setdefault(one.request_id, []).append(total)
            of_step = []
    return {name: [b - a for a, b in pairwise(times)] for name, times in ran.items()}


def as_text(found: dict[str, dict[int, Cell]], steps: int) -> list[str]:
    """A line for each request, a letter for each step."""
    letters = {"prefill": "P", "decode": "d", "idle": "-", "waiting": ".", "preempted": "x"}
    lines = ["step  " + "".join(str(step % 10) for step in range(steps))]
    for name, cells in found.items():
        row = (letters[cells[step].kind] if step in cells else " " for step in range(steps))
        lines.append(f"{name}   {''.join(row)}".rstrip())
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--events", metavar="FILE", help="write the first event log as JSON lines")
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    arguments = parser.parse_args(argv)
    try:
        choose_package(arguments.workspace)
        from chapters.chapter07_scheduler import toy

        played = {policy: toy.play(policy) for policy in ("prefill_first", "mixed")}
    except (ValueError, NotImplementedError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    for policy, one in played.items():
        widest = max(gaps(one.events.events)["ann"])
        print(f"{policy}: {one.steps} steps, {one.tokens} tokens run,", end=" ")
        print(f"{one.preemptions} preemptions; ann's longest gap: {widest} tokens")
        print("\n".join("  " + line for line in as_text(rows(one.events.events), one.steps)))
    print("  P: prefill; d: decode; -: holds blocks, does not run; .: waits; x: preempted")
    for name, answer in played["mixed"].answers.items():
        print(f"  {name} is told {answer}")
    if arguments.events:
        played["prefill_first"].events.write(arguments.events)
    return 0


if __name__ == "__main__":
    sys.exit(main())
