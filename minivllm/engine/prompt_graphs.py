"""CUDA graphs for steps with prompts, whose time to the first token would otherwise be Python's.

A large GPU is done with a few thousand tokens before Python has launched all its kernels one by
one. So such steps are recorded too, one graph for each of some token counts; a step takes the
smallest that holds its tokens, laid out as always:

    tokens      [ a a a a a | b b b | . . . . . . . . ]     16 places: two prompts and padding
    slots       [ 0 1 2 3 4 | 64 ..  | -1 ...         ]     padding is written nowhere
    boundaries  [ 0 5 8 8 8 8 8 ... 8 ]                     sequences that are not there are empty

A sequence that decodes beside prompts (``policy="mixed"``) is one with a single new token. Many of
them, with long contexts, are better off without a graph, where they have the decode kernel.

Longer steps keep the GPU busy for longer than their launches take, and gain nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import accumulate

import torch

from minivllm.attention.paged import PagedBatch
from minivllm.engine.batches import HostBatch
from minivllm.engine.cuda_graphs import GraphLadder, Recorder

# Each half as large again as the one before or less, so that padding is a third at most.
TOKENS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
SEQUENCES = 256
# A decode among prompts is computed as if it had 128 queries. Up to this product, the tokens of all
# such contexts times the query heads times their size, that should still take less time than
# launching a layer's kernels one by one. By arithmetic, not measured: 512 operations for each take
# 0.27 ms a layer at 500 TFLOP/s; launching takes about 0.5.
WORK_OF_DECODES = 1 << 28

# (batch, places of the last tokens int64 [B], logits [B, V]) -> fills the logits
PromptWork = Callable[[PagedBatch, torch.Tensor, torch.Tensor], None]


class PromptGraphs:
    """Steps of up to 4,096 tokens of up to 256 sequences, on memory that stays.

    max_tokens, max_seqs: the most that a step can have; less than the above asks for less memory.
    context_of_decodes: the most tokens in the contexts of all sequences that decode beside prompts.
    max_blocks: width of the block tables. logits: [sequences, V], filled by ``work``. A recorded
    step of n tokens has places for n sequences, since more it cannot have.
    """

    def __init__(
        self,
        work: PromptWork,
        recorder: Recorder,
        *,
        max_tokens: int,
        max_seqs: int,
        max_blocks: int,
        context_of_decodes: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sequences = min(max_seqs, SEQUENCES)
        self.context_of_decodes = context_of_decodes
        # The first that holds the largest step is the last that is needed.
        sizes = [
            size for size, less in zip(TOKENS, (0, *TOKENS), strict=False) if less < max_tokens
        ]
        self.device = device
        # Two buffers, since a copy of any size takes as long as the next one. Every size has its
        # own layout around one middle, so that one copy brings it and no more than it needs.
        self._middle = sizes[-1]
        self._wide = torch.zeros(
            3 * self._middle + self.sequences, dtype=torch.int64, device=device
        )
        self._wide[: self._middle] = -1
        self._narrow = torch.zeros(
            1 + self.sequences * (2 + max_blocks), dtype=torch.int32, device=device
        )
        self.boundaries, self.context, self._packed = self._narrow.split(
            [1 + self.sequences, self.sequences, self.sequences * max_blocks]
        )
        self.tables = torch.zeros(self.sequences, max_blocks, dtype=torch.int32, device=device)
        self.logits = torch.zeros(self.sequences, vocab_size, dtype=dtype, device=device)
        self._work = work
        self.ladder = GraphLadder(sizes, self.run, recorder)

    def fits(self, batch: HostBatch) -> bool:
        """Whether a recorded step can hold this batch, and is not the slower way."""
        lengths = zip(batch.query_lens, batch.context_lens, strict=True)
        of_decodes = sum(context for queries, context in lengths if queries == 1)
        return (
            len(batch.input_ids) <= self.ladder.sizes[-1]
            and len(batch.query_lens) <= self.sequences
            and of_decodes <= self.context_of_decodes
        )

    def load(self, batch: HostBatch, last: list[int]) -> torch.Tensor:
        """Bring a batch that :meth:`fits` to the device; returns its token ids there, int64 [T].

        last: places of the tokens after which a sequence samples.
        """
        count, none = len(batch.input_ids), self.sequences - len(batch.query_lens)
        size = self.ladder.size_for(count)
        padding = [0] * (size - count)
        wide = [
            *batch.slots,
            *([-1] * (size - count)),
            *batch.input_ids,
            *padding,
            *batch.positions,
            *padding,
            *last,
            *([0] * (min(size, self.sequences) - len(last))),
        ]
        width = max(map(len, batch.tables))
        narrow = [
            0,
            *accumulate(batch.query_lens),
            *([count] * none),
            *batch.context_lens,
            *([0] * none),
        ]
        for table in batch.tables:
            narrow += table
            narrow += [0] * (width - len(table))
        _copy(wide, self._wide[self._middle - size :])
        _copy(narrow, self._narrow)
        rows = len(batch.tables)
        self.tables[:rows, :width].copy_(self._packed[: rows * width].view(rows, width))
        return self._views(size)[1][:count]

    def replay(self, batch: HostBatch, last: list[int]) -> torch.Tensor:
        """Run what was loaded; returns logits [n, V] of the tokens ``last``.

        The next run changes them.
        """
        self.ladder.replay(len(batch.input_ids))
        return self.logits[: len(last)]

    def run(self, size: int) -> None:
        """A step of ``size`` tokens: what is recorded."""
        slots, input_ids, positions, last = self._views(size)
        batch = PagedBatch(
            input_ids=input_ids,
            positions=positions,
            slot_mapping=slots,
            cu_query_lens=self.boundaries[: 1 + len(last)],
            context=self.context[: len(last)],
            block_tables=self.tables[: len(last)],
            # Only the longest matters where kernels run; it is what a grid is sized by.
            query_lens=(size,) * len(last),
            context_lens=(size,) * len(last),
        )
        self._work(batch, last, self.logits[: len(last)])

    def _views(self, size: int) -> tuple[torch.Tensor, ...]:
        """Where a step of ``size`` tokens has its slots, token ids, positions and last places."""
        sizes = [size, size, size, min(size, self.sequences)]
        return self._wide[self._middle - size :][: sum(sizes)].split(sizes)


def _copy(values: list[int], to: torch.Tensor) -> None:
    """values to the first places of ``to``, int64 or int32, without waiting for the device."""
    # By way of an array: making a tensor of a list takes three times as long.
    numbers = array("q" if to.dtype == torch.int64 else "i", values)
    host = torch.frombuffer(numbers, dtype=to.dtype)
    if to.is_cuda:
        host = host.pin_memory()
    to[: len(values)].copy_(host, non_blocking=True)
