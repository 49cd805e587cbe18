"""The fused forward passes against the plain model; attention is a stand-in, the same for all."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from minivllm.attention.paged import PagedKVCache, store_kv
from minivllm.engine import fused_kernels
from minivllm.engine.folded_forward import FoldedForward, can_fold, fold_norms
from minivllm.engine.fused_forward import FusedForward
from minivllm.layers.activation import silu_and_mul
from minivllm.layers.rotary_embedding import RopeScaling
from minivllm.models.config import ModelConfig
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.qwen3 import Qwen3ForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, BLOCK_SIZE = 3, 16


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "architecture": "Qwen3ForCausalLM",
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_size": 8,
            "max_positions": 64,
            "rms_norm_eps": 1e-3,
            "rope_base": 1e4,
            "rope_scaling": RopeScaling(),
            "tie_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": torch.float32,
            "eos_token_ids": (),
            **changes,
        }
    )


def random_model(
    kind: type[Qwen3ForCausalLM], config: ModelConfig, dtype: torch.dtype = torch.float32
) -> Qwen3ForCausalLM:
    model = kind(config, dtype=dtype, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        values = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.5 * values if weight.dim() == 1 else values * weight.shape[1] ** -0.5)
    return model


def mix(q: torch.Tensor) -> torch.Tensor:
    """What stands in for attention: its result depends on the queries of all heads."""
    return q.flip(1) * 0.5 + q.roll(1, dims=2)


def run_both(
    forward: FusedForward, plain: Qwen3ForCausalLM
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states, keys and values: ours, and those of the plain model."""
    config = plain.config
    ids = torch.tensor([7, 0, 49], device=DEVICE)
    positions = torch.tensor([3, 63, 11], device=DEVICE)
    slots = torch.tensor([17, 4, 40], device=DEVICE)
    dtype = plain.lm_head.weight.dtype
    caches = [PagedKVCache(config, 3, BLOCK_SIZE, dtype=dtype, device=DEVICE) for _ in range(2)]
    for cache in caches:
        cache.k.zero_()
        cache.v.zero_()

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        store_kv(k, v, caches[1].k[layer], caches[1].v[layer], slots)
        return mix(q)

    ours = forward(ids, positions, slots, caches[0], lambda _, q: mix(q))
    expected = plain(ids, positions, attend)
    return [ours, caches[0].k, caches[0].v], [expected, caches[1].k, caches[1].v]


@pytest.mark.parametrize("kind", [Qwen3ForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("form", [FusedForward, FoldedForward])
def test_forward_is_the_plain_models(
    form: type[FusedForward], kind: type[Qwen3ForCausalLM]
) -> None:
    config = tiny_config()
    plain = random_model(kind, config)
    forward = form(random_model(kind, config))
    for ours, expected in zip(*run_both(forward, plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_folded_model_computes_what_it_did() -> None:
    plain, folded = (random_model(Qwen3ForCausalLM, tiny_config()) for _ in range(2))
    fold_norms(folded)
    weights = [weight.clone() for weight in folded.parameters()]
    assert not torch.equal(weights[1], list(plain.parameters())[1])
    assert all((layer.input_layernorm.weight == 1).all() for layer in folded.model.layers)
    ids = torch.arange(TOKENS, device=DEVICE)
    attend = lambda _, q, k, v: mix(q)  # noqa: E731
    torch.testing.assert_close(
        folded(ids, ids, attend), plain(ids, ids, attend), rtol=1e-4, atol=1e-5
    )
    fold_norms(folded)
    assert all(map(torch.equal, folded.parameters(), weights)), "folded twice"


def test_what_can_be_folded() -> None:
    wide = {"dtype": torch.bfloat16}
    assert can_fold(random_model(Qwen3ForCausalLM, tiny_config(), **wide))
    # The stream itself is multiplied: too large for float16, and another rounding for float32.
    assert not can_fold(random_model(Qwen3ForCausalLM, tiny_config(), torch.float16))
    assert not can_fold(random_model(Qwen3ForCausalLM, tiny_config()))
    # A bias must not be divided by the rows' scale.
    for bias in ("attention_bias", "mlp_bias"):
        assert not can_fold(random_model(LlamaForCausalLM, tiny_config(**{bias: True}), **wide))


def test_a_product_of_rows_that_were_not_normalised() -> None:
    """silu_and_mul divides each row by the root mean square of its row of the stream."""
    x = torch.randn(3, 20, device=DEVICE)
    stream = torch.randn(3, 13, device=DEVICE) * 4
    scale = (stream.square().mean(dim=1, keepdim=True) + 0.25).rsqrt()
    ours = fused_kernels.silu_and_mul(x, norm_of=stream, norm_eps=0.25)
    torch.testing.assert_close(ours, silu_and_mul(x * scale))
    with pytest.raises(ValueError, match=r"norm_of is .*\(2, 13\); beside 3 rows"):
        fused_kernels.silu_and_mul(x, norm_of=stream[:2])
    with pytest.raises(ValueError, match=r"contiguous"):
        fused_kernels.silu_and_mul(x, norm_of=stream[:, ::2])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 100, 5000])
def test_folded_bfloat16_is_no_coarser_than_the_plain_model(tokens: int) -> None:
    """Both against float32: folding rounds elsewhere, but no more."""
    config = tiny_config(
        hidden_size=1024, intermediate_size=3072, num_heads=16, num_kv_heads=8, head_size=128
    )
    exact = random_model(Qwen3ForCausalLM, config)
    for weight in exact.parameters():
        weight.copy_(weight.bfloat16())
    plain = Qwen3ForCausalLM(config, dtype=torch.bfloat16, device=DEVICE)
    plain.load_state_dict(exact.state_dict())
    folded = Qwen3ForCausalLM(config, dtype=torch.bfloat16, device=DEVICE)
    folded.load_state_dict(exact.state_dict())
    forward = FoldedForward(folded, pdl=torch.cuda.get_device_capability() >= (9, 0))
    ids = torch.randint(50, (tokens,), device=DEVICE)
    positions = torch.randint(64, (tokens,), device=DEVICE)
    slots = torch.arange(tokens, device=DEVICE)
    blocks = -(-tokens // BLOCK_SIZE)
    cache = PagedKVCache(config, blocks, BLOCK_SIZE, dtype=torch.bfloat16, device=DEVICE)
    ours = forward(ids, positions, slots, cache, lambda _, q: mix(q))
    attend = lambda _, q, k, v: mix(q)  # noqa: E731
    expected = exact(ids, positions, attend)

    def error(hidden: torch.Tensor) -> float:
        return float((hidden.float() - expected).norm() / expected.norm())

    assert error(ours) <= 1.25 * error(plain(ids, positions, attend))
