"""Sums of few tokens over the ranks of one host: one launch each, and one trip over the wire.

An all-reduce of NCCL's takes longer than a kernel of a decode step does, however few bytes there
are. These take about as long as one, and do what stands behind the sum as well: a layer has two
all-reduces, and each is followed by an addition to the residual stream and a norm. How they work is
told in ``one_shot_kernels.py``.

    o_proj    | all-reduce | add + RMSNorm |   gate and up ...        three launches
    o_proj    |  sum, add and norm  |          gate and up ...        two

For the chain of few rows (``engine/skinny_forward.py``) the same launch first adds up the parts of
a product, and leaves the norm's division to the product behind it.

What is sent grows with the number of ranks here (each sends all it has to all others), so sums of
many tokens are left to NCCL, whose rings share the work out.
"""

from __future__ import annotations

from typing import Any

import torch

from minivllm.distributed.exchange import Exchange
from minivllm.distributed.group import Group, TorchGroup
from minivllm.distributed.parallel_layers import VocabularyParallelEmbedding
from minivllm.distributed.shared_memory import SharedMemory, share_memory
from minivllm.layers.layernorm import RMSNorm

# Up to how many bytes of x a sum is faster than NCCL's and the norm behind it, by ranks: measured
# with ``benchmarks/exchange.py`` on 2 and 4 H200s; for 8, half of what 4 can have.
MOST_BYTES = {2: 1 << 21, 4: 1 << 19, 8: 1 << 18}
# Numbers of a row that a program of ``sum_parts_kernel`` takes at most, and its warps: with one row
# all is latency, and with more their programs should not be too many.
PARTS_A_PROGRAM = {"one row": (128, 1), "parts": (512, 2)}
# Rows that a program of ``best`` takes.
ROW_BLOCK = 32


class Channel:
    """One kind of sum: its part of every rank's memory, and where its programs count their calls.

    slot: words that one rank can send at a time, of ``word_bytes`` each. offset: where its part of
    the memory begins. programs: how many at most.
    """

    def __init__(self, programs: int, slot: int, word_bytes: int, offset: int, size: int) -> None:
        self.programs = programs
        # Slots begin where a vector of 16 bytes may begin.
        self.slot = -(-slot // 16) * 16
        self.offset = offset
        self.num_bytes = 2 * size * self.slot * word_bytes

    def bind(self, addresses: list[int], device: torch.device) -> None:
        """Take its place in the ranks' memory, which begins at ``addresses``."""
        boxes = [address + self.offset for address in addresses]
        self.boxes = torch.tensor(boxes, dtype=torch.int64, device=device)
        self.epochs = torch.zeros(self.programs, dtype=torch.int32, device=device)


class OneShot(Exchange):
    """:class:`Exchange` for ranks that share memory; what is too large goes the other way.

    Args:
        group: the ranks.
        stop: int32 [1] of the host's memory; kernels stop waiting once it is not zero.
        width: E. dtype: of activations.
        most_rows: the most tokens T of a sum. most_parts: the most rows P of
            :meth:`add_gain_of_parts`. most_sampled: the most rows of :meth:`best`.
        device: this rank's.
        row_warps: of a program that sums a whole row; by width when 0.
    """

    name = "one-shot"

    def __init__(
        self,
        group: Group,
        *,
        stop: torch.Tensor,
        width: int,
        dtype: torch.dtype,
        most_rows: int,
        most_parts: int,
        most_sampled: int,
        device: torch.device,
        pdl: bool = False,
        row_warps: int = 0,
    ) -> None:
        super().__init__(group, pdl=pdl)
        from minivllm.distributed import one_shot_kernels

        self._one_shot = one_shot_kernels
        self.width, self.dtype, self.device = width, dtype, device
        self.most_rows, self.most_parts, self.most_sampled = most_rows, most_parts, most_sampled
        self._row_block = 1 << (width - 1).bit_length()
        self._row_warps = row_warps or min(max(self._row_block // 256, 1), 16)
        self._stop = stop
        self._memory: SharedMemory | None = None
        # A program's numbers lie in one row.
        self._part_blocks = {
            name: min(block, width & -width) for name, (block, _) in PARTS_A_PROGRAM.items()
        }
        self._channels: dict[str, Channel] = {}
        offset = 0
        for name, programs, slot, word_bytes in (
            ("rows", most_rows, most_rows * width, 2 * dtype.itemsize),
            *(
                (name, rows * width // self._part_blocks[name], rows * width, 2 * dtype.itemsize)
                for name, rows in (("one row", 1), ("parts", most_parts))
            ),
            ("best", -(-most_sampled // ROW_BLOCK), 2 * most_sampled, 8),
        ):
            channel = Channel(programs, slot, word_bytes, offset, group.size)
            self._channels[name] = channel
            offset += channel.num_bytes
        self.num_bytes = offset

    @classmethod
    def connect(cls, group: TorchGroup, **settings: Any) -> OneShot | None:
        """Make one, with memory that all ranks share; None on every rank if there is no such.

        Every rank must call it at the same time, with the same settings.
        """
        one_shot = cls(group, stop=group.stop, device=group.device, **settings)
        memory = share_memory(group, one_shot.num_bytes)
        if memory is None:
            return None
        one_shot.bind(memory.addresses)
        one_shot._memory = memory
        return one_shot

    def bind(self, addresses: list[int]) -> None:
        """Use memory of :attr:`num_bytes` zeros at each rank's address."""
        for channel in self._channels.values():
            channel.bind(addresses, self.device)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Exchange`; the sum is rounded once, after the residual has been added."""
        if len(x) > self.most_rows:
            return super().add_norm(x, residual, norm)
        return self._sum_rows(x, residual=residual, norm=norm)

    def add_norm_of_parts(
        self,
        parts: torch.Tensor,
        residual: torch.Tensor,
        norm: RMSNorm,
        total: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """See :class:`Exchange`; what a rank adds is rounded once, to the dtype of ``out``."""
        if len(out) > self.most_rows:
            super().add_norm_of_parts(parts, residual, norm, total, out)
        else:
            self._sum_rows(parts, residual=residual, norm=norm, total=total, out=out)

    def embed(
        self, embedding: VocabularyParallelEmbedding, ids: torch.Tensor, norm: RMSNorm | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Exchange`."""
        if len(ids) > self.most_rows:
            return super().embed(embedding, ids, norm)
        return self._sum_rows(embedding.weight, ids=ids, owned=embedding.owned, norm=norm)

    def sum_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, E] of every rank, T up to ``most_rows`` -> their sum in new memory."""
        return self._sum_rows(x)[1]

    def add_gain_of_parts(
        self,
        parts: torch.Tensor,
        residual: torch.Tensor,
        gain: torch.Tensor,
        total: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """See :class:`Exchange`; what a rank adds is rounded once, to the dtype of ``out``."""
        rows = len(out)
        # Their programs take different numbers, so they must not use each other's places.
        name = "one row" if rows == 1 else "parts"
        block, warps = self._part_blocks[name], PARTS_A_PROGRAM[name][1]
        if rows > self.most_parts:
            return super().add_gain_of_parts(parts, residual, gain, total, out)
        blocks = self.width // block
        squares = torch.empty(blocks, rows, dtype=torch.float32, device=self.device)
        channel = self._channels[name]
        self._one_shot.sum_parts_kernel[(rows * blocks,)](
            parts,
            residual,
            gain,
            total,
            out,
            squares,
            *self._ends(channel),
            rows,
            channel.slot,
            self.group.rank,
            E=self.width,
            PARTS=len(parts),
            BLOCK=block,
            **self._ranks(),
            WORD=self._one_shot.word_of(self.dtype),
            DEPENDENT=self.pdl,
            num_warps=warps,
            **self._launch(),
        )
        return squares

    def best(self, score: torch.Tensor, token: torch.Tensor, out: torch.Tensor) -> None:
        """The token of the best score of all ranks, of equal ones the lowest, into out int64 [n].

        score: float32 [n]; token: int64 [n], n up to ``most_sampled``.
        """
        channel = self._channels["best"]
        rows = len(score)
        assert rows <= self.most_sampled
        self._one_shot.best_kernel[(-(-rows // ROW_BLOCK),)](
            score,
            token,
            out,
            *self._ends(channel),
            rows,
            channel.slot,
            self.group.rank,
            BLOCK=ROW_BLOCK,
            **self._ranks(),
            num_warps=1,
        )

    def close(self) -> None:
        """See :class:`Exchange`."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def _sum_rows(
        self,
        x: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        owned: range = range(0),
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
        total: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """norm(total) and total = residual + sum of x; what is left out takes no part in it.

        x: [T, E]; or float32 [parts, T, E], to be summed first.
        """
        rows = x.shape[-2] if ids is None else len(ids)
        if total is None:
            total = torch.empty(rows, self.width, dtype=self.dtype, device=self.device)
        if out is None:
            out = total if norm is None else torch.empty_like(total)
        if rows == 0:
            return out, total
        summed = x.dim() == 3
        assert x.shape[-1] == self.width and x.stride(-1) == 1
        assert x.dtype == (torch.float32 if summed else self.dtype) and out.dtype == self.dtype
        channel = self._channels["rows"]
        self._one_shot.sum_rows_kernel[(rows,)](
            x,
            ids,
            residual,
            None if norm is None else norm.weight,
            out,
            total,
            *self._ends(channel),
            x.stride(0) if summed else 0,
            x.stride(-2),
            0 if residual is None else residual.stride(0),
            owned.start,
            len(owned),
            0.0 if norm is None else norm.eps,
            channel.slot,
            self.group.rank,
            E=self.width,
            PARTS=len(x) if summed else 1,
            BLOCK=self._row_block,
            **self._ranks(),
            WORD=self._one_shot.word_of(self.dtype),
            EMBED=ids is not None,
            ADD=residual is not None,
            NORM=norm is not None,
            DEPENDENT=self.pdl,
            num_warps=self._row_warps,
            # As in the kernels for one rank: PyTorch rounds every product.
            enable_fp_fusion=False,
            **self._launch(),
        )
        return out, total

    def _ends(self, channel: Channel) -> tuple[torch.Tensor, ...]:
        return channel.boxes, channel.epochs, self._stop

    def _ranks(self) -> dict[str, int]:
        return {"SIZE": self.group.size, "RANKS": 1 << (self.group.size - 1).bit_length()}

    def _launch(self) -> dict[str, bool]:
        return {"launch_pdl": True} if self.pdl else {}


def most_rows(size: int, width: int, dtype: torch.dtype) -> int:
    """Up to how many tokens a sum of ``width`` numbers a token is faster in one shot."""
    limit = next((value for ranks, value in MOST_BYTES.items() if size <= ranks), 0)
    return limit // (width * dtype.itemsize)
