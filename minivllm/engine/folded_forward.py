"""The forward pass without a kernel for any RMSNorm, or any addition to the residual stream.

A norm scales each row by a number of its own, and each column by its weight g. A matrix product
cares about neither: columns can be scaled in the matrix beforehand, and rows afterwards,

    norm(x) @ W.T  =  (x / rms(x) * g) @ W.T  =  (x @ (W * g).T) / rms(x)

so W * g replaces W once and for all (:func:`fold_norms`), and the division is left to the kernel
that reads the result anyway: q/k-norm + RoPE + store, or SiLU-and-mul. And a product can add what
it finds in its output instead of overwriting it. A layer of ``fused_forward.py``, and this one:

    add + norm | qkv | rope, store | attention | o | add + norm | gate, up | SiLU | down
                 qkv | rope, store | attention | o, add |         gate, up | SiLU | down, add

Two launches fewer (``benchmarks/forward.py`` measures both forms). What is rounded where differs
from the plain model: the stream is what is multiplied, not the normalised rows, and W * g is
rounded. So this is for bfloat16, whose range a product of the stream cannot leave.

Source: the identity is used in Graef et al., "FlashNorm: fast normalization for LLMs" (2024).
"""

from __future__ import annotations

import torch

from minivllm.attention.paged import PagedKVCache
from minivllm.engine.fused_forward import AttendStored, FusedForward
from minivllm.layers.linear import Linear
from minivllm.models.qwen3 import Qwen3ForCausalLM


def can_fold(model: Qwen3ForCausalLM) -> bool:
    """Whether :class:`FoldedForward` can run ``model``: bfloat16, on one device, without biases.

    A rank of several holds a part of each product, whose sum is not there yet when it would be
    added to the stream.
    """
    layer = model.model.layers[0]
    summed = (layer.self_attn.o_proj, layer.mlp.down_proj)
    products = (*summed, layer.self_attn.qkv_proj, layer.mlp.gate_up_proj)
    return (
        model.lm_head.weight.dtype == torch.bfloat16
        and all(type(product) is Linear for product in summed)
        and all(product.bias is None for product in products)
    )


@torch.inference_mode()
def fold_norms(model: Qwen3ForCausalLM) -> None:
    """Multiply the weights of each layer's two norms into the matrices behind them, in place.

    The norms keep weights of 1, so the model computes what it did, up to rounding; doing it again
    changes nothing.
    """
    for layer in model.model.layers:
        for norm, product in (
            (layer.input_layernorm, layer.self_attn.qkv_proj),
            (layer.post_attention_layernorm, layer.mlp.gate_up_proj),
        ):
            product.weight.mul_(norm.weight)
            norm.weight.fill_(1)


class FoldedForward(FusedForward):
    """As :class:`FusedForward`, of a model that :func:`can_fold`, whose norms it folds."""

    def __init__(self, model: Qwen3ForCausalLM, *, pdl: bool = False) -> None:
        super().__init__(model, pdl=pdl)
        fold_norms(model)

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: PagedKVCache,
        attend: AttendStored,
    ) -> torch.Tensor:
        kernels, decoder, pdl = self.kernels, self.model.model, self.pdl
        stream = decoder.embed_tokens(input_ids)
        for index, layer in enumerate(decoder.layers):
            mlp, eps = layer.mlp, layer.input_layernorm.eps
            q = self.queries(
                index, stream, positions, slot_mapping, cache, norm_of=stream, norm_eps=eps
            )
            stream.addmm_(attend(index, q).flatten(1), layer.self_attn.o_proj.weight.t())
            act = kernels.silu_and_mul(
                mlp.gate_up_proj(stream),
                norm_of=stream,
                norm_eps=layer.post_attention_layernorm.eps,
                pdl=pdl,
            )
            stream.addmm_(act, mlp.down_proj.weight.t())
        return kernels.rms_norm(stream, decoder.norm.weight, decoder.norm.eps, pdl=pdl)
