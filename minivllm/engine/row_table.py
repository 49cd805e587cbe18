"""Which sequence owns which row on the device, and what the host has told it: plain Python."""

from __future__ import annotations

from dataclasses import dataclass

from minivllm.engine.device_rows import RowUpdates
from minivllm.engine.sequence import Sequence, Status


@dataclass
class Row:
    """A row in use. num_blocks: how many entries of the block table the device has.

    num_preemptions: the sequence's when it moved in; if it was preempted since, the row is stale.
    """

    index: int
    num_blocks: int
    num_preemptions: int


class RowTable:
    """The rows of up to ``max_num_seqs`` sequences."""

    def __init__(self, max_num_seqs: int) -> None:
        self._free = list(reversed(range(max_num_seqs)))
        self._rows: dict[Sequence, Row] = {}

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def places(self, sequences: list[Sequence]) -> list[int]:
        """The rows of these sequences, all of which must have one."""
        return [self._rows[seq].index for seq in sequences]

    def drop_stale(self) -> None:
        """Free the rows of sequences that have finished or lost their blocks."""
        stale = [
            seq
            for seq, row in self._rows.items()
            if seq.status is not Status.RUNNING or seq.num_preemptions != row.num_preemptions
        ]
        for seq in stale:
            self._free.append(self._rows.pop(seq).index)

    def enter(self, seq: Sequence, updates: RowUpdates) -> int:
        """The row of ``seq``, which a step that samples for it fills; returns its index.

        Called before that step is recorded in ``seq``: its newest token is yet to get a place.
        """
        row = self._rows.get(seq)
        if row is None:
            row = Row(self._free.pop(), 0, seq.num_preemptions)
            self._rows[seq] = row
        updates.set_row(
            row.index,
            last_token=0,
            length=len(seq) + 1,
            num_outputs=seq.num_output_tokens + 1,
            seed=seq.seed,
            temperature=0.0 if seq.params.greedy else seq.params.temperature,
            blocks=(),
        )
        self.follow([seq], updates)
        return row.index

    def follow(self, sequences: list[Sequence], updates: RowUpdates) -> None:
        """Tell the device of the blocks that these sequences have got, or exchanged."""
        for seq in sequences:
            row = self._rows[seq]
            if seq.exchanged:
                for index in seq.exchanged:
                    updates.set_blocks(row.index, index, [seq.block_table[index]])
                seq.exchanged.clear()
            count = len(seq.block_table)
            if count != row.num_blocks:
                new = seq.block_table[row.num_blocks :]
                updates.set_blocks(row.index, row.num_blocks, new)
                row.num_blocks = count
