"""What the engine did, step by step: a list of small events, enough to draw it afterwards.

Nothing is recorded unless somebody hands an ``EventLog`` to the block manager or the scheduler.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# Every kind of event and the names of its numbers. "arrived", "step begun" and "step ended" name
# no blocks; neither do "prefill" and "decode", whose sequences hold what they were given before.
KINDS: dict[str, tuple[str, ...]] = {
    # The block manager.
    "shared": ("tokens",),  # cached blocks found for a request's first tokens, in order
    "taken": (),  # blocks for new content, in order
    "cached": ("identity", "parent"),  # one full block got its name; parent is an identity, 0: none
    "evicted": ("identity",),  # one block lost its name: its place is needed, or trust is lost
    "released": (),  # blocks of a request: all of them, or one that an equal one replaces
    # The scheduler.
    "arrived": ("tokens",),  # a request of so many prompt tokens was queued
    "admitted": ("cached",),  # it got its blocks; so many of its tokens were in the cache
    "prefill": ("start", "tokens"),  # a chunk of a prompt runs in this step, from position start
    "decode": ("start", "tokens"),  # the token at position start runs in this step
    "preempted": (),  # it lost its blocks and waits again
    "finished": ("tokens",),  # it ended with so many generated tokens
    "step begun": ("waiting", "running"),
    "step ended": ("tokens", "held"),  # tokens that ran, blocks held
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    step: the number of the step, from 0. time: seconds since the log was made. kind: one of
    ``KINDS``. request_id: None where no single request is meant. blocks: block ids. numbers: what
    ``KINDS`` names for the kind, in that order.
    """

    step: int
    time: float
    kind: str
    request_id: str | None = None
    blocks: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> int:
        """One of the numbers by its name, such as ``event["tokens"]``."""
        names = KINDS[self.kind]
        if name not in names:
            raise KeyError(f"an event of kind {self.kind!r} has {names}, not {name!r}")
        return self.numbers[names.index(name)]

    def to_json(self) -> str:
        """One line of JSON, the numbers by their names; what is empty is left out."""
        line: dict[str, object] = {"step": self.step, "time": self.time, "kind": self.kind}
        if self.request_id is not None:
            line["request_id"] = self.request_id
        if self.blocks:
            line["blocks"] = self.blocks
        line.update(zip(KINDS[self.kind], self.numbers, strict=True))
        return json.dumps(line)

    @classmethod
    def from_json(cls, line: str) -> "Event":
        """The inverse of ``to_json``; ValueError if the line is no event."""
        try:
            found = json.loads(line)
            kind = found["kind"]
            numbers = tuple(found[name] for name in KINDS[kind])
            blocks = tuple(found.get("blocks", ()))
            return cls(found["step"], found["time"], kind, found.get("request_id"), blocks, numbers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this line is no event ({error!r}): {line[:80]!r}") from None


class EventLog:
    """Events in the order in which they happened.

    clock: returns seconds; tests pass a false one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.events: list[Event] = []
        self.step = 0
        self._clock = clock
        self._start = clock()

    def add(
        self,
        kind: str,
        request_id: str | None = None,
        blocks: Iterable[int] = (),
        *numbers: int,
        step: int | None = None,
    ) -> None:
        """Record an event of the current step, or of ``step`` where its result comes in later."""
        assert len(numbers) == len(KINDS[kind]), f"{kind!r} needs {KINDS[kind]}"
        number = self.step if step is None else step
        moment = self._clock() - self._start
        self.events.append(Event(number, moment, kind, request_id, tuple(blocks), numbers))

    def of(self, *kinds: str, request_id: str | None = None) -> list[Event]:
        """The events of these kinds, all if none is named, of one request or of all."""
        assert all(kind in KINDS for kind in kinds), f"{kinds} must be among {tuple(KINDS)}"
        return [
            event
            for event in self.events
            if (not kinds or event.kind in kinds) and request_id in (None, event.request_id)
        ]

    def write(self, file: str | Path) -> None:
        """Write the events as JSON lines."""
        lines = "".join(event.to_json() + "\n" for event in self.events)
        Path(file).write_text(lines, encoding="utf-8")


def read_events(file: str | Path) -> list[Event]:
    """The events of a file that ``EventLog.write`` wrote; ValueError names a line that is none."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [Event.from_json(line) for line in lines if line.strip()]
