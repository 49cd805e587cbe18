"""Ranks that are threads of one process: the same calls as between GPUs, over one table.

    results, meeting = on_ranks(2, work)     # work(group) runs once a rank
    meeting.words                            # what they said to each other

Processes cost seconds to start and hang when they disagree. Threads start at once, and their table
sees what no rank can see: that two of them call different things, or that one has left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Nobody computes for so long between two calls here; then something is wrong.
LIMIT_SECONDS = 20.0


class RanksApart(RuntimeError):
    """The ranks no longer make the same calls; on GPUs they would hang, or mix up their numbers."""


@dataclass(frozen=True)
class Word:
    """One exchange. kind: all_reduce or all_gather; shape, nbytes: of one rank's tensor.

    who: the layer that asked, where it is known.
    """

    kind: str
    shape: tuple[int, ...]
    nbytes: int
    who: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {list(self.shape)}" + f" of {self.who}" * bool(self.who)


class Meeting:
    """The table at which ``size`` threads exchange tensors, round by round."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.words: list[Word] = []
        self._changed = threading.Condition()
        self._brought: dict[int, tuple[Word, torch.Tensor]] = {}
        self._gone: set[int] = set()
        self._every = torch.empty(0)
        self._problem = ""

    @property
    def num_reductions(self) -> int:
        """How many of the words were all-reduces."""
        return sum(word.kind == "all_reduce" for word in self.words)

    def exchange(self, rank: int, word: Word, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` [...]: [P, ...]. RanksApart if they do not all bring the same word."""
        with self._changed:
            number = len(self.words)
            self._brought[rank] = word, x.clone()
            self._look()
            while len(self.words) == number and not self._problem:
                if not self._changed.wait(LIMIT_SECONDS):
                    self._problem = f"rank {rank} has waited {LIMIT_SECONDS:.0f} s in {word}"
                    self._changed.notify_all()
            if self._problem:
                raise RanksApart(self._problem)
            # Nobody can end the next round before this rank has brought something to it.
            return self._every

    def leave(self, rank: int) -> None:
        """``rank`` will say nothing more."""
        with self._changed:
            self._gone.add(rank)
            self._look()

    def _look(self) -> None:
        words = {rank: word for rank, (word, _) in sorted(self._brought.items())}
        if len(set(words.values())) > 1:
            said = ", ".join(f"rank {rank} in {word}" for rank, word in words.items())
            self._problem = self._problem or f"the ranks call different things: {said}"
        elif words and self._gone:
            rank, word = next(iter(words.items()))
            gone = min(self._gone)
            self._problem = self._problem or (
                f"rank {rank} waits in {word}, and rank {gone} has ended without it"
            )
        elif len(words) == self.size:
            self._every = torch.stack([self._brought[rank][1] for rank in range(self.size)])
            self.words.append(words[0])
            self._brought.clear()
        else:
            return
        self._changed.notify_all()


class ThreadGroup:
    """A :class:`minivllm.distributed.group.Group` of threads. who: named in what it says."""

    def __init__(self, meeting: Meeting, rank: int, who: str = "") -> None:
        self.meeting, self.rank, self.size, self.who = meeting, rank, meeting.size, who

    def named(self, who: str) -> ThreadGroup:
        """The same rank, speaking for ``who``."""
        return ThreadGroup(self.meeting, self.rank, who)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``x``, in its memory; added up in the same order everywhere."""
        return x.copy_(self._exchange("all_reduce", x).sum(dim=0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` [...]: [P, ...]."""
        return self._exchange("all_gather", x)

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        return int(self._exchange("least", torch.tensor(value)).min())

    def _exchange(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        word = Word(kind, tuple(x.shape), x.nbytes, self.who)
        return self.meeting.exchange(self.rank, word, x)


def on_ranks(size: int, work: Callable[[ThreadGroup], Any]) -> tuple[list[Any], Meeting]:
    """What ``work`` gives on each of ``size`` ranks, and the meeting with all that was said.

    Raises what a rank raised; RanksApart if the ranks did not make the same calls.
    """
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = work(ThreadGroup(meeting, rank))
        except BaseException as error:
            errors.append(error)
        finally:
            meeting.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise cause_of(errors)
    return results, meeting


def cause_of(errors: Sequence[BaseException]) -> BaseException:
    """The error that the others follow from."""
    return next((error for error in errors if not isinstance(error, RanksApart)), errors[0])
