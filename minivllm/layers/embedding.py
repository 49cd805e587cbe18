"""Token embedding and the head that turns hidden states into logits."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from minivllm.layers.checkpoint import CheckpointSource, new_parameter


class Embedding(nn.Module):
    """A table of one vector for each token of the vocabulary: [T] -> [T, E]."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.weight = new_parameter(vocab_size, hidden_size, dtype=dtype, device=device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [T] integers below V -> [T, E]."""
        return F.embedding(input_ids, self.weight)

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        yield CheckpointSource(f"{prefix}.weight", tuple(self.weight.shape), self.weight)


class LMHead(nn.Module):
    """Scores every token of the vocabulary: [T, E] -> logits [T, V].

    tied_to: the embedding whose table also serves as the head's weight (Press and Wolf 2017); then
    the checkpoint holds no tensor for the head. ``None`` gives the head a weight of its own.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tied_to: Embedding | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.tied = tied_to is not None
        self.weight = (
            tied_to.weight
            if tied_to is not None
            else new_parameter(vocab_size, hidden_size, dtype=dtype, device=device)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        if not self.tied:
            yield CheckpointSource(f"{prefix}.weight", tuple(self.weight.shape), self.weight)
