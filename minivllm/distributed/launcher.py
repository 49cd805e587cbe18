"""How the ranks of an engine come together, and how rank 0 notices that one of them is lost.

On one host, rank 0 is the process in which ``LLM(tensor_parallel_size=P)`` was called, and starts
the others. Under torchrun, which has started all of them, everybody calls ``LLM(...)``::

    # torchrun --nproc-per-node 2 script.py
    from minivllm import LLM

    if __name__ == "__main__":
        with LLM("folder", tensor_parallel_size=2) as llm:  # other ranks stay in here ...
            print(llm.generate("Hello"))  # ... so only rank 0 comes here

On rank 0 ``LLM(...)`` returns, on the others it serves until rank 0 shuts the engine down, and then
ends the process (``SystemExit``).

Ports are the system's choice and every engine has its own, so engines do not meet.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from minivllm.distributed.channel import (
    CONNECT_SECONDS,
    FAILED,
    PING,
    QUIT,
    READY,
    STEP,
    Link,
    Listener,
    connect,
    read_json,
)
from minivllm.distributed.group import MEETING_TIMEOUT, CollectiveError, TorchGroup
from minivllm.distributed.parallel_layers import share_of
from minivllm.distributed.runner import TensorParallelRunner
from minivllm.distributed.worker import Job, serve
from minivllm.models.config import ModelConfig

PING_SECONDS = 2.0
# A rank answers while it computes or waits, but not while a library holds Python's lock, as the one
# that reads files does while a rank loads.
SILENT_SECONDS = 10.0
SILENT_WHILE_LOADING_SECONDS = 60.0
# Whoever is the cause is known within this time of the first sign of it.
VERDICT_SECONDS = 0.5


class RankFailure(RuntimeError):
    """A rank has died, hangs or failed; the message names it and the cause. Build a new engine."""


@dataclass(frozen=True)
class Place:
    """Where this process stands. started: by torchrun, as were the others."""

    rank: int = 0
    local_rank: int = 0
    started: bool = False
    local: bool = True

    @classmethod
    def here(cls, size: int) -> Place:
        """From the environment; ValueError if torchrun's number of ranks is not ``size``."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        if any(name not in os.environ for name in names):
            return cls()
        rank, local_rank, world, local_world = (int(os.environ[name]) for name in names[:4])
        if world != size:
            raise ValueError(
                f"tensor_parallel_size={size}, but torchrun has started {world} ranks "
                "(WORLD_SIZE); make them equal"
            )
        return cls(rank, local_rank, started=True, local=local_world == world)


@dataclass(frozen=True)
class Fault:
    """rank, and what became of it. user: of what the user asked for; echo: of another's fault."""

    rank: int
    cause: str
    user: bool = False
    echo: bool = False
    told: bool = True


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
        self._links = links
        self._processes = processes
        self._stages: dict[str, set[int]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._watcher = threading.Thread(target=self._watch, name="minivllm ranks", daemon=True)
        self._watcher.start()

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
            model = self.job.load(self.group, self.device)
            self._await("loaded")
        return model

    def make_runner(self, model: torch.nn.Module) -> TensorParallelRunner:
        """Rank 0's runner, once every rank has its own."""
        assert self.group is not None
        with self.working():
            runner = self.job.make_runner(model, self.group, self.device, crew=self)
            self._await("built")
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

    def _await(self, stage: str) -> None:
        with self._changed:
            others = set(self._links)
            self._changed.wait_for(
                lambda: self.fault is not None or self._stages.get(stage) == others
            )
        self.check()

    # ------------------------------------------------------------------ watch

    def _watch(self) -> None:
        """Read what the ranks say, until one fails or all are dismissed."""
        open_links = dict(self._links)
        heard = dict.fromkeys(open_links, time.monotonic())
        pinged = time.monotonic()
        while not self._closing:
            faults = self._listen(open_links, heard, 0.25)
            now = time.monotonic()
            if now - pinged > PING_SECONDS:
                pinged = now
                for link in list(open_links.values()):
                    threading.Thread(target=_ping, args=(link,), daemon=True).start()
            built = len(self._stages.get("built", ())) == len(self._links)
            allowed = SILENT_SECONDS if built else SILENT_WHILE_LOADING_SECONDS
            for rank, last in heard.items():
                if now - last > allowed:
                    seconds = f"{now - last:.0f} s"
                    faults.append(Fault(rank, f"hangs: it has not answered for {seconds}"))
            if faults and not self._closing:
                # One failure soon looks like many: wait for the one that began.
                until = now + VERDICT_SECONDS
                while (left := until - time.monotonic()) > 0:
                    faults += self._listen(open_links, heard, left)
                # What a rank says of itself comes before what is seen of it, and echoes come last.
                self._end(min(faults, key=lambda fault: (fault.echo, not fault.told)))
                return

    def _listen(
        self, open_links: dict[int, Link], heard: dict[int, float], seconds: float
    ) -> list[Fault]:
        """Take in what has come; the faults among it."""
        if not open_links:
            time.sleep(seconds)
            return []
        try:
            ready, _, _ = select.select(list(open_links.values()), [], [], seconds)
        except (OSError, ValueError):
            return []  # closed while we waited
        faults = []
        for rank, link in list(open_links.items()):
            if link not in ready:
                continue
            frame = link.receive()
            heard[rank] = time.monotonic()
            if frame is None:
                del open_links[rank], heard[rank]
                faults.append(Fault(rank, self._how_it_ended(rank), told=False))
                continue
            kind, said = frame[0], read_json(frame[1])
            if kind == READY:
                with self._changed:
                    self._stages.setdefault(str(said.get("stage")), set()).add(rank)
                    self._changed.notify_all()
            elif kind == FAILED:
                user, echo = bool(said.get("user")), bool(said.get("echo"))
                faults.append(Fault(rank, f"failed: {said.get('text')}", user=user, echo=echo))
        return faults

    def _how_it_ended(self, rank: int) -> str:
        process = self._processes.get(rank)
        if process is None:
            return "died: its connection ended"
        try:
            code = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "broke off its connection"
        if code < 0:
            return f"died: its process was killed by {signal.Signals(-code).name}"
        return f"died: its process ended with exit code {code}"

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
        if self._watcher is not threading.current_thread():
            self._watcher.join(timeout=5.0)
        with self._changed:
            self.fault = self.fault or Fault(0, "has shut this engine down")


def assemble(job: Job, size: int) -> Ranks:
    """Bring P = ``size`` ranks together. Returns on rank 0; on the others serves, then exits.

    Raises ValueError, on every rank, if the ranks do not fit the model, the machine or each other.
    """
    share_of(ModelConfig.from_folder(Path(job.folder)), size)
    place = Place.here(size)
    if job.device == "cuda":
        here = int(os.environ["LOCAL_WORLD_SIZE"]) if place.started else size
        count = torch.cuda.device_count()
        if here > count:
            raise ValueError(
                f"tensor_parallel_size={size} needs {here} GPUs on this host, which has {count}; "
                "lower it, or start ranks on several hosts with torchrun"
            )
    return _meet(job, size, place) if place.started else _spawn(job, size)


def _spawn(job: Job, size: int) -> Ranks:
    """Start the other ranks on this host."""
    secret = secrets.token_hex(16)
    listener = Listener(local=True)
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=MEETING_TIMEOUT
    )
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    processes: dict[int, subprocess.Popen[bytes]] = {}
    links: dict[int, Link] = {}
    try:
        for rank in range(1, size):
            orders = {
                "rank": rank,
                "size": size,
                "port": listener.port,
                "secret": secret,
                "store_port": store.port,
                # Ranks on a CPU share its cores.
                "num_threads": max(1, torch.get_num_threads() // size),
                "job": asdict(job),
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "minivllm.distributed.worker"],
                stdin=subprocess.PIPE,
                env=environment,
            )
            processes[rank] = process
            # Not as an argument or a variable, which other users of the host could read.
            assert process.stdin is not None
            process.stdin.write(json.dumps(orders).encode() + b"\n")
            process.stdin.close()
        _accept(listener, links, secret, size, processes)
        ranks = Ranks(job, size, links, processes)
    except BaseException:
        for process in processes.values():
            process.kill()
            process.wait()
        raise
    finally:
        listener.close()
    return _joined(ranks, store, local=True)


def _meet(job: Job, size: int, place: Place) -> Ranks:
    """Find the ranks that torchrun has started; all but rank 0 never return."""
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    # torchrun keeps a store of its own at that address; other starters leave it to rank 0.
    there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: dist.Store = dist.TCPStore(
        host,
        port,
        is_master=place.rank == 0 and not there,
        wait_for_workers=False,
        timeout=MEETING_TIMEOUT,
    )
    # The n-th engine of one rank meets the n-th engine of the others.
    number = store.add(f"minivllm/engines of rank {place.rank}", 1)
    store = dist.PrefixStore(f"minivllm/{number}", store)
    _agree(job, store, place.rank, size)
    if place.rank != 0:
        meeting = read_json(store.get("channel"))
        address = "127.0.0.1" if place.local else host
        link = connect(address, meeting["port"], place.rank, meeting["secret"])
        served = serve(
            job,
            store,
            link,
            rank=place.rank,
            size=size,
            local_rank=place.local_rank,
            local=place.local,
        )
        raise SystemExit(0 if served else 1)
    secret, links = secrets.token_hex(16), {}
    listener = Listener(local=place.local)
    try:
        store.set("channel", json.dumps({"port": listener.port, "secret": secret}))
        _accept(listener, links, secret, size, {})
    finally:
        listener.close()
    return _joined(Ranks(job, size, links, {}), store, local=place.local)


def _agree(job: Job, store: dist.Store, rank: int, size: int) -> None:
    """ValueError on every rank if two of them were given different settings."""
    settings = {**job.settings, "dtype": job.dtype, "device": job.device}
    # A model may lie elsewhere on another host, but must be the same.
    settings["model"] = repr(ModelConfig.from_folder(Path(job.folder)))
    del settings["tokenizer"]
    store.set(f"settings/{rank}", json.dumps(settings, default=str, sort_keys=True))
    try:
        every = [read_json(store.get(f"settings/{other}")) for other in range(size)]
    except dist.DistStoreError as error:
        raise RankFailure(
            f"not all of {size} ranks came within {MEETING_TIMEOUT.seconds} s. Every rank's script "
            "must call LLM(...), and can do so once: ranks above 0 end with their first engine"
        ) from error
    first = every[0]
    for other, theirs in enumerate(every):
        for name in sorted(first.keys() | theirs.keys()):
            if first.get(name) != theirs.get(name):
                raise ValueError(
                    f"rank {other} was given {name}={theirs.get(name)!r}, and rank 0 "
                    f"{first.get(name)!r}; start all ranks with the same script and settings"
                )
    # Nobody may go on, and end the store, before everybody has read.
    store.add("settings/read", 1)
    until = time.monotonic() + 5.0
    while rank == 0 and store.add("settings/read", 0) < size and time.monotonic() < until:
        time.sleep(0.01)


def _accept(
    listener: Listener,
    links: dict[int, Link],
    secret: str,
    size: int,
    processes: dict[int, subprocess.Popen[bytes]],
) -> None:
    """Wait until every other rank has come."""
    until = time.monotonic() + 2 * CONNECT_SECONDS
    while len(links) < size - 1:
        for rank, process in processes.items():
            if rank not in links and process.poll() is not None:
                raise RankFailure(
                    f"tensor parallel rank {rank} of {size} died while it started, with exit code "
                    f"{process.returncode}; what it has printed says why"
                )
        if time.monotonic() > until:
            missing = ", ".join(str(rank) for rank in range(1, size) if rank not in links)
            raise RankFailure(
                f"tensor parallel rank {missing} of {size} did not come within "
                f"{2 * CONNECT_SECONDS:.0f} s"
            )
        came = listener.accept(secret, size, 0.2)
        if came is not None:
            links[came[0]] = came[1]


def _joined(ranks: Ranks, store: dist.Store, *, local: bool) -> Ranks:
    try:
        ranks.join(store, local=local)
    except BaseException:
        ranks.close()
        raise
    return ranks


def _ping(link: Link) -> None:
    # In a thread, since a rank that hangs may not read, and then sending waits.
    try:
        link.send(PING)
    except OSError:
        pass  # the watch will see why
