"""How rank 0 tells the others what to do: frames of bytes over a socket.

    | length, 4 bytes | kind, 1 byte | payload: JSON, or nothing |

Frames hold data alone, never pickles, which would run whatever they say. Whoever connects has to
know a secret that only the ranks of one engine share.

A connection has the life of its processes: if one of them ends, however it ends, the other reads
the end of the stream at once.
"""

from __future__ import annotations

import hmac
import json
import socket
import struct
import threading
from typing import Any

HELLO, STEP, QUIT, PING = b"H", b"S", b"Q", b"?"  # to a rank; HELLO is its own first word
READY, FAILED, PONG = b"R", b"F", b"!"  # from a rank

_HEAD = struct.Struct("!Ic")
# Larger than any step; what is longer did not come from us.
MOST_BYTES = 1 << 28
CONNECT_SECONDS = 60.0


class Link:
    """One end of a connection. Sending is for any thread, receiving for one."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        """Send a frame; OSError if the other end is gone."""
        with self._lock:
            self._socket.sendall(_HEAD.pack(len(payload), kind) + payload)

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next frame's kind and payload; None at the end of the stream."""
        try:
            head = self._read(_HEAD.size)
            if head is None:
                return None
            length, kind = _HEAD.unpack(head)
            if length > MOST_BYTES:
                return None
            payload = self._read(length)
        except OSError:
            # Reset, or closed by another thread: to the reader it is the end.
            return None
        return None if payload is None else (kind, payload)

    def close(self) -> None:
        """Close it; a receive in another thread returns None."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was faster
        self._socket.close()

    def _read(self, count: int) -> bytes | None:
        chunks = bytearray()
        while len(chunks) < count:
            chunk = self._socket.recv(count - len(chunks))
            if not chunk:
                return None
            chunks += chunk
        return bytes(chunks)


class Listener:
    """Rank 0's side of the meeting: a socket on a port that the system chose.

    local: only for processes of this host.
    """

    def __init__(self, *, local: bool) -> None:
        self._socket = socket.create_server(("127.0.0.1" if local else "", 0))
        self.port: int = self._socket.getsockname()[1]

    def accept(self, secret: str, size: int, seconds: float) -> tuple[int, Link] | None:
        """The next rank that knows the secret, and its link; None if none came in ``seconds``."""
        self._socket.settimeout(seconds)
        try:
            sock, _ = self._socket.accept()
        except TimeoutError:
            return None
        sock.settimeout(5.0)
        link = Link(sock)
        frame = link.receive()
        hello = read_json(frame[1]) if frame is not None and frame[0] == HELLO else {}
        rank = hello.get("rank")
        known = hmac.compare_digest(str(hello.get("secret")), secret)
        if not known or not isinstance(rank, int) or not 0 < rank < size:
            link.close()
            return None
        sock.settimeout(None)
        return rank, link

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def connect(host: str, port: int, rank: int, secret: str) -> Link:
    """Another rank's side of the meeting; OSError if rank 0 is not there."""
    sock = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    sock.settimeout(None)
    link = Link(sock)
    link.send(HELLO, write_json({"rank": rank, "secret": secret}))
    return link


def write_json(value: Any) -> bytes:
    """For a frame's payload."""
    return json.dumps(value).encode()


def read_json(data: bytes) -> dict[str, Any]:
    """What a payload says; an empty dict for anything but a JSON object."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
