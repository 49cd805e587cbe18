"""A batch of requests on pages: the least that runs a model with this chapter's code.

Blocks come from a list of free ones and go back to it when a request has ended. Chapters 6 and 7
build what an engine has instead of this file.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import nn

from minivllm.attention.paged import (
    PagedBatch,
    PagedKVCache,
    paged_attention_loop,
    slots_of,
    store_kv,
)

Form = Callable[..., Callable[..., torch.Tensor]]


@dataclass
class Request:
    """new: tokens that have not been through the model; stored: how many have."""

    name: str
    new: list[int]
    stored: int = 0
    table: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


def by_loop(
    k_cache: torch.Tensor, v_cache: torch.Tensor, batch: PagedBatch, scale: float
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Store and attend for one layer, in PyTorch."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        store_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        return paged_attention_loop(q, k_cache, v_cache, batch, scale)

    return attend


def by_kernels(
    k_cache: torch.Tensor, v_cache: torch.Tensor, batch: PagedBatch, scale: float
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same with this chapter's simple Triton kernels."""
    from minivllm.attention import paged_simple_kernels, paged_store_kernels

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        paged_store_kernels.store_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        pages = (k_cache, v_cache, batch.block_tables)
        if max(batch.query_lens) == 1:
            return paged_simple_kernels.paged_decode_whole(q, *pages, batch.context, scale=scale)
        return paged_simple_kernels.paged_prefill_tiled(
            q,
            *pages,
            batch.cu_query_lens,
            batch.context,
            scale=scale,
            max_query_len=max(batch.query_lens),
        )

    return attend


class Pages:
    """A model, a pool of pages, and the blocks of it that are free.

    scattered: hand out the free blocks in a random order, as they lie after hours of service.
    """

    def __init__(
        self,
        model: nn.Module,
        num_blocks: int,
        block_size: int,
        *,
        scattered: bool = True,
        form: Form = by_loop,
    ) -> None:
        weight = model.lm_head.weight
        self.model = model
        self.device = weight.device
        self.cache = PagedKVCache(
            model.config, num_blocks, block_size, dtype=weight.dtype, device=weight.device
        )
        self.form = form
        self.free = list(range(num_blocks))
        if scattered:
            random.Random(0).shuffle(self.free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.cache.block_size)

    @torch.inference_mode()
    def step(self, requests: Sequence[Request]) -> list[int]:
        """Run what is new of each request; its next token becomes its new one."""
        batch = self._batch(requests)
        scale = self.model.config.head_size**-0.5

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.form(self.cache.k[layer], self.cache.v[layer], batch, scale)(q, k, v)

        hidden = self.model(batch.input_ids, batch.positions, attend)
        last = batch.cu_query_lens[1:].long() - 1
        tokens = self.model.compute_logits(hidden[last]).argmax(dim=1).tolist()
        for request, token in zip(requests, tokens, strict=True):
            request.stored += len(request.new)
            request.new = [token]
            request.answer.append(token)
        return tokens

    def end(self, request: Request) -> None:
        """Give the blocks of a request back. What they hold stays in them."""
        self.free += request.table
        request.table = []

    def _batch(self, requests: Sequence[Request]) -> PagedBatch:
        input_ids, positions, slots, lens, contexts = [], [], [], [], []
        for request in requests:
            start, end = request.stored, request.stored + len(request.new)
            while len(request.table) < self.blocks_for(end):
                if not self.free:
                    raise ValueError("the pool is full; make it larger or end a request")
                request.table.append(self.free.pop(0))
            input_ids += request.new
            positions += range(start, end)
            slots += slots_of(request.table, start, end, self.cache.block_size)
            lens.append(end - start)
            contexts.append(end)
        longest = max(len(request.table) for request in requests)
        tables = [[*r.table, *([-1] * (longest - len(r.table)))] for r in requests]

        def tensor(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        return PagedBatch(
            input_ids=tensor(input_ids, torch.int64),
            positions=tensor(positions, torch.int64),
            slot_mapping=tensor(slots, torch.int64),
            cu_query_lens=tensor([0, *accumulate(lens)], torch.int32),
            context=tensor(contexts, torch.int32),
            block_tables=tensor(tables, torch.int32),
            query_lens=tuple(lens),
            context_lens=tuple(contexts),
        )
