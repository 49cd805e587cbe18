"""Runs of the real kernels in Triton's interpreter, recorded: for the figures and the tests.

TRITON_INTERPRET=1 must be set before anything imports triton.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from chapters.chapter05_paged_attention import toy

sys.path.append(str(Path(__file__).parents[2] / "notebooks"))

from recorder import Event, Recorder


def record_store() -> Recorder:
    """The real store kernel on the toy's tokens, with one token of padding at the end."""
    from minivllm.attention.paged_store_kernels import store_kv

    k_cache, v_cache = toy.pool()
    k, v, slots = toy.new_tokens()
    k, v = (torch.cat((tensor, torch.zeros(1, 2, 2))) for tensor in (k, v))
    slot_mapping = torch.cat((slots, torch.tensor([-1])))
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping}
    with Recorder(tensors, register_arguments=True) as rec:
        store_kv(k, v, k_cache, v_cache, slot_mapping)
    return rec


def record_decode() -> Recorder:
    """The real decode kernel on the toy: one program for each KV head of each sequence."""
    from minivllm.attention.paged_simple_kernels import paged_decode_whole

    k_cache, v_cache = toy.filled_pool()
    tensors = {
        "q": toy.Q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_tables": toy.block_tables(),
        "context_lens": torch.tensor(toy.LENGTHS, dtype=torch.int32),
    }
    with Recorder(tensors, register_arguments=True, watch=("row_max", "row_sum", "slots")) as rec:
        paged_decode_whole(*tensors.values(), scale=toy.SCALE, block_n=16)
    return rec


class Shares:
    """One recorded run of ``paged_decode``: 2 query heads on 1 KV head, tiles of 16 tokens.

    The work is cut into ``shares`` equal ones, a program each.

    rec, q, k_cache, v_cache, tables, context_lens, plan, out: the run; lengths: of the sequences.
    """

    scale = 0.25

    def __init__(self, lengths: Sequence[int], shares: int, block_size: int = 16) -> None:
        from minivllm.attention.paged_kernels import PagedDecodePlan, paged_decode

        generator = torch.Generator().manual_seed(2)
        self.lengths, self.block_size = list(lengths), block_size
        blocks = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(blocks), generator=generator).to(torch.int32)
        self.tables = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32)
        for row, mine in enumerate(order.split(blocks)):
            self.tables[row, : len(mine)] = mine
        self.context_lens = torch.tensor(lengths, dtype=torch.int32)
        shape = (sum(blocks), block_size, 1, 16)
        self.k_cache, self.v_cache = torch.randn(2, *shape, generator=generator)
        self.q = torch.randn(len(lengths), 2, 16, generator=generator)
        self.plan = PagedDecodePlan(
            *self.tables.shape,
            block_size,
            2,
            1,
            16,
            dtype=torch.float32,
            device="cpu",
            processors=shares,
            programs_each=1,
            tile=16,
            min_share=1,
        )
        self.plan.prepare(self.tables, self.context_lens)
        tensors = {"q": self.q, "k_cache": self.k_cache, "v_cache": self.v_cache}
        with Recorder(tensors, register_arguments=True) as self.rec:
            self.out = paged_decode(
                self.q,
                self.k_cache,
                self.v_cache,
                self.tables,
                self.context_lens,
                scale=self.scale,
                plan=self.plan,
            )

    def tiles(self) -> list[list[tuple[int, int, int]]]:
        """For each program that read keys: its tiles in order, (sequence, first token, tokens)."""
        return sorted(mine for mine in map(self._tiles_of, self._loads(self.rec)) if mine)

    def tiles_a_sequence_each(self) -> list[list[tuple[int, int, int]]]:
        """The same for the simple kernel, a program for each sequence, on the same input."""
        from minivllm.attention.paged_simple_kernels import paged_decode_whole

        with Recorder({"k_cache": self.k_cache}, register_arguments=True) as rec:
            paged_decode_whole(
                self.q,
                self.k_cache,
                self.v_cache,
                self.tables,
                self.context_lens,
                scale=self.scale,
                block_n=16,
            )
        return sorted(mine for mine in map(self._tiles_of, self._loads(rec)) if mine)

    def pieces(self, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the programs put aside for a sequence that a border cuts.

        Returns outs [P, H, D] and lses [P, H], natural logarithms; nothing for one that none cuts.
        """
        places = []
        for store in self.rec.select("partial_lse_ptr", "store"):
            loads = self.rec.select("k_cache", "load", program=store.program)
            last = [event for event in loads if event.order < store.order][-1:]
            if self._tiles_of(last)[0][0] == seq:
                places.append(int(store.index[0][0]))
        places.sort()
        return self.plan.partial_out[places], self.plan.partial_lse[places] * math.log(2)

    @staticmethod
    def _loads(rec: Recorder) -> list[list[Event]]:
        return list(rec.loads_by_program("k_cache").values())

    def _tiles_of(self, events: Sequence[Event]) -> list[tuple[int, int, int]]:
        where = {
            int(self.tables[seq, token // self.block_size]) * self.block_size
            + token % self.block_size: (seq, token)
            for seq, length in enumerate(self.lengths)
            for token in range(length)
        }
        found = []
        for event in events:
            slots = dict.fromkeys(
                int(block) * self.block_size + int(offset)
                for block, offset in zip(*event.index[:2], strict=True)
            )
            tokens = [where[slot] for slot in slots]
            if tokens:
                found.append((*tokens[0], len(tokens)))
        return found
