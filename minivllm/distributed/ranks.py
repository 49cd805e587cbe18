"""The other ranks of an engine, as rank 0 sees them: told, waited for, and given up together."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from minivllm.distributed.channel import QUIT, STEP, Link
from minivllm.distributed.group import CollectiveError, TorchGroup
from minivllm.distributed.runner import TensorParallelRunner
from minivllm.distributed.watch import Fault, Watch
from minivllm.distributed.worker import Job, stats_of
from minivllm.engine.outputs import RankStats


class RankFailure(RuntimeError):
    """A rank has died, hangs or failed; the message names it and the cause. Build a new engine."""


class Ranks:
    """The other ranks of an engine, as rank 0 sees them."""

    def __init__(
        self,
        job: Job,
        size: int,
        links: dict[int, Link],
        processes: dict[int, subprocess.Popen[bytes]],
    ) -> None:
        self.job = job
        self.device = job.device_of(0)
        self.size = size
        self.fault: Fault | None = None
        self.group: TorchGroup | None = None
        # Kept for the others, who may still be reading from it.
        self.store: dist.Store | None = None
        self.stats: list[RankStats] = []
        self._load_seconds = 0.0
        self._links = links
        self._processes = processes
        self._stages: dict[str, dict[int, dict[str, Any]]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._watch = Watch(
            links,
            processes,
            ready=self._note,
            fault=self._end,
            loading=lambda: len(self._stages.get("built", ())) < len(links),
        )
        self._watch.begin()

    # ------------------------------------------------------------------ work

    def join(self, store: dist.Store, *, local: bool) -> None:
        """Rank 0 takes its own place in the group."""
        self.store = store
        with self.working():
            self.group = TorchGroup(store, 0, self.size, self.device, local=local)

    def load(self) -> torch.nn.Module:
        """Rank 0's share of the model, once every rank has its own."""
        assert self.group is not None
        with self.working():
            began = time.perf_counter()
            model = self.job.load(self.group, self.device)
            self._load_seconds = time.perf_counter() - began
            self._await("loaded")
        return model

    def make_runner(self, model: torch.nn.Module) -> TensorParallelRunner:
        """Rank 0's runner, once every rank has its own."""
        assert self.group is not None
        with self.working():
            runner = self.job.make_runner(model, self.group, self.device, crew=self)
            said = self._await("built")
        others = [RankStats(**said[rank]["stats"]) for rank in sorted(said)]
        self.stats = [stats_of(runner, self._load_seconds), *others]
        return runner

    def send_step(self, message: bytes) -> None:
        """Tell every rank what to execute."""
        for link in self._links.values():
            link.send(STEP, message)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around all that needs the others: their failure is raised as RankFailure.

        What a user asked of a rank and cannot have is a ValueError, as on one rank. After an error
        of rank 0 itself the engine is of no use either, for the ranks are no longer in step.
        """
        self.check()
        try:
            yield
        except BaseException as error:
            if isinstance(error, CollectiveError | OSError):
                with self._changed:
                    self._changed.wait_for(lambda: self.fault is not None, timeout=3.0)
            if self.fault is None and not self._closing:
                self._end(Fault(0, f"{type(error).__name__}: {error}"))
                raise
            if self.fault is not None and isinstance(error, Exception):
                self.check(error)
            raise

    def check(self, error: Exception | None = None) -> None:
        """RankFailure, caused by ``error``, if a rank has failed."""
        fault = self.fault
        if fault is None:
            return
        if isinstance(error, RankFailure):
            raise error
        text = f"tensor parallel rank {fault.rank} of {self.size} {fault.cause}"
        if fault.user:
            raise ValueError(text) from error
        raise RankFailure(f"{text}; this engine has ended, build a new one") from error

    def _note(self, rank: int, said: dict[str, Any]) -> None:
        with self._changed:
            self._stages.setdefault(str(said.get("stage")), {})[rank] = said
            self._changed.notify_all()

    def _await(self, stage: str) -> dict[int, dict[str, Any]]:
        """What each of the others said when it came so far."""
        others = set(self._links)

        def come() -> bool:
            return self.fault is not None or set(self._stages.get(stage, ())) == others

        with self._changed:
            self._changed.wait_for(come)
        self.check()
        return self._stages[stage]

    # ------------------------------------------------------------------ end

    def _end(self, fault: Fault) -> None:
        """Something failed: let nothing wait for it, and leave nothing behind."""
        for process in self._processes.values():
            process.kill()
        for link in self._links.values():
            link.close()
        with self._changed:
            self.fault = self.fault or fault
            self._changed.notify_all()
        if self.group is not None and self.device.type == "cuda":
            # Kernels that wait for a lost rank would wait forever.
            self.group.abort()
        for process in self._processes.values():
            process.wait()

    def close(self) -> None:
        """Dismiss the ranks and wait until their processes are gone. May be called twice."""
        if self._closing:
            return
        self._closing = True
        self._watch.end()
        if self.fault is None:
            for link in self._links.values():
                try:
                    link.send(QUIT)
                except OSError:
                    pass  # it has gone already
        if self.group is not None:
            self.group.abort()
        until = time.monotonic() + 5.0
        for process in self._processes.values():
            try:
                process.wait(timeout=max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for link in self._links.values():
            link.close()
        self._watch.wait()
        with self._changed:
            self.fault = self.fault or Fault(0, "has shut this engine down")
