"""From what the scheduler chose to the tensors that a step reads, and back to what it found."""

from dataclasses import dataclass
from itertools import accumulate

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


def make_batch(
    scheduled: list[ScheduledSequence], block_size: int, device: torch.device
) -> PagedBatch:
    """Lay the scheduled tokens of all sequences end to end."""
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_lens: list[int] = []
    context_lens: list[int] = []
    longest = max(len(item.seq.block_table) for item in scheduled)
    tables: list[list[int]] = []
    for seq, num_tokens, _, _ in scheduled:
        start = seq.num_computed
        end = start + num_tokens
        table = seq.block_table
        input_ids += seq.token_ids[start:end]
        positions += range(start, end)
        for index in range(start // block_size, -(-end // block_size)):
            first = index * block_size
            shift = table[index] * block_size - first
            slots += range(max(start, first) + shift, min(end, first + block_size) + shift)
        query_lens.append(num_tokens)
        context_lens.append(end)
        tables.append(table + [-1] * (longest - len(table)))
    return PagedBatch(
        input_ids=to_device(input_ids, torch.int64, device),
        positions=to_device(positions, torch.int64, device),
        slot_mapping=to_device(slots, torch.int64, device),
        cu_query_lens=to_device([0, *accumulate(query_lens)], torch.int32, device),
        context=to_device(context_lens, torch.int32, device),
        block_tables=to_device(tables, torch.int32, device),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
    )


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


def make_sampling_tensors(
    sequences: list[Sequence], vocab_size: int, device: torch.device
) -> SamplingTensors:
    """One row for each sequence; what none of them asks for stays None."""
    params = [seq.params for seq in sequences]
    if all(p.greedy for p in params):
        return SamplingTensors()

    def float32(values: list[float]) -> torch.Tensor:
        return to_device(values, torch.float32, device)

    def int64(values: list[int]) -> torch.Tensor:
        return to_device(values, torch.int64, device)

    top_k = top_p = min_p = None
    if any(0 < p.top_k < vocab_size for p in params):
        # Larger is allowed, and might not fit into 64 bits.
        top_k = int64([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params])
    if any(p.top_p < 1 for p in params):
        top_p = float32([p.top_p if p.top_p < 1 else float("inf") for p in params])
    if any(p.min_p > 0 for p in params):
        min_p = float32([p.min_p for p in params])
    return SamplingTensors(
        temperature=float32([0.0 if p.greedy else p.temperature for p in params]),
        seed=int64([seq.seed for seq in sequences]),
        step=int64([seq.num_output_tokens for seq in sequences]),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )


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
