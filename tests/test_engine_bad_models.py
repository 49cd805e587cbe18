"""Models that will not do: a ValueError that names the file, what is wrong, and the remedy.

What concerns config.json and the weights themselves is tested with chapter 2; here they only must
reach the user through ``LLM`` as they are.
"""

from pathlib import Path
from typing import Any

import pytest
from engine_helpers import make_checkpoint, one_thread, refuses
from helpers import edit_json

from minivllm import LLM

threads = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def test_no_such_folder(tmp_path):
    refuses("model='.*nowhere': no such folder", LLM, tmp_path / "nowhere")


def test_a_hub_name_without_a_network(monkeypatch):
    """The one-line answer to a name that is neither in the cache nor can be fetched."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuses(
        "model='nobody/no-such-model' is neither in the local cache nor can it be fetched",
        *(LLM, "nobody/no-such-model"),
    )


def with_layers(config: dict[str, Any], count: int) -> dict[str, Any]:
    return {**config, "num_hidden_layers": count, "layer_types": ["full_attention"] * count}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-100]
            ),
            "not a readable safetensors file .*truncated",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"pickle" * 100),
            "not a readable safetensors file",
        ),
        (
            lambda f: edit_json(f / "config.json", lambda c: with_layers(c, 3)),
            "missing: model.layers.2.input_layernorm.weight",
        ),
        (
            lambda f: edit_json(f / "config.json", lambda c: with_layers(c, 1)),
            "left over: model.layers.1.input_layernorm.weight",
        ),
        (
            lambda f: edit_json(f / "config.json", lambda c: {**c, "intermediate_size": 96}),
            r"wrong shape: .*mlp.down_proj.weight is \[48, 112\], the config asks for \[48, 96\]",
        ),
        (
            lambda f: edit_json(f / "config.json", lambda c: {**c, "architectures": ["GPT2"]}),
            "architecture 'GPT2' is not supported; this package runs Qwen3ForCausalLM",
        ),
        (
            lambda f: edit_json(f / "config.json", lambda c: {**c, "architectures": "Qwen3"}),
            "config.json: architectures='Qwen3' must be a list of class names",
        ),
        (
            lambda f: edit_json(f / "config.json", lambda c: {**c, "rope_parameters": [1]}),
            r"config.json: rope_parameters=\[1\] must be a JSON object",
        ),
        (
            lambda f: edit_json(
                f / "config.json", lambda c: {**c, "rope_parameters": {"rope_theta": "1e6"}}
            ),
            "config.json: rope_theta='1e6' must be a number",
        ),
        (
            lambda f: edit_json(f / "config.json", lambda c: {**c, "tie_word_embeddings": 1}),
            "config.json: tie_word_embeddings=1 must be true or false",
        ),
        (
            lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["end"]}'),
            r"generation_config.json: eos_token_id=\['end'\] must be a token id or a list",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
            "index.json: weight_map must give each tensor's file",
        ),
        (
            lambda f: (f / "tokenizer.json").write_text("{}"),
            "no tokenizer that transformers can read.*skip_tokenizer_init=True",
        ),
    ],
    ids=[
        "no weights",
        "no config",
        "truncated",
        "not safetensors",
        "missing",
        "left over",
        "wrong shape",
        "architecture",
        "architecture as text",
        "rope as a list",
        "rope base as text",
        "a number for a boolean",
        "end token as text",
        "index without files",
        "tokenizer",
    ],
)
def test_damaged_models(folder, tmp_path, damage, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    refuses(message, LLM, tmp_path, num_kv_blocks=4)


# ---------------------------------------------------------------------------- tokenizers


def test_a_folder_without_a_tokenizer(tmp_path):
    """Of which transformers would make a tokenizer of a single token."""
    bare = make_checkpoint(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    (bare / "tokenizer_config.json").write_text("{}")
    refuses(r"has no tokenizer: .*tokenizer=\.\.\., or set skip_tokenizer_init", LLM, bare)
    LLM(bare, skip_tokenizer_init=True, num_kv_blocks=2).shutdown()


def test_a_tokenizer_that_is_not_there(folder):
    refuses("tokenizer='/nowhere': no such folder", LLM, folder, tokenizer="/nowhere")
