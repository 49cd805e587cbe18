"""A CUDA graph for machines without CUDA: PyTorch's operations on a tape, to be played again.

Like a graph, a tape holds operations and not the Python that called them. Tensors that were there
before the recording are held by their address; whatever the recording itself makes is made anew at
every replay. So an ``if`` is decided once and for all, and so is which memory is read.

A real graph is stricter still: what lies between its kernels has a fixed address, too, and hence a
fixed shape.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class Made(int):
    """Stands on the tape for the n-th tensor that the recording made."""


class Tape(TorchDispatchMode):
    """Records every operation while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Made | None]]] = []
        self._made: dict[int, Made] = {}
        # An id is only a name as long as its tensor lives.
        self._alive: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tree_map(self._name, (args, kwargs))
        known = {id(part) for part in tree_flatten((args, kwargs))[0]}
        result = func(*args, **kwargs)
        outputs: list[Made | None] = []
        for part in tree_flatten(result)[0]:
            fresh = isinstance(part, torch.Tensor) and id(part) not in known
            if fresh:
                self._made[id(part)] = Made(len(self._alive))
                self._alive.append(part)
            outputs.append(self._made[id(part)] if fresh else None)
        self.operations.append((func, *inputs, outputs))
        return result

    def _name(self, part: Any) -> Any:
        return self._made.get(id(part), part) if isinstance(part, torch.Tensor) else part

    def replay(self) -> None:
        """Run the operations again, on the same memory."""
        values: dict[Made, Any] = {}
        for func, args, kwargs, outputs in self.operations:
            args, kwargs = tree_map(
                lambda part: values[part] if isinstance(part, Made) else part, (args, kwargs)
            )
            results = tree_flatten(func(*args, **kwargs))[0]
            for name, value in zip(outputs, results, strict=True):
                if name is not None:
                    values[name] = value


class TapeRecorder:
    """What a ``GraphLadder`` takes for a recorder; ``tapes`` are in the order of recording."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        tape = Tape()
        with tape:
            work()
        self.tapes.append(tape)
        return tape.replay
