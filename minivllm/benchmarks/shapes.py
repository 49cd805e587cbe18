"""The shapes of well-known models, for benchmarks where no checkpoint is at hand.

Speed depends on shapes, not on what the weights have learnt; so a folder with nothing but a
``config.json`` and ``load_format="dummy"`` measures the same engine.
"""

import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

# layers, hidden, MLP, query heads, KV heads, tied: from the models' cards (arXiv:2505.09388).
_QWEN3: dict[str, tuple[int, int, int, int, int, bool]] = {
    "Qwen3-0.6B": (28, 1024, 3072, 16, 8, True),
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, True),
    "Qwen3-4B": (36, 2560, 9728, 32, 8, True),
    "Qwen3-8B": (36, 4096, 12288, 32, 8, False),
    "Qwen3-14B": (40, 5120, 17408, 40, 8, False),
    "Qwen3-32B": (64, 5120, 25600, 64, 8, False),
}
SHAPES = tuple(_QWEN3)


def shape_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a model of this shape; ValueError for a name that is not known."""
    if name not in _QWEN3:
        raise ValueError(f"shapes={name!r} is not known; choose one of {', '.join(SHAPES)}")
    layers, hidden, intermediate, heads, kv_heads, tied = _QWEN3[name]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "hidden_act": "silu",
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    }


def shape_folder(name: str, **changes: Any) -> Path:
    """A new temporary folder that holds the config of this shape, with ``changes``."""
    folder = Path(mkdtemp(prefix="minivllm-"))
    config = shape_config(name) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
