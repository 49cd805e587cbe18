"""The state of running sequences on the device, so that a decode step needs no data from the host.

A running sequence owns a row r of R = max_num_seqs. The rows lie in one flat int32 buffer, field
after field, and the host changes them by (word, value) pairs, sent in a single copy:

    seed (2R words) | last_token | length | num_outputs | temperature | block_tables (R x M)

A step looks at P places, each of which names its row in ``active`` (-1: padding). What the step
reads is gathered from the rows at its beginning, and what it found is put back at its end:

    rows --begin_step--> StepInputs --model, sampler--> tokens --finish_step--> rows
                                                                --post_tokens--> the host

Both at the end go by what ``begin_step`` gathered, not by the rows, so a step can be run again (a
replay for warm-up, say) and leaves the same state. The device writes to memory of the host itself:
nobody has to launch a copy, and the next step need not wait for one. Here are the PyTorch forms,
which a CPU runs; ``step_kernels`` has them as three launches, equal bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import torch


@dataclass(frozen=True)
class DeviceRows:
    """The rows of R sequences: ``flat`` int32 [words], typed views of its parts, and ``posted``.

    last_token: int32 [R], the newest token, whose K and V are not yet computed. length: int32 [R],
    how many tokens there are with it. num_outputs: int32 [R], how many of them were generated.
    seed: int64 [R]. temperature: float32 [R], 0 is greedy. block_tables: int32 [R, M].

    posted: int64 [2, R], in host memory that the device writes to (pinned). A row's token number n
    is in posted[n % 2]: what a step posts stays while the next one runs.
    """

    flat: torch.Tensor
    last_token: torch.Tensor
    length: torch.Tensor
    num_outputs: torch.Tensor
    seed: torch.Tensor
    temperature: torch.Tensor
    block_tables: torch.Tensor
    posted: torch.Tensor

    @classmethod
    def allocate(cls, max_num_seqs: int, max_blocks: int, device: torch.device | str) -> DeviceRows:
        """Zeroed rows for ``max_num_seqs`` sequences of up to ``max_blocks`` blocks."""
        if max_num_seqs < 1 or max_blocks < 1:
            raise ValueError(
                f"max_num_seqs={max_num_seqs} and max_blocks={max_blocks} must be at least 1"
            )
        rows = max_num_seqs
        flat = torch.zeros(rows * (6 + max_blocks), dtype=torch.int32, device=device)
        # The seeds come first, for 64-bit words must lie at even places.
        seed, last_token, length, num_outputs, temperature, tables = flat.split(
            [2 * rows, rows, rows, rows, rows, rows * max_blocks]
        )
        return cls(
            flat=flat,
            last_token=last_token,
            length=length,
            num_outputs=num_outputs,
            seed=seed.view(torch.int64),
            temperature=temperature.view(torch.float32),
            block_tables=tables.view(rows, max_blocks),
            posted=torch.zeros(2, rows, dtype=torch.int64, pin_memory=flat.is_cuda),
        )

    def places_of(self, rows: list[int], numbers: list[int]) -> list[int]:
        """Where in ``posted``, flattened, the host finds token ``numbers[i]`` of ``rows[i]``."""
        count = self.posted.shape[1]
        return [number % 2 * count + row for row, number in zip(rows, numbers, strict=True)]


@dataclass(frozen=True)
class StepInputs:
    """What a decode step reads, at fixed addresses; row i is place i of P.

    input_ids, positions, slot_mapping (-1 for padding), seed: int64 [P]. step: int64 [P], how many
    tokens the row has generated. context: int32 [P], 0 for padding. temperature: float32 [P].
    block_tables: int32 [P, M], of which the blocks in use are written.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context: torch.Tensor
    step: torch.Tensor
    seed: torch.Tensor
    temperature: torch.Tensor
    block_tables: torch.Tensor

    @classmethod
    def allocate(cls, places: int, max_blocks: int, device: torch.device | str) -> StepInputs:
        """Inputs of a step of nothing but padding."""

        def full(value: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full((places, *shape), value, dtype=dtype, device=device)

        return cls(
            input_ids=full(0, torch.int64),
            positions=full(0, torch.int64),
            slot_mapping=full(-1, torch.int64),
            context=full(0, torch.int32),
            step=full(0, torch.int64),
            seed=full(0, torch.int64),
            temperature=full(0, torch.float32),
            block_tables=full(-1, torch.int32, max_blocks),
        )

    def first(self, places: int) -> StepInputs:
        """The first ``places`` of them: views of the same memory."""
        return StepInputs(*(getattr(self, part.name)[:places] for part in fields(self)))


@dataclass
class RowUpdates:
    """The host's changes of one step: word of the flat buffer -> value. The last change wins."""

    max_num_seqs: int
    max_blocks: int
    words: dict[int, int] = field(default_factory=dict)

    def set_row(
        self,
        row: int,
        *,
        last_token: int,
        length: int,
        num_outputs: int,
        seed: int,
        temperature: float,
        blocks: Iterable[int],
    ) -> None:
        """A sequence moves into ``row``."""
        count, words = self.max_num_seqs, self.words
        # Read back as int32, bit for bit, in the byte order of this machine (and of every GPU).
        low, high, bits = struct.unpack(
            "=iii", struct.pack("=Qf", seed & 0xFFFF_FFFF_FFFF_FFFF, temperature)
        )
        words[2 * row] = low
        words[2 * row + 1] = high
        words[2 * count + row] = last_token
        words[3 * count + row] = length
        words[4 * count + row] = num_outputs
        words[5 * count + row] = bits
        self.set_blocks(row, 0, blocks)

    def set_blocks(self, row: int, first: int, blocks: Iterable[int]) -> None:
        """``blocks`` become the entries ``first``, ``first`` + 1, ... of the row's block table."""
        start = 6 * self.max_num_seqs + row * self.max_blocks + first
        self.words.update(enumerate(blocks, start))


def begin_step(rows: DeviceRows, active: torch.Tensor, out: StepInputs, block_size: int) -> None:
    """Gather into ``out`` what a decode step of the rows in ``active`` reads.

    active: int32 [P]; out: P places. The step computes K and V of each row's newest token.
    """
    real = active >= 0
    row = active.clamp(min=0).long()
    length = torch.where(real, rows.length[row], 0)
    position = (length.long() - 1).clamp(min=0)
    tables = rows.block_tables[row]
    block = tables.gather(1, (position // block_size)[:, None])[:, 0]
    out.input_ids.copy_(torch.where(real, rows.last_token[row], 0))
    out.positions.copy_(position)
    out.slot_mapping.copy_(torch.where(real, block.long() * block_size + position % block_size, -1))
    out.context.copy_(length)
    out.step.copy_(torch.where(real, rows.num_outputs[row], 0))
    out.seed.copy_(torch.where(real, rows.seed[row], 0))
    out.temperature.copy_(torch.where(real, rows.temperature[row], 0.0))
    used = (length + block_size - 1) // block_size
    in_use = torch.arange(tables.shape[1], device=tables.device) < used[:, None]
    out.block_tables.copy_(torch.where(in_use, tables, out.block_tables))


def finish_step(
    rows: DeviceRows, active: torch.Tensor, out: StepInputs, tokens: torch.Tensor
) -> None:
    """Put the step's ``tokens`` (int64 or int32 [P]) into the rows that ``active`` names."""
    real = active >= 0
    row = active[real].long()
    rows.last_token[row] = tokens[real].int()
    rows.length[row] = out.context[real] + 1
    rows.num_outputs[row] = out.step[real].int() + 1


def post_tokens(
    rows: DeviceRows, active: torch.Tensor, out: StepInputs, tokens: torch.Tensor
) -> None:
    """Put the step's ``tokens`` (int64 or int32 [P]) where the host reads them, ``rows.posted``."""
    real = active >= 0
    turn, row, tokens = (x[real].long().cpu() for x in (out.step % 2, active, tokens))
    rows.posted[turn, row] = tokens


def apply_updates(flat: torch.Tensor, updates: torch.Tensor) -> None:
    """Set ``flat[word] = value`` for each (word, value) of ``updates``, int32 [U, 2].

    A pair with a word below 0 is padding. No word may stand there twice.
    """
    updates = updates[updates[:, 0] >= 0]
    flat[updates[:, 0].long()] = updates[:, 1]
