"""Choosing a token when no rank has all the logits.

Every rank finds the best of its own tokens, with the noise that those tokens have in any case, and
tells the others its (score, token): 8 bytes a sequence instead of V logits. All ranks then know the
best of all, and the next step can begin with no further word.

    rank 0    logits of tokens 0 to 79     ->  (3.1, 17)  \\            / (4.0, 93)
    rank 1    logits of tokens 80 to 159   ->  (4.0, 93)  / exchanged \\ (4.0, 93)

What must see a row as a whole (top_k, top_p, min_p, log-probabilities) gathers the logits on all
ranks, which then compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minivllm.distributed.group import Group
from minivllm.engine.step_forms import Draw
from minivllm.layers.sampler import Sampler, SamplingTensors, gumbel_noise

# (logits of the owned tokens [n, V / P], how to draw) -> score float32 [n], token int64 [n]
FindBest = Callable[[torch.Tensor, Draw], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Vocabulary:
    """Who owns which tokens: this rank those of ``owned``, all ranks together ``size`` tokens."""

    owned: range
    size: int
    group: Group

    def __post_init__(self) -> None:
        # Tokens travel as float32 beside their scores.
        assert self.size < 2**24

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: [n, V / P] of every rank -> [n, V], the same on all ranks."""
        parts = self.group.all_gather(logits)
        # Behind the last rank's tokens lie rows that nobody uses.
        return parts.transpose(0, 1).flatten(1)[:, : self.size]

    def sample(
        self, logits: torch.Tensor, draw: Draw, tokens: torch.Tensor, best: FindBest
    ) -> None:
        """logits: [n, V / P] of every rank -> into tokens int64 [n], the same on all ranks."""
        score, token = best(logits[:, : len(self.owned)], draw)
        pairs = self.group.all_gather(torch.stack((score, token.float()), dim=-1))
        score, token = pairs.unbind(dim=-1)
        # Of equal scores the lowest token wins, as it does on one rank.
        lowest = token.masked_fill(score != score.amax(dim=0), self.size - 1).amin(dim=0)
        tokens.copy_(lowest)

    def find_best(self, logits: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of the owned tokens in PyTorch, by the rules of :class:`Sampler`."""
        scores = logits.float()
        greedy = draw.temperature == 0
        if not bool(greedy.all()):
            first, end = self.owned.start, self.owned.stop
            noise = gumbel_noise(draw.seed, draw.step, self.size)[:, first:end]
            temperature = draw.temperature.masked_fill(greedy, 1.0)[:, None]
            scores = torch.where(greedy[:, None], scores, scores / temperature + noise)
        score, token = scores.max(dim=-1)
        return score, token + self.owned.start


class GatheringSampler(Sampler):
    """:class:`Sampler` on logits [n, V / P] that lie on all ranks."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, logits: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
        return super().forward(self.vocabulary.gather(logits), params)
