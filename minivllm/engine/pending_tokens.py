"""Tokens that a step chooses on the device, on their way to the host."""

from __future__ import annotations

import torch

from minivllm.engine.batches import TokenLogprobs, cut_logprobs
from minivllm.engine.model_runner import StepResult
from minivllm.engine.sequence import Sequence


class PendingTokens:
    """Tokens on their way from the device.

    tokens: int64, on the device; or with ``places`` memory of the host, where the device is going
    to write them, and which of its numbers they will be.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        tokens: torch.Tensor,
        logprobs: tuple[torch.Tensor, ...],
        *,
        device: torch.device,
        places: list[int] | None = None,
    ) -> None:
        self._sequences = sequences
        self._places = places
        self._tokens = _to_host(tokens) if places is None else tokens.view(-1)
        self._logprobs = tuple(map(_to_host, logprobs))
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> StepResult:
        """Wait for the step, and read its tokens."""
        if self._event is not None:
            self._event.synchronize()
        logprobs: list[TokenLogprobs | None] = [None] * len(self._sequences)
        if self._logprobs:
            logprobs = cut_logprobs(self._sequences, *self._logprobs)
        tokens = self._tokens.tolist()
        if self._places is not None:
            tokens = [tokens[place] for place in self._places]
        return StepResult(tokens, logprobs)


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which is complete once the device has come so far."""
    if not x.is_cuda:
        return x.clone()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
