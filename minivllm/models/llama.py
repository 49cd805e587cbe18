"""Llama 3 (Grattafiori et al. 2024): Qwen3's decoder without the norms on query and key heads."""

import torch

from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
)


class LlamaAttention(Qwen3Attention):
    """Grouped-query self-attention on queries and keys as they are projected."""

    def add_head_norms(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Llama has none, and a model that has no such parameter asks no checkpoint for it."""
        return

    def norm_heads(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q: [T, H, D]; k: [T, G, D]. Returns both in the same shapes."""
        return q, k


class LlamaDecoderLayer(Qwen3DecoderLayer):
    attention_class = LlamaAttention


class LlamaModel(Qwen3Model):
    layer_class = LlamaDecoderLayer


class LlamaForCausalLM(Qwen3ForCausalLM):
    """Llama 3 as it stands in a checkpoint; its RoPE scaling is a matter of the config."""

    model_class = LlamaModel
