"""CUDA graphs for short prompts, whose time to the first token would otherwise be Python's.

A large GPU is done with a prompt of a hundred tokens before Python has launched all its kernels
one by one. So steps of few tokens are recorded too, one graph for each of
some token counts; a step takes the smallest that holds its tokens, laid out as always:

    tokens      [ a a a a a | b b b | . . . . . . . . ]     16 places: two prompts and padding
    slots       [ 0 1 2 3 4 | 64 ..  | -1 ...         ]     padding is written nowhere
    boundaries  [ 0 5 8 8 8 8 8 8 8 ]                       up to 8 sequences, those unused empty

Longer prompts keep the GPU busy for longer than their launches take, and gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minivllm.attention.paged import PagedBatch
from minivllm.engine.batches import HostBatch, to_device
from minivllm.engine.cuda_graphs import GraphLadder, Recorder

TOKENS = (16, 32, 64, 128, 256, 512)
SEQUENCES = 8

# (batch, places of the last tokens int64 [SEQUENCES], logits [SEQUENCES, V]) -> fills the logits
PromptWork = Callable[[PagedBatch, torch.Tensor, torch.Tensor], None]


class PromptGraphs:
    """Steps of up to 512 tokens of up to 8 sequences, on memory that stays.

    max_blocks: width of the block tables. logits: [8, V], filled by ``work``.
    """

    def __init__(
        self,
        work: PromptWork,
        recorder: Recorder,
        *,
        max_blocks: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_blocks = max_blocks
        self.device = device
        most = TOKENS[-1]
        # Two buffers, since a copy of any size takes as long as the next one.
        self._wide = torch.zeros(3 * most + SEQUENCES, dtype=torch.int64, device=device)
        self._narrow = torch.zeros(
            1 + SEQUENCES * (2 + max_blocks), dtype=torch.int32, device=device
        )
        self.input_ids, self.positions, self.slots, self.last = self._wide.split(
            [most, most, most, SEQUENCES]
        )
        self.slots.fill_(-1)
        self.boundaries, self.context, tables = self._narrow.split(
            [1 + SEQUENCES, SEQUENCES, SEQUENCES * max_blocks]
        )
        self.tables = tables.view(SEQUENCES, max_blocks)
        self.logits = torch.zeros(SEQUENCES, vocab_size, dtype=dtype, device=device)
        self._work = work
        self.ladder = GraphLadder(list(TOKENS), self._run, recorder)

    @staticmethod
    def fits(batch: HostBatch) -> bool:
        """Whether a recorded step can hold this batch."""
        return len(batch.input_ids) <= TOKENS[-1] and len(batch.query_lens) <= SEQUENCES

    def replay(self, batch: HostBatch, last: list[int]) -> torch.Tensor:
        """Run the batch; returns logits [n, V] of the tokens ``last``, which the next run changes.

        batch: one that :meth:`fits`. last: places of the tokens after which a sequence samples.
        """
        count, most, none = len(batch.input_ids), TOKENS[-1], SEQUENCES - len(batch.query_lens)
        padding = [0] * (most - count)
        wide = [
            *batch.input_ids,
            *padding,
            *batch.positions,
            *padding,
            *batch.slots,
            *([-1] * (most - count)),
            *last,
            *([0] * (SEQUENCES - len(last))),
        ]
        boundaries = [0]
        for query_len in batch.query_lens:
            boundaries.append(boundaries[-1] + query_len)
        narrow = [
            *boundaries,
            *([count] * none),
            *batch.context_lens,
            *([0] * none),
        ]
        for table in batch.tables:
            narrow += table
            narrow += [0] * (self.max_blocks - len(table))
        self._wide.copy_(to_device(wide, torch.int64, self.device))
        self._narrow[: len(narrow)].copy_(to_device(narrow, torch.int32, self.device))
        self.ladder.replay(count)
        return self.logits[: len(last)]

    def _run(self, size: int) -> None:
        batch = PagedBatch(
            input_ids=self.input_ids[:size],
            positions=self.positions[:size],
            slot_mapping=self.slots[:size],
            cu_query_lens=self.boundaries,
            context=self.context,
            block_tables=self.tables,
            # Only the longest matters where kernels run; it is what a grid is sized by.
            query_lens=(size,) * SEQUENCES,
            context_lens=(size,) * SEQUENCES,
        )
        self._work(batch, self.last, self.logits)
