"""What a model is: its sizes and constants, read from a Hugging Face ``config.json``."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minivllm.layers.rotary_embedding import RopeScaling

ROPE_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and constants of a decoder; every field is checked once, here.

    architecture: the class name in the checkpoint, such as ``Qwen3ForCausalLM``.
    dtype: what the checkpoint's weights were saved as.
    eos_token_ids: the tokens that end an answer.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    rms_norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model config: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"model config: head_size={self.head_size} must be even (RoPE)")
        if not self.rope_base > 0:
            raise ValueError(f"model config: rope_base={self.rope_base} must be above 0 (RoPE)")

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read ``config.json``, and the end tokens from ``generation_config.json`` if it is there.

        Raises ValueError for a file that is missing or not JSON, and for a model that this package
        cannot run.
        """
        config = read_json(folder / "config.json")
        _check_kinds(folder / "config.json", config)
        generation_file = folder / "generation_config.json"
        generation = read_json(generation_file) if generation_file.exists() else {}
        _check_kinds(generation_file, generation)
        return cls.from_hf(config, generation)

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Translate the keys of transformers 4 and 5, which differ for RoPE and the dtype.

        config, generation: the parsed ``config.json`` and ``generation_config.json``.

        What may be absent or null: ``architectures`` (the architecture is then "(none named)",
        which the loader refuses), ``num_key_value_heads`` (then as many as query heads),
        ``head_dim`` (128 for a Qwen3, else hidden size / query heads), ``rope_theta`` (10,000),
        ``rms_norm_eps`` (1e-6), the booleans (False), the dtype (float32). End tokens are those of
        ``generation`` if it has any, else those of ``config``. ``max_positions`` counts what YaRN
        stretches the context to.

        Raises ValueError for a size that is missing or no whole number, and for a model that this
        package cannot run.
        """
        architecture = (config.get("architectures") or ["(none named)"])[0]
        _refuse_what_is_not_built(config)
        hidden_size = _size(config, "hidden_size")
        num_heads = _size(config, "num_attention_heads")
        max_positions = _size(config, "max_position_embeddings")
        rope = _rope_parameters(config)
        rope_scaling = _rope_scaling(rope, max_positions)
        if rope_scaling.kind == "yarn":
            # The key still tells the context before YaRN; what counts is what YaRN stretches it to.
            stretched = rope_scaling.original_max_positions * rope_scaling.factor
            max_positions = max(max_positions, int(stretched))
        # Where the key is absent, transformers' Qwen3 means 128 and its Llama the quotient.
        default_head_size = 128 if architecture.startswith("Qwen3") else hidden_size // num_heads
        return cls(
            architecture=architecture,
            vocab_size=_size(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_size(config, "num_key_value_heads", num_heads),
            head_size=_size(config, "head_dim", default_head_size),
            max_positions=max_positions,
            rms_norm_eps=_optional(config, "rms_norm_eps", 1e-6),
            rope_base=float(_optional(rope, "rope_theta", 10000.0)),
            rope_scaling=rope_scaling,
            tie_embeddings=_optional(config, "tie_word_embeddings", False),
            attention_bias=_optional(config, "attention_bias", False),
            mlp_bias=_optional(config, "mlp_bias", False),
            dtype=_dtype(_optional(config, "dtype", config.get("torch_dtype"))),
            eos_token_ids=_token_ids((generation or {}).get("eos_token_id"))
            or _token_ids(config.get("eos_token_id")),
        )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; ValueError names the file if it is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; is this a Hugging Face model folder?") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); fetch the model again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


# What the keys that are no sizes hold, unless they are absent or null.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "architectures": ((list,), "a list of class names"),
    "layer_types": ((list,), "a list"),
    "eos_token_id": ((int, list), "a token id or a list of them"),
    "rope_parameters": ((dict,), "a JSON object"),
    "rope_scaling": ((dict,), "a JSON object"),
    "dtype": ((str,), "the name of a dtype"),
    "torch_dtype": ((str,), "the name of a dtype"),
    "tie_word_embeddings": ((bool,), "true or false"),
    "attention_bias": ((bool,), "true or false"),
    "mlp_bias": ((bool,), "true or false"),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", *ROPE_NUMBERS), ((int, float), "a number")),
}
ITEMS = {"architectures": str, "layer_types": str, "eos_token_id": int}


def _check_kinds(file: Path, content: Mapping[str, Any]) -> None:
    """ValueError for a value of a kind that the code below does not expect."""
    for key, (kinds, what) in KINDS.items():
        value = content.get(key)
        if value is None:
            continue
        items = value if isinstance(value, list) else []
        # JSON's true is an int to Python, and no number.
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        wrong = wrong or (isinstance(value, float) and not math.isfinite(value))
        if wrong or not all(type(item) is ITEMS[key] for item in items):
            raise ValueError(f"{file}: {key}={value!r} must be {what}")
        if isinstance(value, dict):
            _check_kinds(file, value)


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _optional(config, key, default)
    if value is None:
        raise ValueError(f"config.json has no {key!r}; is it the configuration of a decoder?")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key}={value!r} must be a whole number of at least 1")
    return value


def _optional(config: Mapping[str, Any], key: str, default: Any) -> Any:
    # transformers 5 writes explicit nulls, which mean the same as an absent key.
    value = config.get(key)
    return default if value is None else value


def _refuse_what_is_not_built(config: Mapping[str, Any]) -> None:
    activation = _optional(config, "hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"config.json: hidden_act={activation!r} is not supported, only 'silu'")
    layer_types = _optional(config, "layer_types", [])
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise ValueError("config.json asks for sliding-window attention, which is not supported")
    if config.get("quantization_config"):
        raise ValueError(
            "config.json has a quantization_config; use a checkpoint that is not quantized"
        )


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 has one ``rope_parameters``; 4 has ``rope_theta`` and ``rope_scaling``."""
    rope = dict(_optional(config, "rope_parameters", {}))
    if not rope:
        rope = dict(_optional(config, "rope_scaling", {}))
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = config.get("rope_theta")
    return rope


def _rope_scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling:
    kind = _optional(rope, "rope_type", _optional(rope, "type", "default"))
    fields = {
        "factor": "factor",
        "original_max_positions": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    }
    given = {field: rope[key] for field, key in fields.items() if rope.get(key) is not None}
    if kind in ("yarn", "dynamic"):
        # Without the key, transformers takes the model's own context as the original one.
        given.setdefault("original_max_positions", max_positions)
    return RopeScaling(kind=kind, **given)


def _dtype(name: Any) -> torch.dtype:
    if name is None:
        return torch.float32
    if name not in DTYPES:
        raise ValueError(f"config.json: dtype={name!r} is not supported; use one of {list(DTYPES)}")
    return DTYPES[name]


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
