"""Chapter 2 against transformers, with weights copied by hand: the decoder, and Llama 3.2.

Nothing here needs the loader or ``config.json``, so each task is red for its own blank only.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import oracle_greedy, oracle_logits, random_prompt, relative_error
from helpers import tiny_llama as their_llama
from helpers import tiny_qwen3 as their_qwen3
from torch import nn
from transformers import PreTrainedModel

from chapters.chapter02_qwen3_model.toy import fill_by_hand
from minivllm.layers.rotary_embedding import RopeScaling
from minivllm.models.config import ModelConfig
from minivllm.models.generate import borrowed_attention, generate_by_recomputing
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.loader import checkpoint_sources
from minivllm.models.qwen3 import Qwen3ForCausalLM

# RoPE of the published Llama 3.2 models, in transformers' words and in ours.
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_SCALING = RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster without a second thread to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def copy_of(
    theirs: PreTrainedModel, kind: type[nn.Module], scaling: RopeScaling | None = None
) -> nn.Module:
    """Our model of the same sizes with the same weights."""
    known = theirs.config
    config = ModelConfig(
        architecture=kind.__name__,
        vocab_size=known.vocab_size,
        hidden_size=known.hidden_size,
        intermediate_size=known.intermediate_size,
        num_layers=known.num_hidden_layers,
        num_heads=known.num_attention_heads,
        num_kv_heads=known.num_key_value_heads,
        head_size=known.head_dim,
        max_positions=known.max_position_embeddings,
        rms_norm_eps=known.rms_norm_eps,
        rope_base=known.rope_parameters["rope_theta"],
        rope_scaling=scaling or RopeScaling(),
        tie_embeddings=known.tie_word_embeddings,
        attention_bias=known.attention_bias,
        mlp_bias=getattr(known, "mlp_bias", False),
        dtype=torch.float32,
        eos_token_ids=(),
    )
    return fill_by_hand(kind(config), theirs.state_dict())


@torch.inference_mode()
def logits_of(model: nn.Module, token_ids: list[int], positions: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one sequence."""
    attend = borrowed_attention(model.config.head_size**-0.5)
    return model.compute_logits(model(torch.tensor(token_ids), positions, attend))


PROMPT = random_prompt(24, seed=2)
POSITIONS = torch.arange(24)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, PreTrainedModel]:
    theirs = their_qwen3(seed=2, num_hidden_layers=3, attention_bias=True)
    return copy_of(theirs, Qwen3ForCausalLM), theirs


@torch.no_grad()
def through(model: PreTrainedModel, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states [T, E] that enter and leave one part of transformers' model."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        seen.extend((entering[0], (out[0] if isinstance(out, tuple) else out).reshape(24, -1)))

    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    model(torch.tensor([PROMPT]))
    handle.remove()
    return seen[0], seen[1]


@torch.inference_mode()
def test_attention_block(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    ours, theirs = pair
    x, expected = through(theirs, "model.layers.1.self_attn")
    attend = borrowed_attention(ours.config.head_size**-0.5)
    out = ours.model.layers[1].self_attn(x, POSITIONS, ours.model.rotary, attend)
    error = relative_error(out, expected)
    assert error < 1e-5, (
        f"off by {error:.2g} from transformers: project, split, norm the heads of q and k, turn "
        "them, attend, project back, in this order"
    )


@torch.inference_mode()
def test_decoder_layer_keeps_the_residual(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    ours, theirs = pair
    entering, expected = through(theirs, "model.layers.1")
    attend = borrowed_attention(ours.config.head_size**-0.5)
    part, rest = 0.25 * entering, 0.75 * entering
    layer, rotary = ours.model.layers[1], ours.model.rotary
    for what, x, before in (("None", entering, None), ("a residual", part, rest)):
        out, after = layer(x, before, POSITIONS, rotary, attend)
        error = relative_error(out + after, expected)
        assert error < 1e-5, f"given {what}, result + residual is off by {error:.2g}"
        # What is returned apart is the MLP's result: the next norm adds it.
        _, mlp = through(theirs, "model.layers.1.mlp")
        error = relative_error(out, mlp)
        assert error < 1e-5, f"given {what}, the first result, the MLP's, is off by {error:.2g}"


def test_decoder_equals_transformers(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    ours, theirs = pair
    error = relative_error(logits_of(ours, PROMPT, POSITIONS), oracle_logits(theirs, PROMPT))
    assert error < 1e-5, f"logits are off by {error:.2g} of the largest"


def test_only_distances_between_positions_count(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    ours, _ = pair
    logits = logits_of(ours, PROMPT, POSITIONS)
    error = relative_error(logits_of(ours, PROMPT, POSITIONS + 90), logits)
    assert error < 1e-4, f"all tokens moved by 90 positions change the logits by {error:.2g}"
    changed = relative_error(logits_of(ours, PROMPT, 0 * POSITIONS), logits)
    assert changed > 0.05, "all tokens at position 0 must not be the same as at 0, 1, 2, ..."


# ---------------------------------------------------------------------------- Llama 3.2


def assert_no_head_norms(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 4, 32, generator=generator), torch.randn(3, 2, 32, generator=generator)
    same_q, same_k = model.model.layers[0].self_attn.norm_heads(q, k)
    assert torch.equal(same_q, q) and torch.equal(same_k, k), "Llama leaves q and k as they are"


def test_llama_has_no_norms_on_heads() -> None:
    ours = copy_of(their_llama(seed=6), LlamaForCausalLM)
    assert_no_head_norms(ours)
    names = [source.name for source in checkpoint_sources(ours)]
    assert not [name for name in names if "q_norm" in name or "k_norm" in name]


def test_llama_3_2_equals_transformers_at_far_positions() -> None:
    """Tokens 300 positions apart, as far as 6,900: there the scaling of RoPE counts."""
    far = dict(head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5)
    theirs = their_llama(seed=6, rope_parameters=dict(LLAMA_ROPE), **far)
    ours = copy_of(theirs, LlamaForCausalLM, LLAMA_SCALING)
    assert_no_head_norms(ours)
    positions = 300 * POSITIONS
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT]), position_ids=positions[None]).logits[0]
    error = relative_error(logits_of(ours, PROMPT, positions), expected)
    assert error < 1e-4, f"logits at far positions are off by {error:.2g}"
    plain = copy_of(theirs, LlamaForCausalLM)
    error = relative_error(logits_of(plain, PROMPT, positions), expected)
    assert error > 1e-2, "without its RoPE scaling Llama 3.2 should be another model"


def test_llama_3_2_says_what_transformers_says() -> None:
    theirs = their_llama(seed=7, rope_parameters=dict(LLAMA_ROPE))
    ours = copy_of(theirs, LlamaForCausalLM, LLAMA_SCALING)
    assert_no_head_norms(ours)
    prompts = [random_prompt(1 + index % 9, seed=100 + index) for index in range(20)]
    expected = oracle_greedy(theirs, prompts, max_tokens=8)
    for prompt, answer in zip(prompts, expected, strict=True):
        assert list(generate_by_recomputing(ours, prompt, 8)) == answer, f"prompt {prompt}"


# hidden_size, num_hidden_layers, num_attention_heads, head_dim, parameters, as published.
LLAMA_SIZES = {
    "1B": (2048, 16, 32, 64, 1_235_814_400),
    "3B": (3072, 28, 24, 128, 3_212_749_824),
}


@pytest.mark.parametrize("size", LLAMA_SIZES)
def test_config_of_llama_3_2_as_published(size: str) -> None:
    hidden, layers, heads, head_dim, num_parameters = LLAMA_SIZES[size]
    rope = {key: value for key, value in LLAMA_ROPE.items() if key != "rope_theta"}
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": head_dim,
            "hidden_size": hidden,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": rope,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        }
    )
    assert (config.rope_scaling, config.rope_base) == (LLAMA_SCALING, 500000.0)
    assert (config.head_size, config.eos_token_ids) == (head_dim, (128001, 128008, 128009))
    model = LlamaForCausalLM(config, dtype=torch.bfloat16, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == num_parameters, f"Llama 3.2 {size} has {num_parameters:,} parameters"
