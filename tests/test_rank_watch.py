"""How rank 0 sees that another rank is lost: the watch, on connections that stand for processes."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from minivllm.distributed import watch
from minivllm.distributed.channel import FAILED, PING, PONG, READY, Link, write_json
from minivllm.distributed.watch import Fault, Watch


class Stand:
    """Rank 0's watch over ranks 1 and 2, and the ends of the connections that are theirs."""

    def __init__(self, processes: dict[int, Any] | None = None, *, loading: bool = False) -> None:
        self.theirs: dict[int, Link] = {}
        links: dict[int, Link] = {}
        for rank in (1, 2):
            here, there = socket.socketpair()
            links[rank], self.theirs[rank] = (_link(end) for end in (here, there))
        self.links = links
        self.ready: list[tuple[int, dict[str, Any]]] = []
        self.faults: list[Fault] = []
        self.watch = Watch(
            links,
            processes or {},
            ready=lambda rank, said: self.ready.append((rank, said)),
            fault=self.faults.append,
            loading=lambda: loading,
        )
        self.watch.begin()

    def fault(self, seconds: float = 5.0) -> Fault:
        """The fault that the watch reports within ``seconds``."""
        until = time.monotonic() + seconds
        while not self.faults and time.monotonic() < until:
            time.sleep(0.01)
        assert len(self.faults) == 1
        return self.faults[0]

    def close(self) -> None:
        self.watch.end()
        self.watch.wait()
        for link in (*self.links.values(), *self.theirs.values()):
            link.close()


def _link(end: socket.socket) -> Link:
    # What a Link sets belongs to TCP, which a pair of local sockets is not.
    link = Link.__new__(Link)

    link._socket, link._lock = end, threading.Lock()
    return link


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PING_SECONDS", 0.1)
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(watch, "VERDICT_SECONDS", 0.2)


@pytest.fixture
def stand(short_times: None) -> Iterator[Stand]:
    stand = Stand()
    yield stand
    stand.close()


def answer(stand: Stand, rank: int, seconds: float) -> None:
    """Let a rank answer for ``seconds``."""
    until = time.monotonic() + seconds
    stand.theirs[rank]._socket.settimeout(0.05)
    while time.monotonic() < until:
        frame = stand.theirs[rank].receive()
        if frame is not None and frame[0] == PING:
            stand.theirs[rank].send(PONG)


def test_what_ranks_say_is_passed_on(stand: Stand) -> None:
    stand.theirs[2].send(READY, write_json({"stage": "built", "stats": 7}))
    until = time.monotonic() + 5
    while not stand.ready and time.monotonic() < until:
        time.sleep(0.01)
    assert stand.ready == [(2, {"stage": "built", "stats": 7})]
    assert not stand.faults


def test_a_rank_that_does_not_answer_hangs(stand: Stand) -> None:
    answer(stand, 1, 1.2)  # and rank 2 says nothing
    fault = stand.fault()
    assert fault.rank == 2 and "hangs: it has not answered for" in fault.cause


def test_ranks_that_load_may_be_silent_for_longer(short_times: None) -> None:
    stand = Stand(loading=True)
    try:
        time.sleep(1.2)
        assert not stand.faults
    finally:
        stand.close()


def test_a_process_that_was_killed_is_named_with_its_signal(short_times: None) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stand = Stand({2: process})
    try:
        process.kill()
        stand.theirs[2].close()
        fault = stand.fault()
        assert (fault.rank, fault.told) == (2, False)
        assert fault.cause == "died: its process was killed by SIGKILL"
    finally:
        process.kill()
        stand.close()


def test_the_fault_that_began_is_blamed(stand: Stand) -> None:
    """Rank 1 breaks off because rank 2 ran out of memory, and says so first."""
    stand.theirs[1].send(FAILED, write_json({"text": "CollectiveError", "echo": True}))
    time.sleep(0.05)
    text = "torch.OutOfMemoryError: CUDA out of memory"
    stand.theirs[2].send(FAILED, write_json({"text": text, "user": False}))
    stand.theirs[1].close()
    fault = stand.fault()
    assert (fault.rank, fault.cause, fault.echo) == (2, f"failed: {text}", False)
