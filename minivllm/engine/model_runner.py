"""Runs one step of the scheduler on the device: a batch goes in, tokens come out."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import nn

from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.attention.paged_torch import bind_torch_attention
from minivllm.attention.paged_triton import TritonAttention, triton_runs_on
from minivllm.engine.config import EngineConfig
from minivllm.engine.scheduler import ScheduledSequence, Step
from minivllm.engine.sequence import Sequence
from minivllm.layers.sampler import Sampler, SamplingTensors, top_logprobs
from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Attend

BindAttention = Callable[[PagedKVCache, PagedBatch, float], Attend]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place: the chosen token first, then the likeliest ones.

    rank: the chosen token's, 1 is the likeliest.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(frozen=True)
class StepResult:
    """token_ids: one for each sequence that samples; logprobs: theirs, None where not asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class PendingStep(Protocol):
    """A step that the device may not have finished yet."""

    def result(self) -> StepResult:
        """Wait for the step, and read its tokens."""
        ...


class ModelRunner:
    """Owns the model and the KV cache of one device.

    ``overlaps`` says that :meth:`launch` returns before the step is done, so that the next one can
    be prepared meanwhile; this plain runner waits.
    """

    overlaps = False

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        model_config: ModelConfig,
        *,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model = model
        self.model_config = model_config
        self.device = device
        self.scale = model_config.head_size**-0.5
        self.sampler = Sampler()
        self.bind_attention = self._choose_attention(config, max_model_len, dtype)
        num_blocks = config.num_kv_blocks or self._blocks_that_fit(config, max_model_len, dtype)
        try:
            self.cache = PagedKVCache(
                model_config, num_blocks, config.block_size, dtype=dtype, device=device
            )
        except RuntimeError:
            # All that PyTorch says when an allocation fails, on any device.
            block_bytes = PagedKVCache.bytes_per_block(model_config, config.block_size, dtype)
            raise ValueError(
                f"num_kv_blocks={num_blocks} blocks take {num_blocks * block_bytes / 2**30:,.1f} "
                f"GiB, which {device} does not have; lower it, or leave it out"
            ) from None

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Compute all scheduled tokens, and choose the next one wherever a sequence samples."""
        batch = make_batch(step.scheduled, self.cache.block_size, self.device)
        attend = self.bind_attention(self.cache, batch, self.scale)
        hidden = self.model(batch.input_ids, batch.positions, attend)
        sampling = [item.seq for item in step.scheduled if item.samples]
        if not sampling:
            return StepResult([], [])
        ends = list(accumulate(item.num_tokens for item in step.scheduled))
        last = [end - 1 for end, item in zip(ends, step.scheduled, strict=True) if item.samples]
        if len(last) < len(hidden):
            hidden = hidden[torch.tensor(last, device=self.device)]
        logits = self.model.compute_logits(hidden)
        params = make_sampling_tensors(sampling, logits.shape[-1], self.device)
        tokens = self.sampler(logits, params)
        logprobs = self._logprobs(sampling, logits, tokens)
        return StepResult(tokens.tolist(), logprobs)

    def launch(self, step: Step) -> PendingStep:
        """Start a step whose pending tokens may still be unknown to the host; for :attr:`overlaps`.

        Raises NotImplementedError: this runner reads the tokens of a step before the next begins.
        """
        raise NotImplementedError("this runner does not overlap steps; use run")

    def close(self) -> None:
        """Give back what the device would keep beyond this object's life; here, nothing."""

    def _logprobs(
        self, sequences: list[Sequence], logits: torch.Tensor, tokens: torch.Tensor
    ) -> list[TokenLogprobs | None]:
        counts = [seq.params.logprobs for seq in sequences]
        wanted = [count for count in counts if count is not None]
        if not wanted:
            return [None] * len(sequences)
        ids, values, ranks = top_logprobs(logits, tokens, max(wanted))
        rows = zip(counts, ids.tolist(), values.tolist(), ranks.tolist(), strict=True)
        return [
            None
            if count is None
            else TokenLogprobs(row_ids[: 1 + count], row_values[: 1 + count], rank)
            for count, row_ids, row_values, rank in rows
        ]

    def _choose_attention(
        self, config: EngineConfig, max_model_len: int, dtype: torch.dtype
    ) -> BindAttention:
        """The attention backend, once and for all; ValueError if the one asked for cannot run."""
        backend = config.attention_backend
        if backend == "auto":
            on_gpu = self.device.type == "cuda"
            backend = "triton" if on_gpu and triton_runs_on(self.device) else "torch"
        if backend == "torch":
            return bind_torch_attention
        if not triton_runs_on(self.device):
            raise ValueError(
                f"attention_backend='triton' cannot run on {self.device}: it needs Triton and a "
                "GPU of compute capability 8.0 or later (or, to try kernels on a CPU, the "
                "environment variable TRITON_INTERPRET=1); use 'torch'"
            )
        assert config.block_size is not None
        return TritonAttention(
            self.model_config,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            block_size=config.block_size,
            dtype=dtype,
            device=self.device,
        )

    def _blocks_that_fit(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> int:
        """As many KV blocks as the memory allows; ValueError if that is not even one."""
        block_bytes = PagedKVCache.bytes_per_block(self.model_config, config.block_size, dtype)
        if self.device.type == "cuda":
            budget = self._free_after_peak(config)
            remedy = "raise gpu_memory_utilization, lower max_num_batched_tokens, or free the GPU"
        else:
            budget = int(available_host_memory() / 4 * config.gpu_memory_utilization)
            remedy = "free some memory, or set num_kv_blocks yourself"
        fits = budget // block_bytes
        if fits < 1:
            raise ValueError(
                f"no memory for one KV block: it takes {block_bytes / 2**20:.1f} MiB and "
                f"{max(budget, 0) / 2**20:.1f} MiB are left; {remedy}"
            )
        if self.device.type == "cuda":
            return fits
        # More than all sequences can ever fill would only be in the way of others.
        blocks_per_seq = -(-max_model_len // config.block_size)
        return min(fits, config.max_num_seqs * blocks_per_seq)

    def _free_after_peak(self, config: EngineConfig) -> int:
        """Bytes of GPU memory that the largest step leaves of what this engine may use."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        free_before, total = torch.cuda.mem_get_info(self.device)
        reserved_before = torch.cuda.memory_reserved(self.device)
        try:
            self._run_largest_step(config)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"a step of max_num_batched_tokens={config.max_num_batched_tokens} tokens and "
                f"max_num_seqs={config.max_num_seqs} sequences does not fit into the memory that "
                f"is left on {self.device}; lower them, or free the GPU"
            ) from None
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.empty_cache()
        # Weights and everything outside PyTorch's allocator, other processes included, are used.
        used = total - free_before + (peak - reserved_before)
        return int(total * config.gpu_memory_utilization) - used

    @torch.inference_mode()
    def _run_largest_step(self, config: EngineConfig) -> None:
        """A prefill of ``max_num_batched_tokens`` in one sequence, then the largest sampling."""
        num_tokens = min(config.max_num_batched_tokens, self.model_config.max_positions)
        num_blocks = -(-num_tokens // config.block_size)
        one_layer = PagedKVCache(
            replace(self.model_config, num_layers=1),
            num_blocks,
            config.block_size,
            dtype=self.model.lm_head.weight.dtype,
            device=self.device,
        )
        # All layers write to the same one: the cache itself must not count as peak memory.
        one_layer.k = one_layer.k.expand(self.model_config.num_layers, -1, -1, -1, -1)
        one_layer.v = one_layer.v.expand(self.model_config.num_layers, -1, -1, -1, -1)
        arange = torch.arange(num_tokens, device=self.device)
        batch = PagedBatch(
            input_ids=torch.zeros_like(arange),
            positions=arange,
            slot_mapping=arange,
            cu_query_lens=torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device),
            context=torch.tensor([num_tokens], dtype=torch.int32, device=self.device),
            block_tables=torch.arange(num_blocks, dtype=torch.int32, device=self.device)[None],
            query_lens=(num_tokens,),
            context_lens=(num_tokens,),
        )
        attend = self.bind_attention(one_layer, batch, self.scale)
        hidden = self.model(batch.input_ids, batch.positions, attend)
        rows = hidden[:1].expand(config.max_num_seqs, -1)
        logits = self.model.compute_logits(rows)
        ones = torch.ones(len(rows), device=self.device)
        whole = torch.ones(len(rows), dtype=torch.int64, device=self.device)
        self.sampler(logits, SamplingTensors(ones, whole, whole, whole, ones, ones))


def available_host_memory() -> int:
    """Bytes of memory that are free on this machine, or half of all where that is not told."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            return os.sysconf("SC_AVPHYS_PAGES") * page
        return os.sysconf("SC_PHYS_PAGES") * page // 2
    except (AttributeError, ValueError, OSError):
        # Windows has no sysconf; 8 GiB is what a small laptop has.
        return 8 << 30


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
    for item in scheduled:
        seq, start = item.seq, item.seq.num_computed
        end = start + item.num_tokens
        table = seq.block_table
        input_ids += seq.token_ids[start:end]
        positions += range(start, end)
        slots += [
            table[position // block_size] * block_size + position % block_size
            for position in range(start, end)
        ]
        query_lens.append(item.num_tokens)
        context_lens.append(end)
        tables.append(table + [-1] * (longest - len(table)))

    def int32(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return PagedBatch(
        input_ids=torch.tensor(input_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        cu_query_lens=int32([0, *accumulate(query_lens)]),
        context=int32(context_lens),
        block_tables=int32(tables),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
    )


def make_sampling_tensors(
    sequences: list[Sequence], vocab_size: int, device: torch.device
) -> SamplingTensors:
    """One row for each sequence; what none of them asks for stays None."""
    params = [seq.params for seq in sequences]
    if all(p.greedy for p in params):
        return SamplingTensors()

    def float32(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def int64(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

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
