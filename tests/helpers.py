"""Small random checkpoints, written by transformers, for tests that compare with it.

This module knows nothing of minivllm, so the tests of every chapter may use it.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config
from transformers import Qwen3ForCausalLM as HFQwen3ForCausalLM

# The sizes of a model that runs in a millisecond. H * D differs from E on purpose, as in Qwen3.
TINY = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def tiny_qwen3(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """transformers' Qwen3 of the ``TINY`` sizes with ``changes``, random, in float32."""
    return _spread(HFQwen3ForCausalLM(Qwen3Config(**_sizes(changes))), seed)


def tiny_llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """transformers' Llama of the ``TINY`` sizes with ``changes``, random, in float32."""
    return _spread(LlamaForCausalLM(LlamaConfig(**_sizes(changes))), seed)


def _sizes(changes: dict[str, Any]) -> dict[str, Any]:
    # Eager attention is the plainest oracle.
    return {**TINY, "attn_implementation": "eager", **changes}


def _spread(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Fill ``model`` so that every part matters and logits lie far apart.

    transformers' own initialisation (standard deviation 0.02, norms of ones, biases of zeros) would
    hide a norm that is left out and put the two likeliest tokens within a rounding error.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.7 * noise)
            else:
                # What attention and MLP add must outweigh the embedding, or a tied model only
                # repeats its last token.
                gain = 6.0 if "o_proj" in name or "down_proj" in name else 1.0
                parameter.copy_(gain * noise / math.sqrt(parameter.shape[-1]))
    return model.eval()


def save_checkpoint(
    model: PreTrainedModel, folder: Path, *, sharded: bool = False, style: int = 5
) -> Path:
    """Write ``model`` as a Hugging Face folder and return it.

    sharded: several safetensors files and an index. style: 5 leaves ``config.json`` as this
    transformers writes it, 4 rewrites it with the keys of transformers 4.
    """
    model.save_pretrained(folder, max_shard_size="30KB" if sharded else "5GB")
    if sharded:
        assert len(list(folder.glob("*.safetensors"))) > 2, "the checkpoint was not sharded"
    if style == 4:
        edit_json(folder / "config.json", as_transformers_4)
    return folder


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """The same ``config.json`` as transformers 4.51 would have written it."""
    old = {key: value for key, value in config.items() if value is not None}
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    old["torch_dtype"] = old.pop("dtype")
    old.pop("layer_types", None)
    old.update(use_sliding_window=False, sliding_window=None, max_window_layers=28)
    old["transformers_version"] = "4.51.0"
    return old


def edit_json(file: Path, change: Any) -> None:
    """Replace the JSON object in ``file`` by ``change`` of it."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(change(content), indent=2), encoding="utf-8")


def random_prompt(length: int, seed: int, vocab_size: int = TINY["vocab_size"]) -> list[int]:
    """``length`` random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


@torch.no_grad()
def oracle_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """transformers' logits of one sequence: [T, V] in the model's dtype."""
    return model(torch.tensor([token_ids])).logits[0]


@torch.no_grad()
def oracle_greedy(
    model: PreTrainedModel, prompts: list[list[int]], max_tokens: int, **settings: Any
) -> list[list[int]]:
    """The greedy continuations that transformers' ``generate`` finds, in the prompts' order.

    Prompts of one length go through it as one batch: no padding, so nothing but the prompt counts.
    """
    answers: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        rows = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        out = model.generate(
            torch.tensor([prompts[index] for index in rows]),
            attention_mask=torch.ones(len(rows), length, dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            **settings,
        )
        answers.update(zip(rows, out[:, length:].tolist(), strict=True))
    return [answers[index] for index in range(len(prompts))]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest deviation as a share of the largest number, in float64."""
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.abs().max())
