"""Qwen3 (Qwen team 2025, arXiv:2505.09388): a dense pre-norm decoder, read from top to bottom.

The model knows nothing of caches, pages or phases. It runs T tokens, of any number of sequences
laid end to end, and asks ``attend`` whenever tokens have to look at each other.
"""

from typing import Protocol

import torch
from torch import nn

from minivllm.layers.activation import SiluAndMul
from minivllm.layers.embedding import Embedding, LMHead
from minivllm.layers.layernorm import RMSNorm
from minivllm.layers.linear import Linear, MergedLinear, QKVLinear
from minivllm.layers.rotary_embedding import RotaryEmbedding
from minivllm.models.config import ModelConfig


class Attend(Protocol):
    """Attention as the model sees it; each chapter passes its own."""

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q: [T, H, D]; k, v: [T, G, D], all of layer ``layer``. Returns [T, H, D]."""
        ...


class Qwen3Attention(nn.Module):
    """Grouped-query self-attention with RMSNorm on every query and key head."""

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.layer = layer
        self.qkv_proj = QKVLinear(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_size,
            bias=config.attention_bias,
            dtype=dtype,
            device=device,
        )
        self.o_proj = Linear(
            config.num_heads * config.head_size,
            config.hidden_size,
            bias=config.attention_bias,
            dtype=dtype,
            device=device,
        )
        self.add_head_norms(config, dtype=dtype, device=device)

    def add_head_norms(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Qwen3 normalises queries and keys; a family that does not overrides both methods."""
        self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype=dtype, device=device)

    def norm_heads(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q: [T, H, D]; k: [T, G, D]. Returns them with every head at root mean square 1."""
        return self.q_norm(q), self.k_norm(k)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rotary: RotaryEmbedding,
        attend: Attend,
    ) -> torch.Tensor:
        """x: [T, E]; positions: [T]. Returns [T, E]."""
        q, k, v = self.qkv_proj.split(self.qkv_proj(x))
        q, k = self.norm_heads(q, k)
        q, k = rotary(positions, q, k)
        out = attend(self.layer, q, k, v)
        return self.o_proj(out.flatten(1))


class Qwen3MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = MergedLinear(
            config.hidden_size, parts, bias=config.mlp_bias, dtype=dtype, device=device
        )
        self.act = SiluAndMul()
        self.down_proj = Linear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, E] -> [T, E]."""
        return self.down_proj(self.act(self.gate_up_proj(x)))


class Qwen3DecoderLayer(nn.Module):
    """Norm, attention, norm, MLP; both results are added to the residual stream."""

    attention_class: type[Qwen3Attention] = Qwen3Attention

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device
        )
        self.self_attn = self.attention_class(config, layer, dtype=dtype, device=device)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device
        )
        self.mlp = Qwen3MLP(config, dtype=dtype, device=device)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        rotary: RotaryEmbedding,
        attend: Attend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one layer on T tokens.

        x: [T, E], the last layer's result, not yet added to ``residual`` [T, E] (None before the
        first layer). The addition is left to the norm that follows, which can fuse it.
        Returns this layer's result and the residual, in the same form.
        """
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, positions, rotary, attend)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class Qwen3Model(nn.Module):
    """The decoder without its head."""

    layer_class: type[Qwen3DecoderLayer] = Qwen3DecoderLayer

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, device=device
        )
        self.layers = nn.ModuleList(
            self.layer_class(config, layer, dtype=dtype, device=device)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.rotary = RotaryEmbedding(
            config.head_size,
            config.max_positions,
            config.rope_base,
            config.rope_scaling,
            device=device,
        )

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """input_ids, positions: [T]. Returns hidden states [T, E]."""
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, positions, self.rotary, attend)
        return self.norm.add(x, residual)[0]


class Qwen3ForCausalLM(nn.Module):
    """Qwen3 as it stands in a checkpoint: ``model.*`` and, unless tied, ``lm_head.weight``."""

    model_class: type[Qwen3Model] = Qwen3Model

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.model = self.model_class(config, dtype=dtype, device=device)
        self.lm_head = LMHead(
            config.vocab_size,
            config.hidden_size,
            tied_to=self.model.embed_tokens if config.tie_embeddings else None,
            dtype=dtype,
            device=device,
        )

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Run T tokens of any number of sequences laid end to end.

        input_ids: [T]; positions: [T], each token's place in its own sequence; ``attend`` is called
        once a layer. Returns hidden states [T, E]; :meth:`compute_logits` scores those that matter.
        """
        return self.model(input_ids, positions, attend)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [T, E] -> logits [T, V]."""
        return self.lm_head(hidden)
