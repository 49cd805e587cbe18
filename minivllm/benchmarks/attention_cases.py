"""Inputs for the attention benchmarks, and the forms of attention that are compared on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from minivllm.attention.naive import naive_attention
from minivllm.attention.paged import PagedBatch, paged_attention_loop
from minivllm.benchmarks.harness import Call


@dataclass(frozen=True)
class Shape:
    """Of one attention layer: H query heads, G KV heads, head size D, S tokens a page."""

    num_heads: int = 16
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"heads={self.num_heads} must be a multiple of kv_heads={self.num_kv_heads}; "
                "change one of them"
            )

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return self.head_size**-0.5


def prefix_sums(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 [B + 1]: 0, then where each sequence ends."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def shuffled_tables(
    lengths: Sequence[int], block_size: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Block tables int32 [B, most blocks] over blocks in random order, and how many there are."""
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks)).to(torch.int32)
    tables = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32)
    for row, mine in enumerate(order.split(blocks)):
        tables[row, : len(mine)] = mine
    return tables.to(device), sum(blocks)


@dataclass(frozen=True)
class PrefillCase:
    """Prompts of these lengths, their queries [T, H, D], keys and values [T, G, D] and pages."""

    shape: Shape
    lengths: tuple[int, ...]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor
    context_lens: torch.Tensor
    tables: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    @classmethod
    def make(
        cls, shape: Shape, lengths: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> PrefillCase:
        """Random inputs; the cache holds the same keys and values as ``k`` and ``v``."""
        tokens = sum(lengths)
        q, k, v = (
            torch.randn(tokens, heads, shape.head_size, device=device).to(dtype)
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        tables, num_blocks = shuffled_tables(lengths, shape.block_size, device)
        cache_shape = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_size)
        caches = [torch.zeros(cache_shape, dtype=dtype, device=device) for _ in range(2)]
        for row, (keys, values) in enumerate(
            zip(k.split(list(lengths)), v.split(list(lengths)), strict=True)
        ):
            token = torch.arange(len(keys), device=device)
            block = tables[row].long()[token // shape.block_size]
            slots = block * shape.block_size + token % shape.block_size
            caches[0].flatten(0, 1)[slots] = keys
            caches[1].flatten(0, 1)[slots] = values
        context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        cu_seqlens = prefix_sums(lengths, device)
        return cls(shape, tuple(lengths), q, k, v, cu_seqlens, context_lens, tables, *caches)

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products, the visible half of the scores only."""
        pairs = sum(length * length for length in self.lengths) // 2
        return 4 * self.shape.head_size * self.shape.num_heads * pairs

    def naive(self) -> torch.Tensor:
        """Chapter 3: all scores of a sequence at once."""
        sizes = list(self.lengths)
        parts = zip(self.q.split(sizes), self.k.split(sizes), self.v.split(sizes), strict=True)
        return torch.cat([naive_attention(q, k, v, self.shape.scale) for q, k, v in parts])

    def sdpa(self) -> torch.Tensor:
        """PyTorch's fused attention, of sequences of one length: [B, H, L, D]."""
        q, k, v = (
            x.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)
            for x in (self.q, self.k, self.v)
        )
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.shape.scale, enable_gqa=True
        )

    def calls(self, device: torch.device) -> dict[str, Call]:
        """Every form that this machine and these lengths allow, by the name in the tables."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from minivllm.attention import flash

        longest = max(self.lengths)
        calls: dict[str, Call] = {}
        if longest <= 4096:
            calls["PyTorch, all scores"] = self.naive
        common: dict[str, Any] = {"scale": self.shape.scale, "max_seqlen": longest}
        flat = (self.q, self.k, self.v, self.cu_seqlens)
        if device.type != "cuda":
            calls["PyTorch, tiles"] = lambda: flash.flash_attention(*flat, **common)
            calls["PyTorch SDPA"] = self.sdpa
            return calls

        from minivllm.attention import flash_kernels, naive_kernels, paged_kernels
        from minivllm.attention.flash_hopper import fits_hopper

        if longest <= naive_kernels.longest_sequence(self.shape.head_size, self.q.dtype):
            calls["Triton, all scores"] = lambda: naive_kernels.naive_attention_triton(
                *flat, **common
            )
        paged = (
            self.q,
            self.k_cache,
            self.v_cache,
            self.tables,
            self.cu_seqlens,
            self.context_lens,
        )
        options = {"scale": self.shape.scale, "max_query_len": longest}
        calls["Triton, tiles"] = lambda: flash_kernels.flash_attention_tiled(*flat, **common)
        calls["Triton, tiles, pages"] = lambda: paged_kernels.paged_prefill_tiled(*paged, **options)
        if fits_hopper(self.q, self.k, self.v):
            calls["Hopper"] = lambda: flash_kernels.flash_attention(*flat, **common)
            calls["Hopper, pages"] = lambda: paged_kernels.paged_prefill(*paged, **options)

        def with_backend(backend: SDPBackend) -> Call:
            def call() -> torch.Tensor:
                with sdpa_kernel(backend):
                    return self.sdpa()

            return call

        calls["SDPA flash"] = with_backend(SDPBackend.FLASH_ATTENTION)
        calls["SDPA cuDNN"] = with_backend(SDPBackend.CUDNN_ATTENTION)
        return calls


@dataclass(frozen=True)
class DecodeCase:
    """One token for each of B sequences, over the caches of several layers.

    The layers share the block tables, as in a model, and are read in turn: together they are larger
    than the GPU's L2 cache, so each is read from memory.
    """

    shape: Shape
    context_lens: tuple[int, ...]
    q: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]

    @classmethod
    def make(
        cls,
        shape: Shape,
        context_lens: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        cold_bytes: int,
        min_layers: int = 1,
        max_layers: int = 64,
    ) -> DecodeCase:
        """Random inputs, with layers enough for ``cold_bytes`` of keys and values in all.

        At least ``min_layers``, unless they would take more than half of the GPU's free memory.
        """
        tables, num_blocks = shuffled_tables(context_lens, shape.block_size, device)
        cache = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_size)
        layer_bytes = 2 * num_blocks * shape.block_size * shape.num_kv_heads * shape.head_size
        layer_bytes *= dtype.itemsize
        if device.type == "cuda":
            torch.cuda.empty_cache()
            fitting = torch.cuda.mem_get_info(device)[0] // 2 // layer_bytes
            min_layers = max(1, min(min_layers, fitting))
        layers = max(min_layers, min(max_layers, -(-cold_bytes // layer_bytes)))
        caches = [
            [torch.empty(cache, dtype=dtype, device=device).normal_() for _ in range(layers)]
            for _ in range(2)
        ]
        q = torch.randn(len(context_lens), shape.num_heads, shape.head_size, device=device)
        lengths = torch.tensor(context_lens, dtype=torch.int32, device=device)
        return cls(shape, tuple(context_lens), q.to(dtype), lengths, tables, *caches)

    @property
    def bytes_read(self) -> int:
        """Keys and values of one layer, each once."""
        per_token = 2 * self.shape.num_kv_heads * self.shape.head_size * self.q.element_size()
        return sum(self.context_lens) * per_token

    def batch(self) -> PagedBatch:
        """What the PyTorch forms want to know of the step."""
        count = len(self.context_lens)
        positions = self.lengths.long() - 1
        block = self.tables.long().gather(1, (positions // self.shape.block_size)[:, None])[:, 0]
        return PagedBatch(
            input_ids=torch.zeros_like(positions),
            positions=positions,
            slot_mapping=block * self.shape.block_size + positions % self.shape.block_size,
            cu_query_lens=prefix_sums([1] * count, self.q.device),
            context=self.lengths,
            block_tables=self.tables,
            query_lens=(1,) * count,
            context_lens=self.context_lens,
        )

    def torch_calls(self) -> dict[str, Call]:
        """The PyTorch forms, on the first layer: host loops, so they are timed without a graph."""
        from minivllm.attention.paged_torch import TorchPagedAttention

        batch = self.batch()
        cache: Any = SimpleNamespace(
            k=self.k_caches, v=self.v_caches, block_size=self.shape.block_size
        )
        gather = TorchPagedAttention(cache, batch, self.shape.scale)
        new = torch.randn(len(self.q), *self.k_caches[0].shape[2:], device=self.q.device)
        new = new.to(self.q.dtype)
        calls: dict[str, Call] = {"PyTorch, gather": lambda: gather(0, self.q, new, new)}
        if sum(self.context_lens) <= 16384:
            calls["PyTorch, loop"] = lambda: paged_attention_loop(
                self.q, self.k_caches[0], self.v_caches[0], batch, self.shape.scale
            )
        return calls

    def kernel_calls(self, plan: Any) -> dict[str, list[Call]]:
        """Our kernels, and PyTorch's on contiguous keys (of one length), a call a layer."""
        from minivllm.attention import paged_kernels

        layers = list(zip(self.k_caches, self.v_caches, strict=True))
        scale = self.shape.scale

        def whole(k: torch.Tensor, v: torch.Tensor) -> Call:
            return lambda: paged_kernels.paged_decode_whole(
                self.q, k, v, self.tables, self.lengths, scale=scale
            )

        def split(k: torch.Tensor, v: torch.Tensor) -> Call:
            return lambda: paged_kernels.paged_decode(
                self.q, k, v, self.tables, self.lengths, scale=scale, plan=plan, pdl=True
            )

        def sdpa(k: torch.Tensor, v: torch.Tensor) -> Call:
            length = self.context_lens[0]
            q = self.q.unsqueeze(2)  # [B, H, 1, D]
            k, v = (
                x.flatten(0, 1)[: len(self.q) * length]
                .unflatten(0, (len(self.q), length))
                .transpose(1, 2)
                for x in (k, v)
            )
            return lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

        calls = {
            "Triton, a sequence each": [whole(k, v) for k, v in layers],
            "Triton, equal shares": [split(k, v) for k, v in layers],
        }
        if len(set(self.context_lens)) == 1:
            calls["SDPA, contiguous"] = [sdpa(k, v) for k, v in layers]
        return calls

    def plan(self, **options: Any) -> Any:
        """A prepared plan for these sequences."""
        from minivllm.attention.paged_kernels import PagedDecodePlan

        plan = PagedDecodePlan(
            *self.tables.shape,
            self.shape.block_size,
            self.shape.num_heads,
            self.shape.num_kv_heads,
            self.shape.head_size,
            dtype=self.q.dtype,
            device=self.q.device,
            **options,
        )
        plan.prepare(self.tables, self.lengths)
        return plan
