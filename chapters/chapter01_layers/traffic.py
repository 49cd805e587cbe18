"""Count what a PyTorch function asks of memory: it reads its inputs and writes its result.

In eager PyTorch every operation is a kernel of its own that does so. The count is of what is asked
for; whether a cache answers is the machine's business.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Operation:
    """One operation that PyTorch ran: its name, the bytes of its inputs and of its results."""

    name: str
    bytes_read: int
    bytes_written: int

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


def count_traffic(function: Callable[..., Any], *arguments: Any) -> list[Operation]:
    """The operations of one call of ``function`` that move data, in order.

    Views move none. Assignments to a slice (``x[0] = y``) are not seen.
    """
    counter = _Counter()
    with counter:
        function(*arguments)
    return counter.operations


class _Counter(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {id(tensor): tensor for tensor in _tensors((args, kwargs or {}))}
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
        result = func(*args, **(kwargs or {}))
        outputs = list(_tensors(result))
        fresh = any(tensor.untyped_storage().data_ptr() not in storages for tensor in outputs)
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.startswith("__") and bool(outputs)
        if (fresh and "empty" not in name) or in_place:
            read = sum(tensor.nbytes for tensor in inputs.values())
            written = sum(tensor.nbytes for tensor in outputs)
            self.operations.append(Operation(name.strip("_"), read, written))
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
