"""The engine's settings, checked once."""

from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from minivllm.engine.sampling_params import SamplingParams, refuse_unknown
from minivllm.engine.scheduler import POLICIES
from minivllm.models.config import DTYPES

ATTENTION_BACKENDS = ("auto", "torch", "triton")

# Sequences and tokens of a step are numbered in 32 bits on the device.
MOST_IN_A_STEP = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine; the defaults serve from a laptop to a large GPU.

    model: None for the embedded model, a Hugging Face folder, or a name on the hub.
    tokenizer: another folder or name for the tokenizer; skip_tokenizer_init: run without one, on
    token ids only.
    load_format: ``auto`` reads the checkpoint; ``dummy`` fills the model with random weights, for
    benchmarks where only a config.json is at hand.
    max_model_len: the most tokens of a request, prompt included; None is the model's own limit.
    max_num_seqs, max_num_batched_tokens: the most sequences and tokens in a step.
    policy: ``prefill_first`` (throughput) or ``mixed`` (prompts in chunks beside the decodes).
    block_size: tokens a KV block, a power of two from 16 to 256; None is 64 on a GPU, whose kernels
    read whole tiles, and 16 on a CPU, where only waste counts. num_kv_blocks: size of the pool;
    None is as many as fit into ``gpu_memory_utilization``, the fraction of the GPU's memory that
    this engine may fill (on a CPU: of a quarter of the memory that is available).
    enable_prefix_caching: share blocks between equal prefixes.
    enforce_eager: never capture CUDA graphs.
    async_scheduling: on a GPU, prepare the next step while the last one runs, and read its tokens a
    step late; False waits for every step. The tokens are the same.
    tensor_parallel_size: how many GPUs share the model (chapter 9); on a CPU, how many processes.
    dtype: ``auto`` (the checkpoint's on a GPU, float32 on a CPU), ``float32``, ``float16`` or
    ``bfloat16``. device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    attention_backend: ``triton``, our kernels; ``torch``, which runs everywhere; ``auto`` takes the
    first on a GPU, the second on a CPU.
    seed: what the seeds of requests without one are drawn from.
    """

    model: str | Path | None = None
    tokenizer: str | Path | None = None
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    policy: str = "prefill_first"
    block_size: int | None = None
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    async_scheduling: bool = True
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    attention_backend: str = "auto"
    seed: int = 0

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> "EngineConfig":
        """Build from keyword arguments; ValueError for one that does not exist."""
        known = [field.name for field in fields(cls)]
        for field in fields(SamplingParams):
            if field.init and field.name in keywords and field.name not in known:
                raise ValueError(
                    f"{field.name}={keywords[field.name]!r} is a matter of each request, not of "
                    f"the engine; give SamplingParams({field.name}=...)"
                )
        refuse_unknown(keywords, known)
        return cls(**keywords)

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str | PathLike) or value == ""):
                raise ValueError(
                    f"{name}={value!r} must be the path of a folder, a name on the hub, or None"
                )
        if isinstance(self.device, torch.device):
            # What works as a device is welcome, but settings travel to other ranks as text.
            object.__setattr__(self, "device", str(self.device))
        if not isinstance(self.device, str):
            raise ValueError(f"device={self.device!r} must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        for name in ("max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size"):
            self._check_positive(name)
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) > MOST_IN_A_STEP:
                raise ValueError(
                    f"{name}={getattr(self, name)} is more than a step can count, which is "
                    f"{MOST_IN_A_STEP}; lower it"
                )
        for name in ("max_model_len", "num_kv_blocks"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        switches = ("skip_tokenizer_init", "enable_prefix_caching")
        for name in (*switches, "enforce_eager", "async_scheduling"):
            self._check_choice(name, (True, False))
        self._check_choice("policy", POLICIES)
        self._check_choice("load_format", ("auto", "dummy"))
        if self.block_size is not None:
            self._check_choice("block_size", (16, 32, 64, 128, 256))
        self._check_choice("dtype", ("auto", *DTYPES))
        self._check_choice("attention_backend", ATTENTION_BACKENDS)
        fraction = self.gpu_memory_utilization
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(
                f"gpu_memory_utilization={fraction!r} must be above 0 and at "
                "most 1: the fraction of the GPU's memory that this engine may fill"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than "
                f"max_num_seqs={self.max_num_seqs}, whose decodes would not fit into one step; "
                "raise the first or lower the second"
            )
        if self.tensor_parallel_size > 1 and ":" in self.device:
            raise ValueError(
                f"device={self.device!r} names one device for tensor_parallel_size="
                f"{self.tensor_parallel_size} of them; give 'cuda', and choose the GPUs with the "
                "environment variable CUDA_VISIBLE_DEVICES"
            )

    def resolve_device(self) -> torch.device:
        """The device to run on; ValueError if it is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r} must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device={self.device!r}: PyTorch sees no CUDA device here; use device='cpu', or "
                "install a driver and a CUDA build of PyTorch"
            )
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device={self.device!r}: there are only {torch.cuda.device_count()} CUDA devices"
            )
        return device

    def resolve_block_size(self, device: torch.device) -> int:
        """Tokens a block on this device."""
        return self.block_size or (16 if device.type == "cpu" else 64)

    def resolve_dtype(self, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of weights, computation and KV cache."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        # CPUs emulate 16-bit arithmetic, if they have it at all, slower than they run float32.
        return torch.float32 if device.type == "cpu" else checkpoint

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")

    def _check_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        # The types as well, for 16.0 and 1 equal 16 and True.
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")
