"""Chapter 2: config, loader and model, against transformers on small random checkpoints.

Attention is borrowed from PyTorch here; nothing above ``minivllm.models`` is used.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    as_transformers_4,
    edit_json,
    oracle_greedy,
    oracle_logits,
    random_prompt,
    relative_error,
    save_checkpoint,
    tiny_llama,
    tiny_qwen3,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from minivllm.layers.rotary_embedding import RopeScaling
from minivllm.models.config import ModelConfig, read_json
from minivllm.models.generate import borrowed_attention, generate_by_recomputing
from minivllm.models.hub import EMBEDDED_MODEL, model_folder
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.loader import (
    Checkpoint,
    checkpoint_files,
    checkpoint_sources,
    load_model,
    model_class,
)
from minivllm.models.qwen3 import Qwen3ForCausalLM


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster without a second thread to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.inference_mode()
def our_logits(model: nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one sequence."""
    device = model.lm_head.weight.device
    input_ids = torch.tensor(token_ids, device=device)
    positions = torch.arange(len(token_ids), device=device)
    attend = borrowed_attention(model.config.head_size**-0.5)
    return model.compute_logits(model(input_ids, positions, attend))


# ---------------------------------------------------------------------------- config

# What stands in the config.json of the published dense models, written by transformers 4.51:
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, tied, parameters.
QWEN3_SIZES = {
    "0.6B": (1024, 3072, 28, 16, True, 596_049_920),
    "1.7B": (2048, 6144, 28, 16, True, 1_720_574_976),
    "4B": (2560, 9728, 36, 32, True, 4_022_468_096),
    "8B": (4096, 12288, 36, 32, False, 8_190_735_360),
    "14B": (5120, 17408, 40, 40, False, 14_768_307_200),
    "32B": (5120, 25600, 64, 64, False, 32_762_123_264),
}


def published_config(size: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, tied, _ = QWEN3_SIZES[size]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


@pytest.mark.parametrize("size", QWEN3_SIZES)
def test_config_of_every_dense_qwen3(size: str) -> None:
    hidden, intermediate, layers, heads, tied, num_parameters = QWEN3_SIZES[size]
    config = ModelConfig.from_hf(published_config(size))
    assert config == ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_size=128,
        max_positions=40960,
        rms_norm_eps=1e-6,
        rope_base=1e6,
        rope_scaling=RopeScaling(),
        tie_embeddings=tied,
        attention_bias=False,
        mlp_bias=False,
        dtype=torch.bfloat16,
        eos_token_ids=(151645,),
    )
    model = Qwen3ForCausalLM(config, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in model.parameters()) == num_parameters, (
        f"Qwen3-{size} has {num_parameters:,} parameters"
    )


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
        "truncate": False,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_config_of_transformers_4_and_5_mean_the_same(kind: str, tmp_path: Path) -> None:
    model = tiny_qwen3(rope_parameters=dict(ROPES[kind]), tie_word_embeddings=False)
    new = read_json(save_checkpoint(model.bfloat16(), tmp_path) / "config.json")
    old = as_transformers_4(new)
    assert "rope_theta" in old and "rope_parameters" not in old and "dtype" not in old
    config = ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old) == config, "transformers 4's keys must give the same model"
    assert config.rope_base == 5000.0
    assert config.dtype == torch.bfloat16, "dtype and torch_dtype name what was saved"
    assert config.rope_scaling.kind == kind
    keys = {"original_max_position_embeddings": "original_max_positions"}
    for key, value in ROPES[kind].items():
        if key not in ("rope_type", "rope_theta"):
            assert getattr(config.rope_scaling, keys.get(key, key)) == value, f"{key} was lost"


def test_config_takes_the_old_name_of_the_rope_type() -> None:
    config = published_config("0.6B")
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert ModelConfig.from_hf(config).rope_scaling == RopeScaling("linear", 2.0)


def test_config_yarn_without_an_original_length_takes_the_model_s_own() -> None:
    config = published_config("0.6B")
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0}
    assert ModelConfig.from_hf(config).rope_scaling.original_max_positions == 40960


def test_config_null_means_absent() -> None:
    config = published_config("0.6B")
    optional = (
        "head_dim",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "torch_dtype",
        "eos_token_id",
        "hidden_act",
        "use_sliding_window",
    )
    absent = {key: value for key, value in config.items() if key not in optional}
    null = {**config, **dict.fromkeys(optional)}
    assert ModelConfig.from_hf(null) == ModelConfig.from_hf(absent)
    assert ModelConfig.from_hf(absent).eos_token_ids == ()


def test_config_head_size_when_the_key_is_absent() -> None:
    """transformers' Qwen3 then takes 128, its Llama hidden_size / num_attention_heads."""
    config = {key: value for key, value in published_config("0.6B").items() if key != "head_dim"}
    assert ModelConfig.from_hf(config).head_size == 128
    assert ModelConfig.from_hf({**config, "architectures": ["LlamaForCausalLM"]}).head_size == 64


def test_config_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config("0.6B")))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (151645,)
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (151645, 151643), (
        "generation_config.json has the last word on the end tokens"
    )
    generation.write_text(json.dumps({"temperature": 0.6}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (151645,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.*not quantized"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn.*bfloat16"),
        ({"vocab_size": None}, "no 'vocab_size'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_key_value_heads": 5}, "num_heads=16.*num_kv_heads=5"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": 63}, "head_size=63.*even"),
        ({"hidden_size": "1024"}, "hidden_size='1024'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope.*not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "original_max_position"),
    ],
)
@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "LlamaForCausalLM"])
def test_config_refuses_what_this_package_cannot_run(
    architecture: str, change: dict[str, Any], message: str
) -> None:
    config = published_config("0.6B")
    if architecture.startswith("Llama"):
        del config["head_dim"]
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**config, "architectures": [architecture], **change})


# ---------------------------------------------------------------------------- where the files are


def test_model_folder(tmp_path: Path) -> None:
    assert model_folder(None) == EMBEDDED_MODEL, "no name means the embedded model"
    assert model_folder(tmp_path) == model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/no/where/at/all", "~/no-such", "nowhere", "a/b/c"])
def test_model_folder_that_does_not_exist(name: str) -> None:
    with pytest.raises(ValueError, match="no such folder") as caught:
        model_folder(name)
    assert repr(name) in str(caught.value)


def test_model_folder_of_a_hub_name_without_network() -> None:
    """One line that names the model and both remedies; conftest.py keeps the hub offline."""
    name = "nobody-at-all/no-such-model"
    with pytest.raises(ValueError, match=r"cache.*fetched.*network.*local folder") as caught:
        model_folder(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- loader


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedModel:
    return tiny_qwen3(tie_word_embeddings=False, attention_bias=True)


@pytest.fixture
def folder(qwen3: PreTrainedModel, tmp_path: Path) -> Path:
    """A checkpoint in one file, free to be damaged."""
    return save_checkpoint(qwen3, tmp_path / "model")


@pytest.fixture
def sharded(qwen3: PreTrainedModel, tmp_path: Path) -> Path:
    """The same checkpoint in many files."""
    return save_checkpoint(qwen3, tmp_path / "sharded", sharded=True)


def assert_holds(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    names = set()
    for source in checkpoint_sources(model):
        names.add(source.name)
        assert torch.equal(source.target, expected[source.name][source.index or ...]), source.name
    assert names == set(expected), f"never read: {sorted(set(expected) - names)}"


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_load_model(layout: str, qwen3: PreTrainedModel, request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(layout))
    assert isinstance(model, Qwen3ForCausalLM)
    assert_holds(model, qwen3.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_load_model_fuses_q_k_v_and_gate_up(folder: Path, qwen3: PreTrainedModel) -> None:
    layer, theirs = load_model(folder).model.layers[1], qwen3.model.layers[1]
    heads = theirs.self_attn
    for name in ("weight", "bias"):
        parts = [getattr(part, name) for part in (heads.q_proj, heads.k_proj, heads.v_proj)]
        fused = getattr(layer.self_attn.qkv_proj, name)
        assert torch.equal(fused, torch.cat(parts)), f"qkv_proj.{name} is q, then k, then v"
    fused = layer.mlp.gate_up_proj.weight
    parts = [theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight]
    assert torch.equal(fused, torch.cat(parts)), "gate_up_proj is gate, then up"


def test_load_model_in_the_dtype_of_the_checkpoint_or_another(tmp_path: Path) -> None:
    saved = tiny_qwen3().bfloat16()
    folder = save_checkpoint(saved, tmp_path)
    theirs = {name: t for name, t in saved.state_dict().items() if name != "lm_head.weight"}
    model = load_model(folder)
    assert model.lm_head.weight.dtype == torch.bfloat16, "the checkpoint's own dtype by default"
    assert_holds(model, theirs)
    wide = load_model(folder, dtype=torch.float32)
    assert wide.lm_head.weight.dtype == torch.float32
    assert_holds(wide, {name: tensor.float() for name, tensor in theirs.items()})


def test_load_model_that_is_tied(tmp_path: Path) -> None:
    theirs = tiny_qwen3(tie_word_embeddings=True)
    folder = save_checkpoint(theirs, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert torch.equal(load_model(folder).lm_head.weight, theirs.model.embed_tokens.weight)
    # Some checkpoints carry the head once more, and some the tables of an old RoPE.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(weights, folder / "model.safetensors")
    load_model(folder)


def test_model_class() -> None:
    assert model_class("Qwen3ForCausalLM") is Qwen3ForCausalLM
    assert model_class("LlamaForCausalLM") is LlamaForCausalLM
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*Qwen3ForCausalLM, LlamaForCausalLM"):
        model_class("MambaForCausalLM")


def test_checkpoint_files(folder: Path, sharded: Path) -> None:
    assert checkpoint_files(folder) == [folder / "model.safetensors"]
    assert checkpoint_files(sharded) == sorted(sharded.glob("model-*.safetensors"))


def test_loader_says_which_folder_or_file_is_missing(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/config\.json does not exist"):
        load_model(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model has no model\.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, which must be converted"):
        load_model(folder)


@pytest.mark.parametrize("content", ['{"hidden_size": 4', "", "[1, 2]", "\ufeff{}", "b\x00"])
def test_loader_says_that_a_config_is_damaged(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|holds a list)"):
        load_model(folder)


def test_loader_says_that_a_config_is_no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(folder)


def test_loader_refuses_an_unsupported_architecture(folder: Path) -> None:
    edit_json(
        folder / "config.json", lambda config: {**config, "architectures": ["Qwen3MoeForCausalLM"]}
    )
    with pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM.*not supported.*Qwen3ForCausalLM"):
        load_model(folder)
    edit_json(folder / "config.json", lambda config: {**config, "architectures": None})
    with pytest.raises(ValueError, match="none named"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_loader_says_which_weights_are_truncated(sharded: Path, keep: int) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{victim.name} is not a readable safetensors file"):
        load_model(sharded)


def test_loader_refuses_weights_that_are_no_safetensors(folder: Path) -> None:
    torch.save({"weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load_model(folder)


def test_loader_names_the_files_that_an_index_promises(sharded: Path) -> None:
    victims = sorted(sharded.glob("*.safetensors"))[1:3]
    for victim in victims:
        victim.unlink()
    with pytest.raises(ValueError, match="not there") as caught:
        load_model(sharded)
    assert all(victim.name in str(caught.value) for victim in victims), str(caught.value)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', "not JSON"])
def test_loader_refuses_a_damaged_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_model(sharded)


def test_loader_names_every_tensor_that_does_not_fit(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    missing = ["model.norm.weight", "model.layers.1.self_attn.k_proj.bias"]
    for name in missing:
        del weights[name]
    weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(112, 48)
    weights["vision.tower.weight"] = torch.ones(1)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.ones(112, 48)
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(31)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    message = str(caught.value)
    for problem in (
        "missing: model.layers.1.self_attn.k_proj.bias, model.norm.weight",
        "left over: model.layers.2.mlp.up_proj.weight, vision.tower.weight",
        "model.layers.0.mlp.down_proj.weight is [112, 48], the config asks for [48, 112]",
        "model.layers.0.self_attn.q_norm.weight is [31], the config asks for [32]",
    ):
        assert problem in message, f"the error does not say {problem!r}: {message}"
    assert message.count("weight") + message.count("bias") == 6, f"it names too many: {message}"


@pytest.mark.parametrize(
    "dtype, header", [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_loader_refuses_weights_that_are_no_floating_point_numbers(
    sharded: Path, dtype: torch.dtype, header: str
) -> None:
    """Of a quantised checkpoint, say, whose config does not tell."""
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    weights = load_file(victim)
    name = next(iter(weights))
    weights[name] = torch.zeros(weights[name].shape, dtype=dtype)
    # Before all else: the scales beside them would only be said to be left over.
    weights["scale"] = torch.ones(1)
    save_file(weights, victim)
    expected = rf"{re.escape(name)} in .*{victim.name} has dtype {header}, .*use a checkpoint in bf"
    with pytest.raises(ValueError, match=expected):
        load_model(sharded)
    weights |= {other: torch.zeros(weights[other].shape, dtype=dtype) for other in weights}
    save_file(weights, victim)
    with pytest.raises(ValueError, match=rf"{len(weights) - 2} more tensors are like that"):
        load_model(sharded)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_loader_names_the_weights_that_are_not_finite(folder: Path, bad: float) -> None:
    weights = load_file(folder / "model.safetensors")
    names = ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
    for name in names:
        weights[name].view(-1)[-1] = bad
    # In one tensor, both infinities must not cancel out.
    weights["model.norm.weight"][0] = -bad
    save_file(weights, folder / "model.safetensors")
    listed = ", ".join(rf"{re.escape(name)} \(model.safetensors\)" for name in names)
    with pytest.raises(ValueError, match=f"NaN or infinity in the weights of .*: {listed}; fetch"):
        load_model(folder)


def test_loader_takes_large_numbers_unless_the_dtype_cannot_hold_them(folder: Path) -> None:
    """Whose sum is infinite, which alone does not say that one of them is."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors")
    assert load_model(folder).model.norm.weight.sum().isinf()
    with pytest.raises(ValueError, match=r"NaN or infinity.*model\.norm\.weight.*dtype bfloat16"):
        load_model(folder, dtype=torch.float16)


def test_loader_compares_before_it_takes_memory(folder: Path) -> None:
    """The config asks for a model of many terabytes: that must be a clear error, not a crash."""
    edit_json(folder / "config.json", lambda config: {**config, "intermediate_size": 10**12})
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight is \[112, 48\]"):
        load_model(folder)


def test_checkpoint_is_closed_again(folder: Path) -> None:
    """A refused checkpoint can be replaced and loaded at once."""
    good = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    (folder / "model.safetensors").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError), Checkpoint(folder):
        pass
    (folder / "model.safetensors").write_bytes(good)
    with Checkpoint(folder) as checkpoint:
        checkpoint.check_fit(model)


# ---------------------------------------------------------------------------- the model

QWEN3_SHAPES = {
    "tied": {},
    "untied, no groups, head size 64": {
        "tie_word_embeddings": False,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "biases, one KV head, head size 128": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "num_key_value_heads": 1,
        "head_dim": 128,
    },
    "tied with biases, head size 96, large eps": {
        "attention_bias": True,
        "num_attention_heads": 6,
        "head_dim": 96,
        "rms_norm_eps": 1e-2,
    },
    "four layers, head size 80, base 1e6": {
        "num_hidden_layers": 4,
        "head_dim": 80,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "yarn": {"rope_parameters": ROPES["yarn"]},
    "linear": {"rope_parameters": ROPES["linear"]},
}
LLAMA_SHAPES = {
    "llama3 scaling": {"rope_parameters": ROPES["llama3"]},
    "no head_dim, biases in attention and MLP": {
        "head_dim": None,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "head size 64, dynamic": {"head_dim": 64, "rope_parameters": ROPES["dynamic"]},
}


def assert_same_logits(theirs: PreTrainedModel, folder: Path, **layout: Any) -> None:
    ours = load_model(save_checkpoint(theirs, folder, **layout))
    for length in (1, 17, 90):
        prompt = random_prompt(length, seed=length)
        error = relative_error(our_logits(ours, prompt), oracle_logits(theirs, prompt))
        assert error < 1e-5, f"logits of {length} tokens are off by {error:.2g} of the largest"


@pytest.mark.parametrize("style", [4, 5])
@pytest.mark.parametrize("shape", QWEN3_SHAPES)
def test_qwen3_logits_equal_transformers(shape: str, style: int, tmp_path: Path) -> None:
    theirs = tiny_qwen3(seed=3, **QWEN3_SHAPES[shape])
    assert_same_logits(theirs, tmp_path, style=style, sharded=style == 4)


@pytest.mark.parametrize("shape", LLAMA_SHAPES)
def test_llama_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    assert_same_logits(tiny_llama(seed=4, **LLAMA_SHAPES[shape]), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", QWEN3_SHAPES)
def test_qwen3_logits_on_a_gpu_equal_transformers_on_the_cpu(shape: str, tmp_path: Path) -> None:
    theirs = tiny_qwen3(seed=3, **QWEN3_SHAPES[shape])
    ours = load_model(save_checkpoint(theirs, tmp_path), device="cuda")
    prompt = random_prompt(90, seed=90)
    error = relative_error(our_logits(ours, prompt).cpu(), oracle_logits(theirs, prompt))
    assert error < 1e-5, f"logits are off by {error:.2g} of the largest"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_as_good_as_transformers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Both are compared with float32 over the same rounded weights."""
    theirs = tiny_qwen3(seed=5).to(dtype)
    ours = load_model(save_checkpoint(theirs, tmp_path))
    prompt = random_prompt(60, seed=5)
    half = oracle_logits(theirs, prompt)
    exact = oracle_logits(theirs.float(), prompt)
    logits = our_logits(ours, prompt)
    assert logits.dtype == dtype
    our_error = (logits.float() - exact).norm() / exact.norm()
    their_error = (half.float() - exact).norm() / exact.norm()
    assert our_error < 1.25 * their_error, (
        f"ours are off by {our_error:.2g}, transformers' by {their_error:.2g}"
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, PreTrainedModel]:
    """One checkpoint in our model and in transformers'."""
    theirs = tiny_qwen3(seed=1, num_hidden_layers=3)
    return load_model(save_checkpoint(theirs, tmp_path_factory.mktemp("pair"))), theirs


@torch.no_grad()
def what_goes_through(
    model: PreTrainedModel, path: str, token_ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states [T, E] that enter and leave one part of transformers' model."""
    seen = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        seen.extend((entering, out[0] if isinstance(out, tuple) else out))

    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    model(torch.tensor([token_ids]))
    handle.remove()
    return seen[0].squeeze(0), seen[1].squeeze(0)


PROMPT = random_prompt(30, seed=8)


@torch.inference_mode()
def test_qwen3_mlp(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    ours, theirs = pair
    x, expected = what_goes_through(theirs, "model.layers.1.mlp", PROMPT)
    error = relative_error(ours.model.layers[1].mlp(x), expected)
    assert error < 1e-5, f"Qwen3MLP, down(silu(gate) * up), is off by {error:.2g}"


@torch.inference_mode()
def test_qwen3_attention(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    ours, theirs = pair
    x, expected = what_goes_through(theirs, "model.layers.1.self_attn", PROMPT)
    attend = borrowed_attention(ours.config.head_size**-0.5)
    attention, rotary = ours.model.layers[1].self_attn, ours.model.rotary
    error = relative_error(attention(x, torch.arange(30), rotary, attend), expected)
    assert error < 1e-5, (
        f"Qwen3Attention is off by {error:.2g}: project, split, norm the heads of q and k, turn "
        "them, attend, project back"
    )


@torch.inference_mode()
def test_qwen3_decoder_layer(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    ours, theirs = pair
    x, expected = what_goes_through(theirs, "model.layers.1", PROMPT)
    attend = borrowed_attention(ours.config.head_size**-0.5)
    layer, rotary = ours.model.layers[1], ours.model.rotary
    half = 0.25 * x
    for what, entering, residual in (("no residual yet", x, None), ("a residual", half, x - half)):
        out, after = layer(entering, residual, torch.arange(30), rotary, attend)
        error = relative_error(out + after, expected)
        assert error < 1e-5, f"Qwen3DecoderLayer given {what} is off by {error:.2g}"


@torch.inference_mode()
def test_qwen3_model(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    ours, theirs = pair
    _, expected = what_goes_through(theirs, "model.norm", PROMPT)
    attend = borrowed_attention(ours.config.head_size**-0.5)
    hidden = ours(torch.tensor(PROMPT), torch.arange(30), attend)
    error = relative_error(hidden, expected)
    assert error < 1e-5, f"the hidden states after the last norm are off by {error:.2g}"


@torch.inference_mode()
def test_model_asks_attend_once_a_layer(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    """The model leaves attention to whoever calls it, and passes layer, q, k and v."""
    ours, _ = pair
    calls = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return torch.zeros_like(q)

    ours(torch.tensor(PROMPT), torch.arange(30), attend)
    expected = [(layer, (30, 4, 32), (30, 2, 32), (30, 2, 32)) for layer in range(3)]
    assert calls == expected, f"attend was called with {calls}"


# ---------------------------------------------------------------------------- generation


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_borrowed_attention(num_heads: int, num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, num_heads, 8, generator=generator)
    k, v = torch.randn(2, 6, num_kv_heads, 8, generator=generator)
    ours = borrowed_attention(0.3)(0, q, k, v)
    assert ours.shape == q.shape, f"the output has shape {tuple(ours.shape)}, expected [T, H, D]"
    for head in range(num_heads):
        shared = head * num_kv_heads // num_heads
        for token in range(6):
            scores = k[: token + 1, shared].double() @ q[token, head].double() * 0.3
            expected = scores.softmax(dim=0) @ v[: token + 1, shared].double()
            assert torch.allclose(ours[token, head].double(), expected, atol=1e-5), (
                f"query head {head} of token {token} must see tokens 0 to {token} of KV head "
                f"{shared}"
            )


def test_greedy_tokens_equal_transformers_for_100_prompts(
    pair: tuple[nn.Module, PreTrainedModel],
) -> None:
    ours, theirs = pair
    prompts = [random_prompt(1 + index % 12, seed=index) for index in range(100)]
    expected = oracle_greedy(theirs, prompts, max_tokens=8)
    for prompt, answer in zip(prompts, expected, strict=True):
        tokens = list(generate_by_recomputing(ours, prompt, 8))
        assert tokens == answer, f"prompt {prompt}"
    assert len({tuple(answer) for answer in expected}) > 80, "the oracle answers all alike"


def test_generation_stops_at_an_end_token(tmp_path: Path) -> None:
    theirs = tiny_qwen3(seed=1)
    prompt = random_prompt(7, seed=3)
    folder = save_checkpoint(theirs, tmp_path)
    free = list(generate_by_recomputing(load_model(folder), prompt, 12))
    assert len(free) == 12, "without end tokens, generation runs to max_tokens"
    stop = free[5]
    first = free.index(stop)
    edit_json(folder / "config.json", lambda config: {**config, "eos_token_id": [stop, 159]})
    tokens = list(generate_by_recomputing(load_model(folder), prompt, 12))
    assert tokens == free[: first + 1], "the end token is the last token that is yielded"
    assert tokens == oracle_greedy(theirs, [prompt], 12, eos_token_id=stop, pad_token_id=0)[0]


def test_generation_of_nothing(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    assert list(generate_by_recomputing(pair[0], [1, 2], 0)) == []
    with pytest.raises(ValueError, match="prompt_token_ids is empty"):
        list(generate_by_recomputing(pair[0], [], 4))
