"""The ladder's rungs: each chapter's way of generating, on the same model and prompts.

Every way takes a workload and returns the greedy answers, of exactly the asked lengths. The first
ones serve a single request at a time, those in the middle a batch that stays as it is until its
longest answer is done (what has finished goes on being computed, as padding), the last ones have
an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minivllm.attention.flash import FlashAttention, flash_attention
from minivllm.attention.naive import CachedNaiveAttention, ContiguousKVCache, generate_with_cache
from minivllm.attention.paged import PagedKVCache
from minivllm.attention.paged_torch import bind_torch_attention
from minivllm.attention.paged_triton import TritonAttention, triton_runs_on
from minivllm.benchmarks.workload import Workload
from minivllm.engine import llm_engine
from minivllm.engine.batches import make_batch
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.scheduler import ScheduledSequence
from minivllm.engine.sequence import Sequence
from minivllm.llm import LLMEngine
from minivllm.models.config import ModelConfig
from minivllm.models.generate import generate_by_recomputing

Answers = list[list[int]]


@dataclass(frozen=True)
class Bench:
    """What all rungs share.

    model: with a config that knows no end token, so that answers have the lengths asked for.
    folder, load_format: where the engines find the same weights. max_len: the longest prompt and
    answer together. batch: how many sequences run at a time. num_blocks: KV blocks of block_size
    tokens, for every rung on pages.
    """

    model: nn.Module
    folder: Path
    load_format: str
    dtype: str
    device: torch.device
    max_len: int
    batch: int
    block_size: int
    num_blocks: int

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def next_tokens(self, hidden: torch.Tensor, ends: list[int]) -> list[int]:
        """hidden [T, E] -> the likeliest token after each row that comes before an end."""
        rows = hidden[torch.tensor(ends, device=self.device) - 1]
        return self.model.compute_logits(rows).argmax(dim=1).tolist()


def recompute(bench: Bench, workload: Workload) -> Answers:
    """Chapter 2: every token from a pass over all tokens before it."""
    return [list(generate_by_recomputing(bench.model, *each)) for each in _requests(workload)]


def contiguous(bench: Bench, workload: Workload) -> Answers:
    """Chapter 3: K and V kept in a contiguous cache, one request at a time."""
    return [list(generate_with_cache(bench.model, *each)) for each in _requests(workload)]


@torch.inference_mode()
def contiguous_batches(bench: Bench, workload: Workload) -> Answers:
    """Chapter 3, in fixed batches: a cache row for each, as long as the longest may become."""
    weight = bench.model.lm_head.weight
    cache = ContiguousKVCache(
        bench.config, bench.batch, bench.max_len, dtype=weight.dtype, device=weight.device
    )
    scale = bench.config.head_size**-0.5
    answers: Answers = []
    for sequences in _batches(bench, workload):
        while not all(seq.finished for seq in sequences):
            counts = [seq.num_pending for seq in sequences]
            starts = [seq.num_computed for seq in sequences]
            ends = list(accumulate(counts))
            attend = CachedNaiveAttention(cache, range(len(sequences)), starts, [0, *ends], scale)
            new = [seq.token_ids[start:] for seq, start in zip(sequences, starts, strict=True)]
            places = [range(seq.num_computed, len(seq)) for seq in sequences]
            input_ids = torch.tensor([t for tokens in new for t in tokens], device=weight.device)
            positions = torch.tensor([p for place in places for p in place], device=weight.device)
            hidden = bench.model(input_ids, positions, attend)
            _append(sequences, bench.next_tokens(hidden, ends))
        answers += [seq.output_token_ids for seq in sequences]
    return answers


@torch.inference_mode()
def flash_prefill(bench: Bench, workload: Workload) -> Answers:
    """Chapter 4: as in chapter 3, but the prompt goes through attention in tiles."""
    form = flash_attention
    if triton_runs_on(bench.device) and bench.device.type == "cuda":
        from minivllm.attention.flash_kernels import flash_attention as form
    model, config = bench.model, bench.config
    scale = config.head_size**-0.5
    weight = model.lm_head.weight
    answers: Answers = []
    for prompt, max_tokens in _requests(workload):
        cache = ContiguousKVCache(
            config, 1, len(prompt) + max_tokens, dtype=weight.dtype, device=weight.device
        )
        flash = FlashAttention([0, len(prompt)], scale, form=form, device=weight.device)

        def prefill(
            layer: int,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            cache: ContiguousKVCache = cache,
            flash: FlashAttention = flash,
        ) -> torch.Tensor:
            cache.store(layer, 0, 0, k, v)
            return flash(layer, q, k, v)

        new, start, answer = prompt, 0, []
        for _ in range(max_tokens):
            attend = prefill
            if start:
                attend = CachedNaiveAttention(cache, [0], [start], [0, 1], scale)
            input_ids = torch.tensor(new, device=weight.device)
            positions = torch.arange(start, start + len(new), device=weight.device)
            hidden = model(input_ids, positions, attend)
            start += len(new)
            new = bench.next_tokens(hidden, [len(new)])
            answer += new
        answers.append(answer)
    return answers


class OnPages:
    """Chapters 5 and 6: fixed batches on pages, without or with shared prefixes.

    Without a block manager, each sequence is handed all its blocks beforehand, in a row.
    """

    def __init__(self, bench: Bench, *, prefix_caching: bool) -> None:
        self.bench = bench
        self.prefix_caching = prefix_caching
        weight = bench.model.lm_head.weight
        self.cache = PagedKVCache(
            bench.config,
            bench.num_blocks,
            bench.block_size,
            dtype=weight.dtype,
            device=bench.device,
        )
        self.bind: Callable[..., Any] = bind_torch_attention
        if bench.device.type == "cuda" and triton_runs_on(bench.device):
            self.bind = TritonAttention(
                bench.config,
                max_num_seqs=bench.batch,
                max_model_len=bench.max_len,
                block_size=bench.block_size,
                dtype=weight.dtype,
                device=bench.device,
            )

    @torch.inference_mode()
    def __call__(self, workload: Workload) -> Answers:
        manager = BlockManager(self.bench.num_blocks, self.bench.block_size)
        answers: Answers = []
        for sequences in _batches(self.bench, workload):
            blocks = count()
            for seq in sequences:
                if self.prefix_caching:
                    admitted = manager.admit(seq)
                    assert admitted, "the pool holds every batch"
                    # Now, so that the next prompt of this very batch finds them.
                    manager.cache_full_blocks(seq, len(seq))
                else:
                    most = manager.blocks_for(seq.num_prompt_tokens + seq.max_tokens)
                    seq.block_table = [next(blocks) for _ in range(most)]
            while not all(seq.finished for seq in sequences):
                if self.prefix_caching:
                    grown = [manager.grow(seq, len(seq)) for seq in sequences]
                    assert all(grown), "the pool holds every batch"
                _append(sequences, self._step(sequences))
            answers += [seq.output_token_ids for seq in sequences]
            if self.prefix_caching:
                for seq in sequences:
                    manager.release(seq)
        return answers

    def _step(self, sequences: list[Sequence]) -> list[int]:
        scheduled = [ScheduledSequence(seq, seq.num_pending, True, False) for seq in sequences]
        batch = make_batch(scheduled, self.bench.block_size, self.bench.device)
        attend = self.bind(self.cache, batch, self.bench.config.head_size**-0.5)
        hidden = self.bench.model(batch.input_ids, batch.positions, attend)
        return self.bench.next_tokens(hidden, list(accumulate(batch.query_lens)))


class InAnEngine:
    """Chapters 7 and 8: continuous batching; from chapter 8 on with graphs and overlap.

    Use :meth:`close` to give back its memory.
    """

    def __init__(self, bench: Bench, *, graphs: bool) -> None:
        kind = LLMEngine if graphs else llm_engine.LLMEngine
        self.engine = kind(
            model=bench.folder,
            load_format=bench.load_format,
            skip_tokenizer_init=True,
            dtype=bench.dtype,
            device=str(bench.device),
            max_model_len=bench.max_len,
            max_num_seqs=bench.batch,
            block_size=bench.block_size,
            num_kv_blocks=bench.num_blocks,
            enforce_eager=not graphs,
        )

    def __call__(self, workload: Workload) -> Answers:
        engine = self.engine
        # Every round begins with an empty prefix cache, as the other rungs do.
        engine.block_manager.forget_all()
        for place, (prompt, max_tokens) in enumerate(_requests(workload)):
            engine.add_request(str(place), prompt, _greedy(max_tokens), stream=False)
        done: dict[int, list[int]] = {}
        while engine.has_unfinished_requests:
            for output in engine.step():
                done[int(output.request_id)] = output.outputs[0].token_ids
        return [done[place] for place in range(len(workload.prompts))]

    def close(self) -> None:
        self.engine.shutdown()


def _requests(workload: Workload) -> Iterator[tuple[list[int], int]]:
    return zip(workload.prompts, workload.max_tokens, strict=True)


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)


def _batches(bench: Bench, workload: Workload) -> Iterator[list[Sequence]]:
    """The requests in fixed batches, in their order."""
    sequences = [
        Sequence(
            str(place), prompt, _greedy(most), arrival=place, seed=0, max_len=len(prompt) + most + 1
        )
        for place, (prompt, most) in enumerate(_requests(workload))
    ]
    for first in range(0, len(sequences), bench.batch):
        yield sequences[first : first + bench.batch]


def _append(sequences: list[Sequence], tokens: list[int]) -> None:
    """Take a step's tokens; a sequence that has finished stays, and computes its last one again."""
    for seq, token in zip(sequences, tokens, strict=True):
        if not seq.finished:
            seq.num_computed = len(seq)
            seq.append(token)
