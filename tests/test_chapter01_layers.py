"""Chapter 1: every block of a decoder, against plain formulas in float64.

Nothing here needs a model, a checkpoint file or a GPU.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from minivllm.layers.activation import SiluAndMul, silu_and_mul
from minivllm.layers.checkpoint import LoadsItself, new_parameter
from minivllm.layers.embedding import Embedding, LMHead
from minivllm.layers.layernorm import RMSNorm, add_rms_norm, rms_norm
from minivllm.layers.linear import Linear, MergedLinear, QKVLinear
from minivllm.layers.rotary_embedding import (
    RopeScaling,
    RotaryEmbedding,
    apply_rope,
    attention_factor,
    inverse_frequencies,
)
from minivllm.layers.sampler import (
    Sampler,
    SamplingTensors,
    gumbel_noise,
    keep_min_p,
    keep_top_k_top_p,
    mix32,
    top_logprobs,
)

CPU = {"dtype": torch.float32, "device": "cpu"}
INF = float("inf")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster without a second thread to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(
    ours: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 1e-5
) -> None:
    assert ours.shape == expected.shape, (
        f"{what} has shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    )
    error = (ours.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-30)
    assert error <= tolerance * scale, (
        f"{what} is off by {error:.3g} where the largest value is {scale:.3g}"
    )


def fill(layer: nn.Module, prefix: str, checkpoint: dict[str, torch.Tensor]) -> None:
    """Fill a layer as the loader does, after poisoning it, and see that nothing was missed."""
    for parameter in layer.parameters():
        parameter.fill_(float("nan"))
    for source in layer.checkpoint_sources(prefix):
        assert source.name in checkpoint, (
            f"the layer at {prefix} asks for {source.name}; the checkpoint has {list(checkpoint)}"
        )
        tensor = checkpoint[source.name]
        assert tuple(source.shape) == tuple(tensor.shape), f"{source.name}: shape {source.shape}"
        source.target.copy_(tensor[source.index or ...])
    for name, parameter in layer.named_parameters():
        assert not parameter.isnan().any(), (
            f"{prefix}: after loading, part of {name} was never written; "
            "a source's target must be a view of the parameter, and the sources must cover it"
        )


# ---------------------------------------------------------------------------- activation


def test_silu_and_mul() -> None:
    x = randn(3, 5, 16)
    gate, up = x[..., :8].double(), x[..., 8:].double()
    expected = gate / (1 + torch.exp(-gate)) * up
    assert_close(silu_and_mul(x), expected, "silu_and_mul (gate is the first half, up the second)")
    half = silu_and_mul(x.bfloat16())
    assert half.dtype == torch.bfloat16, f"the dtype of x must be kept, not {half.dtype}"
    assert_close(half, expected, "silu_and_mul in bfloat16", 0.02)


def test_silu_and_mul_module() -> None:
    x = randn(4, 12)
    assert torch.equal(SiluAndMul()(x), silu_and_mul(x)), "SiluAndMul must call silu_and_mul"


# ---------------------------------------------------------------------------- layernorm


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


def test_rms_norm() -> None:
    x, weight = randn(3, 5, 32) * 7, randn(32, seed=1)
    expected = exact_rms_norm(x, weight, 1e-6)
    assert_close(rms_norm(x, weight, 1e-6), expected, "rms_norm over the last dimension")
    unit = rms_norm(x, torch.ones(32), 1e-6).square().mean(dim=-1)
    assert_close(unit, torch.ones(3, 5), "the mean square of a vector normed with weight 1")


def test_rms_norm_adds_eps_inside_the_root() -> None:
    tiny = torch.full((1, 4), 0.1)
    expected = exact_rms_norm(tiny, torch.ones(4), 0.03)
    assert_close(rms_norm(tiny, torch.ones(4), 0.03), expected, "rms_norm with eps=0.03")
    zeros = rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6)
    assert torch.equal(zeros, torch.zeros(1, 4)), "a vector of zeros must stay zeros, not NaN"


def test_rms_norm_computes_in_float32() -> None:
    # 300 squared is past the largest float16, 0.0001 squared is below the smallest.
    for size in (300.0, 1e-4):
        x = (randn(4, 64) * size).half()
        expected = exact_rms_norm(x, torch.ones(64), 1e-12)
        ours = rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-12)
        assert ours.dtype == torch.float16, f"the dtype of x must be kept, not {ours.dtype}"
        assert_close(ours, expected, f"rms_norm of float16 numbers around {size}", 2e-3)
    x, weight = randn(4, 512, dtype=torch.bfloat16), randn(512, seed=1, dtype=torch.bfloat16)
    assert_close(
        rms_norm(x, weight, 1e-6), exact_rms_norm(x, weight, 1e-6), "rms_norm in bfloat16", 2**-7
    )


def test_add_rms_norm() -> None:
    x, residual, weight = randn(6, 32), randn(6, 32, seed=1), randn(32, seed=2)
    x_before, residual_before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x_before + residual_before), "the second result is residual + x"
    expected = exact_rms_norm(x_before + residual_before, weight, 1e-6)
    assert_close(normed, expected, "the first result, the norm of residual + x,")
    assert torch.equal(x, x_before) and torch.equal(residual, residual_before), (
        "add_rms_norm must not change its arguments"
    )


def test_rms_norm_module() -> None:
    layer = RMSNorm(8, 0.01, **CPU)
    weight = randn(8)
    fill(layer, "model.norm", {"model.norm.weight": weight})
    x, residual = randn(3, 8, seed=1), randn(3, 8, seed=2)
    assert torch.equal(layer(x), rms_norm(x, weight, 0.01)), "RMSNorm.forward"
    for ours, expected in zip(
        layer.add(x, residual), add_rms_norm(x, residual, weight, 0.01), strict=True
    ):
        assert torch.equal(ours, expected), "RMSNorm.add"


# ---------------------------------------------------------------------------- linear


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    layer = Linear(6, 10, bias=bias, **CPU)
    checkpoint = {"o_proj.weight": randn(10, 6), "o_proj.bias": randn(10, seed=1)}
    fill(layer, "o_proj", checkpoint)
    x = randn(2, 5, 6, seed=2)
    expected = x.double() @ checkpoint["o_proj.weight"].double().T
    if bias:
        expected += checkpoint["o_proj.bias"].double()
    assert_close(layer(x), expected, "Linear: x @ weight.T" + " + bias" * bias)
    names = [source.name for source in layer.checkpoint_sources("o_proj")]
    assert names == ["o_proj.weight", "o_proj.bias"][: 1 + bias], f"sources are {names}"


@pytest.mark.parametrize("bias", [False, True])
def test_merged_linear_fills_itself_from_parts(bias: bool) -> None:
    sizes = {"gate_proj": 7, "up_proj": 4, "third_proj": 1}
    layer = MergedLinear(6, sizes, bias=bias, **CPU)
    checkpoint = {}
    for seed, (part, size) in enumerate(sizes.items()):
        checkpoint[f"layers.3.mlp.{part}.weight"] = randn(size, 6, seed=seed)
        if bias:
            checkpoint[f"layers.3.mlp.{part}.bias"] = randn(size, seed=10 + seed)
    fill(layer, "layers.3.mlp.gate_up_proj", checkpoint)
    x = randn(5, 6, seed=20)
    columns = []
    for part in sizes:
        column = x.double() @ checkpoint[f"layers.3.mlp.{part}.weight"].double().T
        columns.append(column + (checkpoint[f"layers.3.mlp.{part}.bias"].double() if bias else 0))
    expected = torch.cat(columns, dim=-1)
    assert_close(layer(x), expected, "MergedLinear: its parts side by side in the order given")


@pytest.mark.parametrize("bias", [False, True])
def test_qkv_linear(bias: bool) -> None:
    """3 query and 1 KV head of size 4 over vectors of 6: fused equals the three apart."""
    layer = QKVLinear(6, 3, 1, 4, bias=bias, **CPU)
    checkpoint = {}
    for seed, (part, size) in enumerate((("q", 12), ("k", 4), ("v", 4))):
        checkpoint[f"attn.{part}_proj.weight"] = randn(size, 6, seed=seed)
        if bias:
            checkpoint[f"attn.{part}_proj.bias"] = randn(size, seed=10 + seed)
    fill(layer, "attn.qkv_proj", checkpoint)
    x = randn(5, 6, seed=20)
    for part, heads, ours in zip("qkv", (3, 1, 1), layer.split(layer(x)), strict=True):
        expected = x.double() @ checkpoint[f"attn.{part}_proj.weight"].double().T
        if bias:
            expected += checkpoint[f"attn.{part}_proj.bias"].double()
        assert_close(ours, expected.view(5, heads, 4), f"{part} of the fused projection")


def test_qkv_split() -> None:
    """H = 4, G = 2, D = 3: 24 numbers a token, 12 for q, then 6 for k, then 6 for v."""
    layer = QKVLinear(5, 4, 2, 3, **CPU)
    qkv = torch.arange(2 * 24.0).view(2, 24)
    q, k, v = layer.split(qkv)
    assert (q.shape, k.shape, v.shape) == ((2, 4, 3), (2, 2, 3), (2, 2, 3)), (
        f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    )
    assert q[0].flatten().tolist() == list(range(12)), "q is the first H * D numbers of a token"
    assert k[0].flatten().tolist() == list(range(12, 18)), "k is the next G * D numbers"
    assert v[0].flatten().tolist() == list(range(18, 24)), "v is the last G * D numbers"
    assert q[1, 0, 0] == 24, "the second token's query is the second row"
    for name, part in (("q", q), ("k", k), ("v", v)):
        assert part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr(), (
            f"{name} must be a view of qkv, not a copy"
        )


# ---------------------------------------------------------------------------- embedding


def test_embedding() -> None:
    layer = Embedding(9, 4, **CPU)
    table = randn(9, 4)
    fill(layer, "embed_tokens", {"embed_tokens.weight": table})
    assert torch.equal(layer(torch.tensor([8, 0, 8])), table[[8, 0, 8]]), "row i is token i's"


def test_lm_head_of_its_own() -> None:
    layer = LMHead(9, 4, tied_to=None, **CPU)
    weight, hidden = randn(9, 4), randn(3, 4, seed=1)
    fill(layer, "lm_head", {"lm_head.weight": weight})
    assert_close(layer(hidden), hidden.double() @ weight.double().T, "logits = hidden @ weight.T")


def test_lm_head_tied_to_the_embedding() -> None:
    embedding = Embedding(9, 4, **CPU)
    head = LMHead(9, 4, tied_to=embedding, **CPU)
    assert list(head.checkpoint_sources("lm_head")) == [], "a tied head asks for no tensor"
    fill(embedding, "embed_tokens", {"embed_tokens.weight": randn(9, 4)})
    hidden = randn(3, 4, seed=1)
    expected = hidden.double() @ embedding.weight.double().T
    assert_close(head(hidden), expected, "a tied head scores with the embedding's table, which")
    assert head.weight.data_ptr() == embedding.weight.data_ptr(), "tied means one table, not two"


# ---------------------------------------------------------------------------- checkpoint


def test_new_parameter() -> None:
    parameter = new_parameter(3, 5, dtype=torch.bfloat16, device="cpu")
    assert isinstance(parameter, nn.Parameter) and not parameter.requires_grad
    assert (parameter.shape, parameter.dtype) == ((3, 5), torch.bfloat16)


def test_every_layer_with_parameters_loads_itself() -> None:
    layers = [
        RMSNorm(4, 1e-6, **CPU),
        Linear(4, 6, bias=True, **CPU),
        MergedLinear(4, {"a": 2, "b": 3}, bias=True, **CPU),
        QKVLinear(4, 2, 1, 4, bias=True, **CPU),
        Embedding(7, 4, **CPU),
        LMHead(7, 4, tied_to=None, **CPU),
    ]
    for layer in layers:
        kind = type(layer).__name__
        assert isinstance(layer, LoadsItself), f"{kind} lacks checkpoint_sources"
        asked = sum(math.prod(source.shape) for source in layer.checkpoint_sources("some.place"))
        held = sum(parameter.numel() for parameter in layer.parameters())
        assert asked == held, f"{kind} holds {held} numbers but asks the checkpoint for {asked}"


def test_layers_can_be_built_without_memory() -> None:
    """The loader first builds a model on "meta" to compare shapes."""
    layer = MergedLinear(4, {"a": 2, "b": 3}, bias=True, dtype=torch.bfloat16, device="meta")
    assert layer.weight.is_meta and layer.bias.is_meta
    rotary = RotaryEmbedding(8, 16, 10000.0, device="meta")
    assert rotary.table.is_meta
    assert not rotary.state_dict(), "the table of angles is computed, never part of a checkpoint"


# ---------------------------------------------------------------------------- rotary embedding


def test_inverse_frequencies() -> None:
    ours = inverse_frequencies(8, 10000.0, RopeScaling(), 128)
    assert_close(ours, torch.tensor([1.0, 0.1, 0.01, 0.001]), "base ** (-2 i / D), for D = 8,")
    assert ours.dtype == torch.float32


def test_rope_turns_pairs() -> None:
    """Two pairs, D = 4: (0, 2) is turned by 90 degrees, (1, 3) by 180."""
    cos = torch.tensor([[[0.0, -1.0]]])
    sin = torch.tensor([[[1.0, 0.0]]])
    x = torch.tensor([[[1.0, 2.0, 0.0, 5.0]]])
    ours = apply_rope(x, cos, sin)[0, 0].tolist()
    assert ours == [0.0, -2.0, 1.0, -5.0], (
        f"(1, 2, 0, 5) became {ours}: the pairs are (i, i + D/2), and a quarter turn takes "
        "(1, 0) to (0, 1)"
    )


def test_rope_is_multiplication_by_a_complex_number() -> None:
    x, angles = randn(6, 3, 16), randn(6, 1, 8, seed=1)
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double())
    turned = pairs * torch.polar(torch.ones(6, 1, 8).double(), angles.double())
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert_close(apply_rope(x, angles.cos(), angles.sin()), expected, "apply_rope")
    half = apply_rope(x.bfloat16(), angles.cos(), angles.sin())
    assert half.dtype == torch.bfloat16, f"the dtype of x must be kept, not {half.dtype}"
    assert_close(half, expected, "apply_rope in bfloat16", 0.01)


def test_rotary_embedding() -> None:
    rotary = RotaryEmbedding(8, 50, 100.0, device="cpu")
    positions = torch.tensor([7, 0, 49, 7])
    q, k = randn(4, 3, 8), randn(4, 1, 8, seed=1)
    angles = positions.double()[:, None] * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
    for name, x, ours in zip("qk", (q, k), rotary(positions, q, k), strict=True):
        pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
        turned = pairs * torch.polar(torch.ones(4, 1, 4).double(), angles[:, None])
        expected = torch.cat((turned.real, turned.imag), dim=-1)
        assert_close(ours, expected, f"{name} turned to its positions")


def test_rope_scores_depend_only_on_the_distance() -> None:
    rotary = RotaryEmbedding(32, 64, 10000.0, device="cpu")
    q, k = randn(1, 1, 32).expand(40, 1, 32), randn(1, 1, 32, seed=1).expand(40, 1, 32)
    turned_q, _ = rotary(torch.arange(40) + 11, q, k)
    _, turned_k = rotary(torch.arange(40), q, k)
    scores = (turned_q * turned_k).sum(dim=-1)
    assert_close(scores, scores[:1].expand(40, 1), "the score of tokens 11 apart, at any place,")


def transformers_rope(
    kind: str, head_size: int, base: float, max_positions: int, seq_len: int | None = None, **rope
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and attention factor as transformers computes them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * head_size,
        num_attention_heads=4,
        head_dim=head_size,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": kind, "rope_theta": base, **rope},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=seq_len)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_rope_scaling_linear(factor: float) -> None:
    ours = inverse_frequencies(64, 10000.0, RopeScaling("linear", factor), 4096)
    theirs, _ = transformers_rope("linear", 64, 10000.0, 4096, factor=factor)
    assert_close(ours, theirs, "linear scaling: every frequency divided by the factor", 1e-6)


@pytest.mark.parametrize("seq_len", [2048, 2049, 8192])
def test_rope_scaling_dynamic(seq_len: int) -> None:
    scaling = RopeScaling("dynamic", 2.0, original_max_positions=2048)
    ours = inverse_frequencies(64, 10000.0, scaling, seq_len)
    theirs, _ = transformers_rope("dynamic", 64, 10000.0, 2048, seq_len, factor=2.0)
    assert_close(ours / theirs, torch.ones(32), "dynamic scaling: ours / transformers'", 1e-5)
    assert ours[0] == 1.0, "the fastest pair keeps its frequency"


def test_rope_scaling_dynamic_leaves_short_contexts_alone() -> None:
    scaling = RopeScaling("dynamic", 2.0, original_max_positions=2048)
    ours = inverse_frequencies(64, 10000.0, scaling, 1024)
    assert torch.equal(ours, inverse_frequencies(64, 10000.0, RopeScaling(), 1024))


@pytest.mark.parametrize(
    ("head_size", "base", "original", "factor", "low", "high"),
    [(128, 500000.0, 8192, 8.0, 1.0, 4.0), (64, 10000.0, 256, 32.0, 1.5, 8.0)],
)
def test_rope_scaling_llama3(
    head_size: int, base: float, original: int, factor: float, low: float, high: float
) -> None:
    scaling = RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    ours = inverse_frequencies(head_size, base, scaling, original * 16)
    theirs, _ = transformers_rope(
        "llama3",
        head_size,
        base,
        original * 16,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    assert_close(ours / theirs, torch.ones(head_size // 2), "llama3: ours / transformers'", 1e-5)
    plain = inverse_frequencies(head_size, base, RopeScaling(), original)
    assert ours[0] == plain[0], "short waves are kept"
    assert_close(ours[-1] * factor, plain[-1], "the longest wave, stretched by the factor,")


YARN_CASES = [
    {"factor": 4.0},
    {"factor": 4.0, "truncate": False},
    {"factor": 16.0, "beta_fast": 24.0, "beta_slow": 2.0},
    {"factor": 8.0, "attention_factor": 1.25},
    {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
]


@pytest.mark.parametrize("rope", YARN_CASES)
@pytest.mark.parametrize(("head_size", "base"), [(128, 1000000.0), (64, 10000.0)])
def test_rope_scaling_yarn(head_size: int, base: float, rope: dict) -> None:
    ours = inverse_frequencies(
        head_size, base, RopeScaling("yarn", original_max_positions=4096, **rope), 65536
    )
    theirs, _ = transformers_rope(
        "yarn", head_size, base, 65536, original_max_position_embeddings=4096, **rope
    )
    assert_close(ours / theirs, torch.ones(head_size // 2), "yarn: ours / transformers'", 1e-5)


@pytest.mark.parametrize("rope", YARN_CASES)
def test_attention_factor(rope: dict) -> None:
    _, theirs = transformers_rope(
        "yarn", 64, 10000.0, 65536, original_max_position_embeddings=4096, **rope
    )
    ours = attention_factor(RopeScaling("yarn", original_max_positions=4096, **rope))
    assert ours == pytest.approx(theirs, rel=1e-12), "what yarn multiplies cos and sin by"
    assert attention_factor(RopeScaling("linear", 4.0)) == 1.0, "only yarn has such a factor"


def test_rotary_embedding_applies_scaling_and_attention_factor() -> None:
    scaling = RopeScaling("yarn", 4.0, 64, attention_factor=1.5)
    rotary = RotaryEmbedding(16, 256, 10000.0, scaling, device="cpu")
    positions = torch.tensor([0, 200])
    q, k = randn(2, 2, 16), randn(2, 1, 16, seed=1)
    angles = positions[:, None, None] * inverse_frequencies(16, 10000.0, scaling, 256)
    turned, _ = rotary(positions, q, k)
    expected = apply_rope(q, angles.cos() * 1.5, angles.sin() * 1.5)
    assert_close(
        turned, expected, "RotaryEmbedding with yarn: scaled angles, cos and sin times 1.5"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "longrope"}, "longrope.*not supported.*yarn"),
        ({"kind": "linear", "factor": 0.5}, "factor=0.5"),
        ({"kind": "linear", "factor": float("nan")}, "factor=nan"),
        ({"kind": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ({"kind": "llama3", "factor": 4.0}, "original_max_position_embeddings"),
    ],
)
def test_rope_scaling_refuses_what_it_cannot_do(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**settings)


# ---------------------------------------------------------------------------- sampler: the noise


def test_mix32() -> None:
    def murmur3_finaliser(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    numbers = [0, 1, 2, 12345, 2**31 - 1, 2**31, 0xDEADBEEF, 2**32 - 1]
    ours = mix32(torch.tensor(numbers)).tolist()
    assert ours == [murmur3_finaliser(number) for number in numbers]


def noise(seeds: list[int], steps: list[int], vocab_size: int) -> torch.Tensor:
    return gumbel_noise(torch.tensor(seeds), torch.tensor(steps), vocab_size)


def test_gumbel_noise_is_gumbel_distributed() -> None:
    """Mean 0.5772, variance pi^2 / 6, and the whole distribution exp(-exp(-x))."""
    values = noise(list(range(20)), [3] * 20, 10_000).double().flatten()
    assert values.isfinite().all(), "noise must be finite"
    assert values.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    expected = torch.exp(-torch.exp(-values.sort().values))
    observed = (torch.arange(len(values)) + 0.5) / len(values)
    # Kolmogorov and Smirnov: a right generator is over 1.95 / sqrt(n) once in a thousand seeds.
    assert (expected - observed).abs().max() < 1.95 / math.sqrt(len(values))


def test_gumbel_noise_is_finite_at_both_ends() -> None:
    # The hashes of these (seed, token) are 23 zeros and 23 ones in the bits that are used.
    for seed, token in ((149, 85144), (140, 11582)):
        value = noise([seed], [0], token + 1)[0, token]
        assert value.isfinite(), f"seed {seed}, step 0, token {token} gives {value.item()}"
        assert value < -2.8 or value > 16.6, "the seeds of this test no longer meet the ends"


def test_gumbel_noise_depends_only_on_seed_step_and_token() -> None:
    alone = noise([42], [7], 1000)
    among = noise([1, 42, -5], [0, 7, 7], 1000)
    assert torch.equal(alone[0], among[1]), "the noise of a row depends on the other rows"
    assert torch.equal(noise([42], [7], 300)[0], alone[0, :300]), "it depends on the vocabulary"


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("two steps of one seed", (9, 0), (9, 1)),
        ("steps far apart", (9, 0), (9, 4096)),
        ("two neighbouring seeds", (9, 5), (10, 5)),
        ("seed + 1 and step + 1", (9, 6), (10, 5)),
        ("seeds that differ above bit 32", (9, 5), (9 + 2**32, 5)),
        ("a seed and its negative", (9, 5), (-9, 5)),
        ("seed 0 and step 0 against step 1", (0, 0), (0, 1)),
    ],
)
def test_gumbel_noise_is_independent(
    what: str, first: tuple[int, int], second: tuple[int, int]
) -> None:
    n = 50_000
    a, b = noise([first[0], second[0]], [first[1], second[1]], n).double()
    for shift in (0, 1, 2, 64):
        pair = torch.stack((a[: n - shift], b[shift:]))
        correlation = torch.corrcoef(pair)[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(n), f"{what}, shifted by {shift}: {correlation:.4f}"
    for shift in (1, 2, 64):
        neighbours = torch.corrcoef(torch.stack((a[: n - shift], a[shift:])))[0, 1].item()
        assert abs(neighbours) < 4 / math.sqrt(n), f"tokens {shift} apart: {neighbours:.4f}"


# ---------------------------------------------------------------------------- sampler: the sets


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


def reference_set(
    logits: list[float], top_k: int | None = None, top_p: float | None = None, min_p: float = 0.0
) -> set[int]:
    """The tokens that may be drawn, one by one: min_p, then top_k, then top_p of what is left."""
    likeliest = max(logits)
    weight = {token: math.exp(logit - likeliest) for token, logit in enumerate(logits)}
    order = sorted((t for t in weight if weight[t] >= min_p), key=lambda t: -weight[t])
    order = order[:top_k]
    total, mass, chosen = sum(weight[t] for t in order), 0.0, set()
    for token in order:
        if chosen and top_p is not None and mass >= top_p:
            break
        chosen.add(token)
        mass += weight[token] / total
    return chosen


def assert_kept(ours: torch.Tensor, logits: torch.Tensor, expected: list[set[int]]) -> None:
    for row, (have, want) in enumerate(zip(kept(ours), expected, strict=True)):
        assert have == want, f"row {row} keeps {sorted(have)}, expected {sorted(want)}"
        rows = sorted(want)
        assert torch.equal(ours[row, rows], logits[row, rows]), "kept logits must not change"


def test_keep_min_p() -> None:
    logits = randn(5, 40) * 2
    min_p = torch.tensor([0.0, 0.05, 0.3, 0.9, 1.0])
    expected = [
        reference_set(row, min_p=p) for row, p in zip(logits.tolist(), min_p.tolist(), strict=True)
    ]
    assert len(expected[0]) == 40 and len(expected[4]) == 1
    assert_kept(keep_min_p(logits, min_p), logits, expected)


def test_keep_top_k() -> None:
    logits = randn(4, 40)
    top_k = torch.tensor([1, 7, 39, 40])
    expected = [
        reference_set(row, top_k=k) for row, k in zip(logits.tolist(), top_k.tolist(), strict=True)
    ]
    assert [len(tokens) for tokens in expected] == [1, 7, 39, 40]
    assert_kept(keep_top_k_top_p(logits, top_k, None), logits, expected)


def test_keep_top_k_counts_equal_logits_too() -> None:
    ours = keep_top_k_top_p(torch.zeros(1, 6), torch.tensor([2]), None)
    assert len(kept(ours)[0]) == 2, "top_k=2 of six equal logits must keep two"


def test_keep_top_p() -> None:
    logits = randn(6, 40) * 2
    top_p = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999, INF])
    expected = [
        reference_set(row, top_p=p) for row, p in zip(logits.tolist(), top_p.tolist(), strict=True)
    ]
    assert len(expected[0]) == 1, "the likeliest token is always kept"
    assert len(expected[-1]) == 40, "infinity keeps all"
    assert_kept(keep_top_k_top_p(logits, None, top_p), logits, expected)


def test_keep_top_p_is_the_smallest_set_that_reaches_the_mass() -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05: 0.6 needs two tokens, 0.79 two, 0.81 three."""
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log().expand(3, 4)
    ours = keep_top_k_top_p(logits, None, torch.tensor([0.6, 0.79, 0.81]))
    assert kept(ours) == [{1, 3}, {1, 3}, {1, 2, 3}], f"kept {kept(ours)}"
    # Four tokens of exactly a quarter: two of them reach one half, and 0 still leaves one.
    ours = keep_top_k_top_p(torch.zeros(2, 4), None, torch.tensor([0.5, 0.0]))
    assert [len(tokens) for tokens in kept(ours)] == [2, 1], f"kept {kept(ours)}"


def test_keep_top_k_then_top_p() -> None:
    """top_p counts the mass of what top_k left, not of the whole vocabulary."""
    logits = randn(6, 40) * 2
    top_k = torch.tensor([3, 3, 10, 40, 40, 1])
    top_p = torch.tensor([0.5, INF, 0.8, 0.8, INF, 0.5])
    expected = [
        reference_set(row, top_k=k, top_p=p)
        for row, k, p in zip(logits.tolist(), top_k.tolist(), top_p.tolist(), strict=True)
    ]
    assert_kept(keep_top_k_top_p(logits, top_k, top_p), logits, expected)


# ---------------------------------------------------------------------------- sampler: the draw


def parameters(count: int, **rows: list[float] | None) -> SamplingTensors:
    """Sampling parameters of ``count`` rows; what is not given is seed 0 and steps 0, 1, 2, ..."""
    dtypes = {"seed": torch.int64, "step": torch.int64, "top_k": torch.int64}
    given = {"temperature": [1.0] * count, "seed": [0] * count, "step": list(range(count)), **rows}
    return SamplingTensors(
        **{
            name: torch.tensor(values, dtype=dtypes.get(name, torch.float32))
            for name, values in given.items()
            if values is not None
        }
    )


def test_sampler_greedy() -> None:
    logits = randn(5, 50)
    expected = logits.argmax(dim=-1)
    ours = Sampler()(logits, SamplingTensors())
    assert torch.equal(ours, expected), "without any temperature every row is greedy"
    assert ours.dtype == torch.int64
    ours = Sampler()(logits, parameters(5, temperature=[0.0, 1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(ours[::2], expected[::2]), "temperature 0 is greedy, beside other rows too"


def test_sampler_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    for temperature in (None, [0.0]):
        ours = Sampler()(logits, parameters(1, temperature=temperature))
        assert ours.item() == logits.argmax().item(), "greedy must agree with argmax in a tie"


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


DRAWS = 20_000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vary", ["step", "seed"])
def test_sampler_follows_softmax_at_any_temperature(temperature: float, vary: str) -> None:
    """8 tokens, 20,000 draws: chi-square, 7 degrees of freedom, passes 29.9 once in 10,000."""
    logits = torch.tensor([1.5, -1.0, 0.3, 0.0, 2.0, -0.5, 1.0, 0.7])
    rows: dict[str, list[float]] = {"temperature": [temperature] * DRAWS}
    if vary == "seed":
        rows |= {"seed": list(range(DRAWS)), "step": [0] * DRAWS}
    tokens = Sampler()(logits.expand(DRAWS, 8), parameters(DRAWS, **rows))
    counts = tokens.bincount(minlength=8)
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    assert chi_square(counts, probabilities) < 29.9, (
        f"drew {counts.tolist()}, expected {(probabilities * DRAWS).round().tolist()}"
    )


@pytest.mark.parametrize(
    "limits", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 5, "top_p": 0.8}]
)
def test_sampler_draws_from_the_kept_set_alone(limits: dict[str, float]) -> None:
    logits = torch.tensor([1.5, -1.0, 0.3, 0.0, 2.0, -0.5, 1.0, 0.7])
    rows = {name: [value] * DRAWS for name, value in limits.items()}
    tokens = Sampler()(logits.expand(DRAWS, 8), parameters(DRAWS, **rows))
    chosen = sorted(reference_set(logits.tolist(), **limits))
    assert 1 < len(chosen) < 8
    counts = tokens.bincount(minlength=8)
    outside = [token for token in range(8) if counts[token] and token not in chosen]
    assert not outside, f"{limits}: drew {outside}, but only {chosen} are allowed"
    probabilities = logits[chosen].double().softmax(dim=-1)
    assert chi_square(counts[chosen], probabilities) < 29.9, f"{limits}: drew {counts.tolist()}"


def test_sampler_applies_temperature_before_the_limits() -> None:
    """At temperature 10 the likeliest of 8 has little mass, so top_p=0.5 keeps more of them."""
    logits = torch.tensor([1.5, -1.0, 0.3, 0.0, 2.0, -0.5, 1.0, 0.7])
    rows = {"temperature": [10.0] * DRAWS, "top_p": [0.5] * DRAWS}
    drawn = set(Sampler()(logits.expand(DRAWS, 8), parameters(DRAWS, **rows)).tolist())
    assert drawn == reference_set((logits / 10).tolist(), top_p=0.5), f"drew {sorted(drawn)}"


MIXED_ROWS = [
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.0, "seed": 6},
    {"temperature": 0.7, "seed": 7, "top_k": 4},
    {"temperature": 1.3, "seed": 8, "top_p": 0.6},
    {"temperature": 2.0, "seed": -9, "min_p": 0.2},
    {"temperature": 1.0, "seed": 2**40 + 5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
]


def test_sampler_same_seed_same_tokens_whatever_else_is_in_the_batch() -> None:
    logits = randn(len(MIXED_ROWS), 64) * 2
    unrestricted = {"top_k": 64, "top_p": INF, "min_p": 0.0}
    changed = 0
    for step in range(40):
        steps = [step + row for row in range(len(MIXED_ROWS))]
        fields = ["temperature", "seed", *unrestricted]
        columns = {
            name: [row.get(name, unrestricted.get(name)) for row in MIXED_ROWS] for name in fields
        }
        together = Sampler()(logits, parameters(len(MIXED_ROWS), step=steps, **columns)).tolist()
        for index, row in enumerate(MIXED_ROWS):
            own = {name: [value] for name, value in row.items()}
            alone = Sampler()(logits[index : index + 1], parameters(1, step=[steps[index]], **own))
            assert alone.item() == together[index], (
                f"step {step}: {row} draws {alone.item()} alone and {together[index]} in the batch"
            )
        changed += together != logits.argmax(dim=-1).tolist()
    assert changed > 20, "the test has no power: nothing but the likeliest token was ever drawn"


def test_sampler_takes_bfloat16_logits() -> None:
    logits = randn(400, 64, dtype=torch.bfloat16) * 2
    settings = parameters(400, temperature=[0.0, 0.7, 1.0, 1.3] * 100)
    changed = (Sampler()(logits, settings) != Sampler()(logits.float(), settings)).sum()
    assert changed == 0, f"{changed} of 400 draws change with the dtype: compute in float32"


@pytest.mark.gpu
def test_gumbel_noise_is_the_same_on_a_gpu() -> None:
    seeds, steps = torch.tensor([0, 5, -9, 2**40 + 5]), torch.tensor([0, 3, 100, 7])
    ours = gumbel_noise(seeds.to("cuda"), steps.to("cuda"), 10_000).cpu()
    # The hash is exact; only the logarithms may round differently.
    assert_close(ours, gumbel_noise(seeds, steps, 10_000), "noise from a GPU", 1e-5)


def test_top_logprobs() -> None:
    logits = randn(3, 20, dtype=torch.bfloat16) * 3
    order = logits.float().argsort(dim=-1, descending=True, stable=True)
    chosen = torch.stack((order[0, 0], order[1, 4], order[2, 19]))
    ids, logprobs, rank = top_logprobs(logits, chosen, 3)
    exact = logits.double() - logits.double().exp().sum(dim=-1, keepdim=True).log()
    assert torch.equal(ids[:, 0], chosen), "the first column is the chosen token"
    assert torch.equal(ids[:, 1:], order[:, :3]), "then the likeliest, in order"
    assert_close(logprobs, exact.gather(-1, ids), "log-probabilities")
    assert logprobs.dtype == torch.float32
    assert rank.tolist() == [1, 5, 20], f"the ranks of the chosen tokens are {rank.tolist()}"


def test_top_logprobs_of_a_small_vocabulary() -> None:
    ids, logprobs, _ = top_logprobs(randn(2, 3), torch.tensor([0, 1]), 10)
    assert ids.shape == logprobs.shape == (2, 4), "no more alternatives than there are tokens"
    ids, _, _ = top_logprobs(randn(2, 3), torch.tensor([0, 1]), 0)
    assert ids.tolist() == [[0], [1]], "count=0 gives the chosen token alone"
