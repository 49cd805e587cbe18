"""The chapter's toy: a decoder of 200 numbers that knows the alphabet as far as d.

``?`` makes it say ``abcd.``. Every weight is set by hand, so that each number on its way through
the model can be followed on paper. It is an ordinary Hugging Face folder; transformers runs it too.

Six tokens (V = 6), hidden size E = 4, one layer, H = 2 query heads on G = 1 KV head of D = 4
numbers, an MLP of F = 5 rules: "this letter? then the next one".
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

LETTERS = "?abcd."
END = LETTERS.index(".")

# One vector for each token, all at root mean square 1: RMSNorm leaves them as they are.
EMBEDDING = torch.tensor(
    [
        [-1.0, -1.0, -1.0, -1.0],  # ?
        [2.0, 0.0, 0.0, 0.0],  # a
        [0.0, 2.0, 0.0, 0.0],  # b
        [0.0, 0.0, 2.0, 0.0],  # c
        [0.0, 0.0, 0.0, 2.0],  # d
        [1.0, 1.0, 1.0, 1.0],  # .
    ]
)
# Rule r reads one number of the token r: its dot product with that token's vector is 2, with any
# other letter's 0.
READS = torch.cat((torch.full((1, 4), -0.5), torch.eye(4)))

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 6,
    "hidden_size": 4,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": None,
}


def tensors() -> dict[str, torch.Tensor]:
    """The checkpoint: 13 tensors of 200 numbers in all, under the names that Qwen3 gives them."""
    layer = "model.layers.0."
    quarter = 0.25 * torch.eye(4)
    return {
        "model.embed_tokens.weight": EMBEDDING.clone(),
        f"{layer}input_layernorm.weight": torch.ones(4),
        # Queries and keys of 0: every score is 0, so each token attends to all it sees alike ...
        f"{layer}self_attn.q_proj.weight": torch.zeros(8, 4),
        f"{layer}self_attn.k_proj.weight": torch.zeros(4, 4),
        f"{layer}self_attn.q_norm.weight": torch.ones(4),
        f"{layer}self_attn.k_norm.weight": torch.ones(4),
        # ... and takes the mean of their vectors; the two heads write a quarter of it each.
        f"{layer}self_attn.v_proj.weight": torch.eye(4),
        f"{layer}self_attn.o_proj.weight": torch.cat((quarter, quarter), dim=1),
        f"{layer}post_attention_layernorm.weight": torch.ones(4),
        # A gate of 10 says "yes, this letter", one of 0 says nothing; the amount is then 1.
        f"{layer}mlp.gate_proj.weight": 5 * READS,
        f"{layer}mlp.up_proj.weight": 0.05 * READS,
        # What a rule writes: the next token's vector minus this one's.
        f"{layer}mlp.down_proj.weight": (EMBEDDING[1:] - EMBEDDING[:-1]).T.contiguous(),
        "model.norm.weight": torch.ones(4),
    }


def write_toy(folder: Path) -> Path:
    """Write the toy as a Hugging Face model folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spell(token_ids: list[int]) -> str:
    """The letters of the toy's tokens."""
    return "".join(LETTERS[token_id] for token_id in token_ids)


@torch.no_grad()
def fill_by_hand(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Copy a checkpoint's tensors into ``model`` without the loader of task 2.2, and return it.

    The tests of the other tasks use it, so that each of them is red for its own blank only.
    """
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, parameter in model.named_parameters():
        layer = name.split(".")[-2]
        parts = [name.replace(layer, part) for part in fused.get(layer, (layer,))]
        parameter.copy_(torch.cat([weights[part] for part in parts]))
    return model
