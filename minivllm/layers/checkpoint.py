"""How a layer tells the loader which checkpoint tensors fill its parameters.

A layer does not read files. It yields one :class:`CheckpointSource` for every checkpoint tensor it
needs; the loader (chapter 2) reads exactly that slice of the file into exactly that view. A fused
layer yields several sources for one parameter; a sharded layer (chapter 9) yields narrower slices.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch


class CheckpointSource(NamedTuple):
    """One copy that the loader has to make.

    name: the tensor's name in the checkpoint, such as ``model.layers.0.self_attn.q_proj.weight``.
    shape: the shape that the whole tensor must have there.
    target: the view of a parameter that receives it.
    index: which part of the checkpoint tensor goes there; ``()`` is all of it.
    """

    name: str
    shape: tuple[int, ...]
    target: torch.Tensor
    index: tuple[slice, ...] = ()


@runtime_checkable
class LoadsItself(Protocol):
    """What the loader asks of a layer with parameters."""

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        """Yield every source of this layer; ``prefix`` is its dotted path in the model."""
        ...


def new_parameter(
    *shape: int, dtype: torch.dtype, device: torch.device | str
) -> torch.nn.Parameter:
    """An uninitialised inference parameter (no gradient) of the given shape."""
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)
