"""Runs one step of the scheduler on the device: a batch goes in, tokens come out."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import nn

from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.attention.paged_torch import TorchAttention
from minivllm.attention.paged_triton import TritonAttention, triton_runs_on
from minivllm.engine.batches import (
    TokenLogprobs,
    find_logprobs,
    make_batch,
    make_sampling_tensors,
    to_device,
)
from minivllm.engine.config import EngineConfig
from minivllm.engine.scheduler import Step
from minivllm.layers.sampler import Sampler, SamplingTensors
from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Attend

BindAttention = Callable[[PagedKVCache, PagedBatch, float], Attend]


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
        try:
            self.bind_attention = self._choose_attention(config, max_model_len, dtype)
            self._reserve(config, max_model_len, dtype)
        except (RuntimeError, MemoryError) as error:
            if not _lacks_memory(error):
                raise
            raise ValueError(
                f"there is no memory on {device} for the state of "
                f"max_num_seqs={config.max_num_seqs} sequences and steps of "
                f"max_num_batched_tokens={config.max_num_batched_tokens} tokens; lower them"
            ) from None
        num_blocks = config.num_kv_blocks or self._blocks_that_fit(config, max_model_len, dtype)
        self.cache = self._make_cache(num_blocks, config.block_size, dtype)

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Compute all scheduled tokens, and choose the next one wherever a sequence samples."""
        batch = make_batch(step.scheduled, self.cache.block_size, self.device)
        hidden = self.forward(batch, self.cache)
        sampling = step.sampling
        if not sampling:
            return StepResult([], [])
        logits = self.model.compute_logits(self.last_rows(step, hidden))
        params = make_sampling_tensors(sampling, logits.shape[-1], self.device)
        tokens = self.sampler(logits, params)
        return StepResult(tokens.tolist(), find_logprobs(sampling, logits, tokens))

    def forward(self, batch: PagedBatch, cache: PagedKVCache) -> torch.Tensor:
        """All layers on the T tokens of ``batch``: hidden states [T, E]."""
        attend = self.bind_attention(cache, batch, self.scale)
        return self.model(batch.input_ids, batch.positions, attend)

    def last_rows(self, step: Step, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, E] -> the rows of those tokens after which a sequence samples."""
        ends = list(accumulate(item.num_tokens for item in step.scheduled))
        last = [end - 1 for end, item in zip(ends, step.scheduled, strict=True) if item.samples]
        if len(last) == len(hidden):
            return hidden
        return hidden[to_device(last, torch.int64, self.device)]

    def _reserve(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> None:
        """Take the memory that must not go to the KV cache; this runner needs none."""

    def _bytes_to_come(self) -> int:
        """GPU memory that will be needed once the KV cache is there; this runner needs none."""
        return 0

    def launch(self, step: Step) -> PendingStep:
        """Start a step whose pending tokens may still be unknown to the host; for :attr:`overlaps`.

        Raises NotImplementedError: this runner reads the tokens of a step before the next begins.
        """
        raise NotImplementedError("this runner does not overlap steps; use run")

    def close(self) -> None:
        """Give back what the device would keep beyond this object's life; here, nothing."""

    def _choose_attention(
        self, config: EngineConfig, max_model_len: int, dtype: torch.dtype
    ) -> BindAttention:
        """The attention backend, once and for all; ValueError if the one asked for cannot run."""
        backend = config.attention_backend
        if backend == "auto":
            on_gpu = self.device.type == "cuda"
            backend = "triton" if on_gpu and triton_runs_on(self.device) else "torch"
        if backend == "torch":
            return TorchAttention()
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

    def _make_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> PagedKVCache:
        """The pool of blocks; ValueError, which says how many would fit, if there is no room."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = available_host_memory()
        try:
            return PagedKVCache(
                self.model_config, num_blocks, block_size, dtype=dtype, device=self.device
            )
        except (RuntimeError, TypeError):
            # All that PyTorch says when an allocation fails, on any device, and of numbers that
            # need more than 64 bits.
            block_bytes = PagedKVCache.bytes_per_block(self.model_config, block_size, dtype)
            raise ValueError(
                f"num_kv_blocks={num_blocks} blocks take {num_blocks * block_bytes // 2**30:,} "
                f"GiB, which {self.device} does not have; lower it (about {free // block_bytes} "
                "would fit now), or leave it out"
            ) from None

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
        return int(total * config.gpu_memory_utilization) - used - self._bytes_to_come()

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
        hidden = self.forward(batch, one_layer)
        rows = hidden[:1].expand(config.max_num_seqs, -1)
        logits = self.model.compute_logits(rows)
        ones = torch.ones(len(rows), device=self.device)
        whole = torch.ones(len(rows), dtype=torch.int64, device=self.device)
        self.sampler(logits, SamplingTensors(ones, whole, whole, whole, ones, ones))


def _lacks_memory(error: Exception) -> bool:
    """Whether ``error`` is an allocation that failed: on a CPU PyTorch has no class for it."""
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(word in str(error) for word in words)


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
