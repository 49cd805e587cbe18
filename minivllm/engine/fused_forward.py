"""The model's forward pass in as few launches as its matrix products allow.

The same mathematics, the same weights and the same order as ``models/qwen3.py``; what stands
between two matrix products is one kernel:

    add + RMSNorm | qkv | q/k-norm + RoPE + store of K, V | attention | o |
    add + RMSNorm | gate and up | SiLU-and-mul | down

That is 9 launches a layer (attention takes two when it splits) where the plain form takes about 25.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minivllm.attention.paged import PagedKVCache
from minivllm.models.qwen3 import Qwen3ForCausalLM

# (layer, q [T, H, D]) -> [T, H, D], over keys and values that are in the cache already.
AttendStored = Callable[[int, torch.Tensor], torch.Tensor]


class FusedForward:
    """Runs ``model`` (Qwen3 or Llama) on T tokens.

    pdl: launch each of our kernels while the one in front of it still runs (programmatic dependent
    launch, compute capability 9 and later); it waits inside for what it reads.
    """

    def __init__(self, model: Qwen3ForCausalLM, *, pdl: bool = False) -> None:
        # Here, for Triton has no wheel for every machine.
        from minivllm.engine import fused_heads_kernels, fused_kernels

        self.model = model
        self.pdl = pdl
        self.kernels = fused_kernels
        self.heads_kernels = fused_heads_kernels

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: PagedKVCache,
        attend: AttendStored,
    ) -> torch.Tensor:
        """Run T tokens whose keys and values go to their slots of ``cache``.

        input_ids, positions, slot_mapping: int64 [T]. Returns hidden states [T, E].
        """
        kernels, decoder, pdl = self.kernels, self.model.model, self.pdl
        x = decoder.embed_tokens(input_ids)
        residual = None
        for index, layer in enumerate(decoder.layers):
            norm = layer.input_layernorm
            if residual is None:
                x, residual = kernels.rms_norm(x, norm.weight, norm.eps, pdl=pdl), x
            else:
                x, residual = kernels.add_rms_norm(x, residual, norm.weight, norm.eps, pdl=pdl)
            q = self.queries(index, x, positions, slot_mapping, cache)
            x = layer.self_attn.o_proj(attend(index, q).flatten(1))
            norm = layer.post_attention_layernorm
            x, residual = kernels.add_rms_norm(x, residual, norm.weight, norm.eps, pdl=pdl)
            x = layer.mlp.down_proj(kernels.silu_and_mul(layer.mlp.gate_up_proj(x), pdl=pdl))
        norm = decoder.norm
        return kernels.add_rms_norm(x, residual, norm.weight, norm.eps, pdl=pdl)[0]

    def queries(
        self,
        index: int,
        x: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: PagedKVCache,
        **norm: Any,
    ) -> torch.Tensor:
        """Queries [T, H, D] of layer ``index`` from its input x [T, E]; K and V go to the cache.

        norm: ``norm_of`` and ``norm_eps`` of :func:`fused_heads_kernels.qk_norm_rope_store`.
        """
        attention = self.model.model.layers[index].self_attn
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        qkv = attention.qkv_proj
        return self.heads_kernels.qk_norm_rope_store(
            qkv(x),
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps,
            self.model.model.rotary.table,
            positions,
            slot_mapping,
            cache.k[index],
            cache.v[index],
            num_heads=qkv.num_heads,
            num_kv_heads=qkv.num_kv_heads,
            head_size=qkv.head_size,
            pdl=self.pdl,
            **norm,
        )
