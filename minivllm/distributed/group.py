"""What the ranks of one engine say to each other while they compute.

A group belongs to one engine: it is an object that is passed on, not PyTorch's process-wide default
group, so two engines never meet. Over GPUs it speaks NCCL, over CPUs gloo.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

# Only what nobody noticed otherwise ends here: dead and silent ranks are noticed in seconds.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
MEETING_TIMEOUT = timedelta(minutes=1)


class CollectiveError(RuntimeError):
    """A collective broke off, most often because another rank did; that one knows the cause."""


class Group(Protocol):
    """P = ``size`` ranks, of which this is ``rank``. Every rank makes the same calls in order."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``x``, which must have the same shape, in the memory of x."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` [...], which must have the same shape: [P, ...]."""
        ...

    def least(self, value: int) -> int:
        """The smallest of the ranks' values; waits for all of them."""
        ...


class TorchGroup:
    """A :class:`Group` on a process group of PyTorch's that is registered nowhere.

    store: where the ranks find each other. local: all of them are on this host.

    stop: int32 [1] in the host's memory, zero until the group has ended. Kernels that wait for
    other ranks look at it.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, device: torch.device, *, local: bool
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.local = local
        self.store = store
        self.stop = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        store = dist.PrefixStore("collectives", store)
        self._sum = dist.AllreduceOptions()
        self._gather = AllgatherOptions()
        for options in (self._sum, self._gather):
            # A collective that is not asynchronous needs no stream of its own.
            options.asyncOp = False
        self.backend: Any
        if device.type == "cuda":
            settings = dist.ProcessGroupNCCL.Options()
            settings._timeout = COLLECTIVE_TIMEOUT
            self.backend = dist.ProcessGroupNCCL(store, rank, size, settings)
        else:
            settings = dist.ProcessGroupGloo._Options()
            settings._timeout = MEETING_TIMEOUT
            # On one host nobody else needs to reach it, whatever the host's name resolves to.
            create, named = dist.ProcessGroupGloo.create_device, {"hostname": "127.0.0.1"}
            settings._devices = [
                create(**named) if local else dist.ProcessGroupGloo.create_default_device()
            ]
            try:
                self.backend = dist.ProcessGroupGloo(store, rank, size, settings)
            except RuntimeError as error:
                raise CollectiveError(f"the ranks did not meet: {error}") from error
            self.backend._set_default_timeout(COLLECTIVE_TIMEOUT)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Group`."""
        try:
            _wait(self.backend.allreduce([x], self._sum))
        except (RuntimeError, AttributeError) as error:
            raise CollectiveError(f"all_reduce: {error}") from error
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Group`."""
        out = x.new_empty(self.size * x.numel())
        try:
            _wait(self.backend._allgather_base(out, x.contiguous().view(-1), self._gather))
        except (RuntimeError, AttributeError) as error:
            raise CollectiveError(f"all_gather: {error}") from error
        return out.view(self.size, *x.shape)

    def least(self, value: int) -> int:
        """See :class:`Group`."""
        mine = torch.tensor([value], dtype=torch.int64, device=self.device)
        return int(self.all_gather(mine).min())

    def abort(self) -> None:
        """End it, also in the middle of a collective, whose kernels then return. Idempotent.

        Graphs that hold collectives must be gone, or be of no more use to anybody.
        """
        self.stop.fill_(1)
        backend, self.backend = self.backend, None
        if backend is not None:
            backend.abort()


def _wait(work: Any) -> None:
    # NCCL's collectives that are not asynchronous have nothing to wait for: they are in the stream.
    if work is not None:
        work.wait()
