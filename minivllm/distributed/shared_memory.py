"""Memory on every GPU of a host that all ranks can write to.

    rank 0, GPU 0    [ own box ]  address of rank 1's box ----\\
    rank 1, GPU 1    [ own box ] <----------------------------/   stores travel over NVLink

Each rank takes memory on its own GPU and gets a handle for it from the driver. The ranks exchange
the handles, and each maps all of them into its own address space (PyTorch's symmetric memory does
that). From then on an address of another GPU's memory is one like any other.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minivllm.distributed.group import MEETING_TIMEOUT, TorchGroup

logger = logging.getLogger(__name__)

# So many ranks at most: all of them write to all others.
MOST_RANKS = 8
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class SharedMemory:
    """``num_bytes`` of zeros on every rank's GPU. Every rank must make its own at the same time.

    addresses: where each rank's memory begins, as this rank's kernels see it.
    """

    def __init__(self, group: TorchGroup, num_bytes: int) -> None:
        from torch._C import _distributed_c10d as c10d

        store = dist.PrefixStore("shared memory", group.store)
        if group.rank == 0:
            store.set("name", uuid.uuid4().hex)
        self.name = store.get("name").decode()
        # The ranks find each other by the name of a group. This one has no collectives, only a
        # store, and is known to nobody else. (C++ calls the store, but does not keep it.)
        self._store = NumberedFromZero(store)
        self._ranks = dist.ProcessGroup(self._store, group.rank, group.size)
        c10d._register_process_group(self.name, self._ranks)
        try:
            memory = c10d._SymmetricMemory.empty_strided_p2p(
                (num_bytes,), (1,), torch.uint8, group.device
            )
            memory.zero_()
            torch.cuda.synchronize(group.device)
            with _without_multicast():
                self._handle: Any = c10d._SymmetricMemory.rendezvous(memory, self.name)
        except BaseException:
            c10d._unregister_process_group(self.name)
            raise
        self._memory: torch.Tensor | None = memory
        self.addresses: list[int] = list(self._handle.buffer_ptrs)

    def close(self) -> None:
        """Give it back, once no kernel of any rank uses it. May be called twice."""
        if self._memory is None:
            return
        from torch._C import _distributed_c10d as c10d

        self._memory = self._handle = None
        c10d._unregister_process_group(self.name)


class NumberedFromZero(dist.Store):
    """A store whose keys "what/number/rank" begin with number 0, whatever the number first used.

    PyTorch numbers the exchanges of a process from its start, and a rank waits for the others under
    its own number. But rank 0 may have had engines before, of which the others know nothing.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._inner = store
        self._first: int | None = None

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._inner.set(self._renumbered(key), value)

    def get(self, key: str) -> bytes:
        return self._inner.get(self._renumbered(key))

    def wait(self, keys: list[str], timeout: timedelta = MEETING_TIMEOUT) -> None:  # type: ignore[override]
        self._inner.wait([self._renumbered(key) for key in keys], timeout)

    def _renumbered(self, key: str) -> str:
        parts = re.fullmatch(r"(.*)/(\d+)/(\d+)", key)
        if parts is None:
            return key
        what, number, rank = parts.groups()
        if self._first is None:
            self._first = int(number)
        return f"{what}/{int(number) - self._first}/{rank}"


def share_memory(group: TorchGroup, num_bytes: int) -> SharedMemory | None:
    """:class:`SharedMemory`; None, on every rank, if one of them cannot have it (and it is logged).

    Every rank must call it at the same time.
    """
    reason = _why_not(group)
    memory = None
    # Only together, for whoever asks for memory waits for the others.
    if group.least(int(reason is None)):
        try:
            memory = SharedMemory(group, num_bytes)
        except Exception as error:
            # These parts of PyTorch are not public, and nothing depends on them.
            reason = f"{type(error).__name__}: {error}"
        if group.least(int(memory is not None)):
            return memory
    if memory is not None:
        memory.close()
    logger.warning(
        "rank %d: sums over the ranks go through NCCL, for the GPUs share no memory: %s",
        group.rank,
        reason or "another rank says why",
    )
    return None


def _why_not(group: TorchGroup) -> str | None:
    if group.device.type != "cuda":
        return f"this rank runs on {group.device}"
    if not group.local:
        return "the ranks are on several hosts"
    if not 1 < group.size <= MOST_RANKS:
        return f"it is made for 2 to {MOST_RANKS} ranks, and there are {group.size}"
    own = group.device.index
    others = (device for device in range(torch.cuda.device_count()) if device != own)
    for other in others:
        if not torch.cuda.can_device_access_peer(own, other):
            return f"GPU {own} cannot access the memory of GPU {other}"
    return None


@contextmanager
def _without_multicast() -> Iterator[None]:
    """PyTorch would also set up multicast, a resource of the whole host that we do not use."""
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before
