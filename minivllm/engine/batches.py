"""From what the scheduler chose to the tensors that a step reads, and back to what it found."""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from minivllm.attention.paged import PagedBatch
from minivllm.engine.scheduler import ScheduledSequence
from minivllm.engine.sequence import Sequence
from minivllm.layers.sampler import SamplingTensors, top_logprobs


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place: the chosen token first, then the likeliest ones.

    rank: the chosen token's, 1 is the likeliest.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class HostBatch(NamedTuple):
    """A :class:`PagedBatch` as plain numbers, before it goes to a device."""

    input_ids: list[int]
    positions: list[int]
    slots: list[int]
    query_lens: list[int]
    context_lens: list[int]
    tables: list[list[int]]

    def to(self, device: torch.device) -> PagedBatch:
        """The same as tensors on ``device``."""
        longest = max(map(len, self.tables))
        tables = [table + [-1] * (longest - len(table)) for table in self.tables]
        return PagedBatch(
            input_ids=to_device(self.input_ids, torch.int64, device),
            positions=to_device(self.positions, torch.int64, device),
            slot_mapping=to_device(self.slots, torch.int64, device),
            cu_query_lens=to_device([0, *accumulate(self.query_lens)], torch.int32, device),
            context=to_device(self.context_lens, torch.int32, device),
            block_tables=to_device(tables, torch.int32, device),
            query_lens=tuple(self.query_lens),
            context_lens=tuple(self.context_lens),
        )


def lay_out(scheduled: list[ScheduledSequence], block_size: int) -> HostBatch:
    """Lay the scheduled tokens of all sequences end to end."""
    batch = HostBatch([], [], [], [], [], [])
    for seq, num_tokens, _, _ in scheduled:
        start = seq.num_computed
        end = start + num_tokens
        table = seq.block_table
        batch.input_ids.extend(seq.token_ids[start:end])
        batch.positions.extend(range(start, end))
        for index in range(start // block_size, -(-end // block_size)):
            first = index * block_size
            shift = table[index] * block_size - first
            here = range(max(start, first) + shift, min(end, first + block_size) + shift)
            batch.slots.extend(here)
        batch.query_lens.append(num_tokens)
        batch.context_lens.append(end)
        batch.tables.append(table)
    return batch


def make_batch(
    scheduled: list[ScheduledSequence], block_size: int, device: torch.device
) -> PagedBatch:
    """:func:`lay_out`, on ``device``."""
    return lay_out(scheduled, block_size).to(device)


def to_device(
    values: list[int] | list[float] | list[list[int]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of ``values`` on ``device``, without waiting for what the device is doing.

    A copy to a GPU can only be left to itself if it comes from memory that the operating system
    does not move (pinned memory); from any other, PyTorch waits until all earlier work is done.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class HostSampling(NamedTuple):
    """:class:`SamplingTensors` as plain numbers, before they go to a device."""

    temperature: list[float]
    seed: list[int]
    step: list[int]
    top_k: list[int] | None
    top_p: list[float] | None
    min_p: list[float] | None

    def to(self, device: torch.device) -> SamplingTensors:
        """The same as tensors on ``device``."""

        def float32(values: list[float] | None) -> torch.Tensor | None:
            return None if values is None else to_device(values, torch.float32, device)

        def int64(values: list[int] | None) -> torch.Tensor | None:
            return None if values is None else to_device(values, torch.int64, device)

        return SamplingTensors(
            temperature=float32(self.temperature),
            seed=int64(self.seed),
            step=int64(self.step),
            top_k=int64(self.top_k),
            top_p=float32(self.top_p),
            min_p=float32(self.min_p),
        )


def sampling_of(sequences: list[Sequence], vocab_size: int) -> HostSampling | None:
    """One entry for each sequence; what none asks for is None, and all of it if all are greedy."""
    params = [seq.params for seq in sequences]
    if all(p.greedy for p in params):
        return None
    top_k = top_p = min_p = None
    if any(0 < p.top_k < vocab_size for p in params):
        # Larger is allowed, and might not fit into 64 bits.
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    if any(p.top_p < 1 for p in params):
        top_p = [p.top_p if p.top_p < 1 else float("inf") for p in params]
    if any(p.min_p > 0 for p in params):
        min_p = [p.min_p for p in params]
    return HostSampling(
        temperature=[0.0 if p.greedy else p.temperature for p in params],
        seed=[seq.seed for seq in sequences],
        step=[seq.num_output_tokens for seq in sequences],
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )


def make_sampling_tensors(
    sequences: list[Sequence], vocab_size: int, device: torch.device
) -> SamplingTensors:
    """:func:`sampling_of`, on ``device``."""
    sampling = sampling_of(sequences, vocab_size)
    return SamplingTensors() if sampling is None else sampling.to(device)


def find_logprobs(
    sequences: list[Sequence], logits: torch.Tensor, tokens: torch.Tensor
) -> list[TokenLogprobs | None]:
    """The log-probabilities that each sequence asks for; logits [B, V], tokens [B]."""
    wanted = [seq.params.logprobs for seq in sequences if seq.params.logprobs is not None]
    if not wanted:
        return [None] * len(sequences)
    ids, values, ranks = top_logprobs(logits, tokens, max(wanted))
    return cut_logprobs(sequences, ids, values, ranks)


def cut_logprobs(
    sequences: list[Sequence], ids: torch.Tensor, values: torch.Tensor, ranks: torch.Tensor
) -> list[TokenLogprobs | None]:
    """From what :func:`top_logprobs` found, as many for each sequence as it asks for."""
    rows = zip(sequences, ids.tolist(), values.tolist(), ranks.tolist(), strict=True)
    return [
        None
        if (count := seq.params.logprobs) is None
        else TokenLogprobs(row_ids[: 1 + count], row_values[: 1 + count], rank)
        for seq, row_ids, row_values, rank in rows
    ]
