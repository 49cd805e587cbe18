"""Everything that a device must be told for one step, as plain numbers: one value, made once.

The host that schedules makes it; whoever owns a part of the model can run it. While sequences
decode it is small: the rows that take part are known, and only new blocks have to be told.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from minivllm.engine.batches import HostBatch, HostSampling


@dataclass(frozen=True)
class StepMessage:
    """One step.

    updates: (word, value) pairs for the rows, see ``device_rows``. places: the rows of the
    sequences that sample, in their order.
    batch: tokens that are not all taken from the rows; None for a step that decodes one token of
    each row in ``places``. last: which of the batch's tokens are followed by a new one. waiting:
    (token of the batch, row) where the host does not know the token yet but the row has it.
    sampling: how to sample, None if it is all greedy, or where the rows say all there is to say.
    num_logprobs: how many to report beside the chosen token's, None for none at all.
    """

    updates: list[tuple[int, int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    batch: HostBatch | None = None
    last: list[int] = field(default_factory=list)
    waiting: list[tuple[int, int]] = field(default_factory=list)
    sampling: HostSampling | None = None
    num_logprobs: int | None = None

    def encode(self) -> bytes:
        """As bytes that :meth:`decode` reads: JSON, which can hold nothing but data."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> StepMessage:
        """The message that was encoded."""
        parts = json.loads(data)
        for name, kind in (("batch", HostBatch), ("sampling", HostSampling)):
            if parts[name] is not None:
                parts[name] = kind(*parts[name])
        for name in ("updates", "waiting"):
            parts[name] = [tuple(pair) for pair in parts[name]]
        return cls(**parts)
