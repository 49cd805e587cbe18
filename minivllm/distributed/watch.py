"""How rank 0 notices that another rank is lost, and which one it was that began.

Every rank is asked every two seconds whether it is there, and answers from a thread of its own. It
may say itself that it failed; its connection may end, as it does however its process ends; or
nothing comes. One failure soon looks like many, for ranks wait for one another. So a verdict takes
half a second: what a rank says of itself comes first, then what is seen of it, and last what a rank
only suffered from another.
"""

from __future__ import annotations

import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minivllm.distributed.channel import FAILED, PING, READY, Link, read_json

PING_SECONDS = 2.0
# A rank answers while it computes or waits, but not while a library holds Python's lock, as the one
# that reads files does while a rank loads.
SILENT_SECONDS = 10.0
SILENT_WHILE_LOADING_SECONDS = 60.0
# Whoever is the cause is known within this time of the first sign of it.
VERDICT_SECONDS = 0.5


@dataclass(frozen=True)
class Fault:
    """rank, and what became of it. user: of what the user asked for; echo: of another's fault."""

    rank: int
    cause: str
    user: bool = False
    echo: bool = False
    told: bool = True


# (rank, what it said), when it has come so far; the fault that began; may ranks be silent for long?
Ready = Callable[[int, dict[str, Any]], None]
OnFault = Callable[[Fault], None]
Loading = Callable[[], bool]


class Watch:
    """A thread that reads what the ranks say, until one fails or :meth:`end` is called."""

    def __init__(
        self,
        links: dict[int, Link],
        processes: dict[int, subprocess.Popen[bytes]],
        *,
        ready: Ready,
        fault: OnFault,
        loading: Loading,
    ) -> None:
        self._links = links
        self._processes = processes
        self._ended = False
        # They are the thread's alone, and go with it: whoever made this object is to be free then.
        self._thread = threading.Thread(
            target=self._watch, args=(ready, fault, loading), name="minivllm ranks", daemon=True
        )

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Faults are of no more interest."""
        self._ended = True

    def wait(self) -> None:
        """Wait until the thread has ended, unless this is the thread."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def _watch(self, ready: Ready, on_fault: OnFault, loading: Loading) -> None:
        open_links = dict(self._links)
        heard = dict.fromkeys(open_links, time.monotonic())
        pinged = time.monotonic()
        while not self._ended:
            faults = self._listen(open_links, heard, ready, 0.25)
            now = time.monotonic()
            if now - pinged > PING_SECONDS:
                pinged = now
                for link in list(open_links.values()):
                    threading.Thread(target=_ping, args=(link,), daemon=True).start()
            allowed = SILENT_WHILE_LOADING_SECONDS if loading() else SILENT_SECONDS
            for rank, last in heard.items():
                if now - last > allowed:
                    seconds = f"{now - last:.0f} s"
                    faults.append(Fault(rank, f"hangs: it has not answered for {seconds}"))
            if faults and not self._ended:
                until = now + VERDICT_SECONDS
                while (left := until - time.monotonic()) > 0:
                    faults += self._listen(open_links, heard, ready, left)
                on_fault(min(faults, key=lambda fault: (fault.echo, not fault.told)))
                return

    def _listen(
        self, open_links: dict[int, Link], heard: dict[int, float], ready: Ready, seconds: float
    ) -> list[Fault]:
        """Take in what has come; the faults among it."""
        if not open_links:
            time.sleep(seconds)
            return []
        try:
            readable, _, _ = select.select(list(open_links.values()), [], [], seconds)
        except (OSError, ValueError):
            return []  # closed while we waited
        faults = []
        for rank, link in list(open_links.items()):
            if link not in readable:
                continue
            frame = link.receive()
            heard[rank] = time.monotonic()
            if frame is None:
                del open_links[rank], heard[rank]
                faults.append(Fault(rank, self._how_it_ended(rank), told=False))
                continue
            kind, said = frame[0], read_json(frame[1])
            if kind == READY:
                ready(rank, said)
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


def _ping(link: Link) -> None:
    # In a thread, since a rank that hangs may not read, and then sending waits.
    try:
        link.send(PING)
    except OSError:
        pass  # the watch will see why
