"""Attention on pages by our Triton kernels, behind the same seam as the PyTorch path."""

import os
from importlib.util import find_spec
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Attend

if TYPE_CHECKING:
    from minivllm.attention.paged_kernels import PagedDecodePlan


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton kernels can be launched on tensors of ``device``.

    On a GPU from Ampere on; on a CPU only in the interpreter, which is for tests and notebooks.
    """
    if find_spec("triton") is None:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonAttention:
    """Binds steps to the kernels; owns the memory that a split decode needs between its parts.

    max_num_seqs: the most sequences in a step; max_model_len: the most tokens of one.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Here and below: without Triton, this module must still be importable.
        from minivllm.attention.paged_kernels import PagedDecodePlan

        self.plan: PagedDecodePlan = PagedDecodePlan(
            max_num_seqs,
            -(-max_model_len // block_size),
            block_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_size,
            dtype=dtype,
            device=device,
        )

    def __call__(self, cache: PagedKVCache, batch: PagedBatch, scale: float) -> Attend:
        """``attend`` for one step, whose decode rows, if any, come first."""
        return TritonPagedAttention(self.plan, cache, batch, scale)


class TritonPagedAttention:
    """``attend`` for one step; what does not depend on the layer is prepared here, once."""

    def __init__(
        self, plan: "PagedDecodePlan", cache: PagedKVCache, batch: PagedBatch, scale: float
    ) -> None:
        self.plan = plan
        self.cache = cache
        self.batch = batch
        self.scale = scale
        self.num_decodes = sum(1 for _ in takewhile(lambda n: n == 1, batch.query_lens))
        self.max_query_len = max(batch.query_lens)
        self._order: torch.Tensor | None = None
        self._ordered = False
        if self.num_decodes:
            plan.prepare(batch.block_tables[: self.num_decodes], batch.context[: self.num_decodes])

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q: [T, H, D]; k, v: [T, G, D]. Stores k and v, then attends. Returns [T, H, D]."""
        from minivllm.attention.paged_kernels import store_kv

        store_kv(k, v, self.cache.k[layer], self.cache.v[layer], self.batch.slot_mapping)
        return self.attend_stored(layer, q)

    def attend_stored(self, layer: int, q: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
        """The same over keys and values that are in their slots already: q [T, H, D] -> same.

        pdl: where all are decodes, launch before the kernel in front has ended (Hopper and later).
        """
        from minivllm.attention.paged_kernels import paged_attention, paged_decode, prefill_order

        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        batch = self.batch
        if self.num_decodes == len(batch.query_lens):
            return paged_decode(
                q,
                k_cache,
                v_cache,
                batch.block_tables,
                batch.context,
                scale=self.scale,
                plan=self.plan,
                pdl=pdl,
            )
        if not self._ordered:
            self._order = prefill_order(
                q,
                k_cache,
                v_cache,
                batch.cu_query_lens[self.num_decodes :],
                batch.context[self.num_decodes :],
                max_query_len=self.max_query_len,
            )
            self._ordered = True
        return paged_attention(
            q,
            k_cache,
            v_cache,
            batch.block_tables,
            batch.cu_query_lens,
            batch.context,
            scale=self.scale,
            max_query_len=self.max_query_len,
            num_decodes=self.num_decodes,
            plan=self.plan if self.num_decodes else None,
            order=self._order,
        )
