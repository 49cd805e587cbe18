"""Decode steps to measure without an engine: a model's shapes, random weights, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.attention.paged_torch import bind_torch_attention
from minivllm.attention.paged_triton import TritonAttention
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.layers.rotary_embedding import RopeScaling
from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Qwen3ForCausalLM

# E, F, layers, H, G, D, V, tied head
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "1.7B": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "4B": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "8B": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "tiny": (64, 96, 2, 4, 2, 64, 48, True),
}
BLOCK_SIZE = 64


def model_config(shapes: str) -> ModelConfig:
    """Qwen3's constants with the sizes of ``shapes``."""
    if shapes not in SHAPES:
        raise ValueError(f"shapes={shapes!r} are not known; use one of {list(SHAPES)}")
    hidden, mlp, layers, heads, kv_heads, head_size, vocab, tied = SHAPES[shapes]
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        max_positions=40960,
        rms_norm_eps=1e-6,
        rope_base=1e6,
        rope_scaling=RopeScaling(),
        tie_embeddings=tied,
        attention_bias=False,
        mlp_bias=False,
        dtype=torch.bfloat16,
        eos_token_ids=(),
    )


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Qwen3ForCausalLM:
    """A model whose activations keep their size from layer to layer."""
    model = Qwen3ForCausalLM(config, dtype=dtype, device=device).requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.normal_(1.0, 0.1)
        else:
            weight.normal_(0.0, weight.shape[1] ** -0.5)
    return model


@dataclass(frozen=True)
class DecodeStep:
    """P sequences with random keys and values behind them, and the token that each brings."""

    batch: PagedBatch
    cache: PagedKVCache

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        contexts: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> DecodeStep:
        """One sequence of each of ``contexts`` tokens, the newest included."""
        rows = len(contexts)
        blocks = [-(-context // BLOCK_SIZE) for context in contexts]
        cache = PagedKVCache(config, sum(blocks), BLOCK_SIZE, dtype=dtype, device=device)
        cache.k.normal_()
        cache.v.normal_()
        tables = torch.zeros(rows, max(blocks), dtype=torch.int32, device=device)
        shuffled = torch.randperm(sum(blocks), device=device).int().split(blocks)
        for table, of_row in zip(tables, shuffled, strict=True):
            table[: len(of_row)] = of_row
        last = torch.tensor(contexts, device=device) - 1
        block = tables.gather(1, last[:, None] // BLOCK_SIZE)[:, 0]
        return cls(
            PagedBatch(
                input_ids=torch.randint(0, config.vocab_size, (rows,), device=device),
                positions=last,
                slot_mapping=block.long() * BLOCK_SIZE + last % BLOCK_SIZE,
                cu_query_lens=torch.arange(rows + 1, dtype=torch.int32, device=device),
                context=last.int() + 1,
                block_tables=tables,
                query_lens=(1,) * rows,
                context_lens=tuple(contexts),
            ),
            cache,
        )

    def skinny(
        self, forward: SkinnyForward, attention: TritonAttention | None = None
    ) -> torch.Tensor:
        """The step by the kernels: logits [P, V]; attention: for many sequences."""
        batch, attend = self.batch, None
        if attention is not None and not forward.tuning.own_attention:
            bound = attention(self.cache, batch, forward.model.config.head_size**-0.5)
            attend = partial(bound.attend_stored, pdl=forward.dependent)
        return forward(
            batch.input_ids,
            batch.positions,
            batch.slot_mapping,
            batch.block_tables,
            batch.context,
            attend=attend,
        )

    @torch.inference_mode()
    def plain(
        self, model: Qwen3ForCausalLM, *, backend: Any = bind_torch_attention
    ) -> torch.Tensor:
        """The step by the model: logits [P, V]."""
        batch = self.batch
        attend = backend(self.cache, batch, model.config.head_size**-0.5)
        return model.compute_logits(model(batch.input_ids, batch.positions, attend))
