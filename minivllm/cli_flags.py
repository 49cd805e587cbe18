"""Flags that several commands share: those of the engine, of generation, and of reports."""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, without the list of all flags above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


ENGINE_FLAGS = (
    "model",
    "device",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "policy",
    "block_size",
    "num_kv_blocks",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "enforce_eager",
    "async_scheduling",
    "tensor_parallel_size",
    "attention_backend",
    "seed",
)


def engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The engine's settings that were given on the command line."""
    given = {name: getattr(options, name) for name in ENGINE_FLAGS}
    return {name: value for name, value in given.items() if value is not None}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Settings of the engine; what is not given keeps the engine's default."""
    group = parser.add_argument_group("engine")
    group.add_argument("--model", help="a folder or hub name (the embedded tiny Qwen3)")
    group.add_argument("--device", help="cpu, cuda or cuda:N (the GPU if there is one)")
    group.add_argument("--dtype", help="float32, float16 or bfloat16")
    group.add_argument("--max-model-len", type=int, help="most tokens a request may hold")
    group.add_argument("--max-num-seqs", type=int, help="most sequences in a step (256)")
    group.add_argument("--max-num-batched-tokens", type=int, help="most tokens in a step (8192)")
    group.add_argument("--policy", help="prefill_first (default) or mixed")
    group.add_argument("--block-size", type=int, help="tokens a KV block, 16 to 256 (64, CPU: 16)")
    group.add_argument("--num-kv-blocks", type=int, help="KV blocks (as many as fit)")
    group.add_argument("--gpu-memory-utilization", type=float, help="share of the GPU to use (0.9)")
    group.add_argument(
        "--no-prefix-caching",
        dest="enable_prefix_caching",
        action="store_false",
        default=None,
        help="compute every prompt from its first token",
    )
    group.add_argument(
        "--enforce-eager", action="store_true", default=None, help="never capture CUDA graphs"
    )
    group.add_argument(
        "--no-async-scheduling",
        dest="async_scheduling",
        action="store_false",
        default=None,
        help="wait for every step before the next is scheduled",
    )
    group.add_argument(
        "--tensor-parallel-size", type=int, help="GPUs, or on a CPU processes, to share a model (1)"
    )
    group.add_argument("--attention-backend", help="auto, torch or triton")
    group.add_argument("--seed", type=int, help="seed of the sampler (0)")


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """How answers are generated."""
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens an answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")


def add_shapes_flag(parser: argparse.ArgumentParser) -> None:
    """Random weights, a report, and the engine's settings."""
    add_shapes_name(parser)
    add_output_flag(parser)
    add_engine_flags(parser)


def add_shapes_name(parser: argparse.ArgumentParser) -> None:
    """Random weights instead of a checkpoint's."""
    parser.add_argument(
        "--shapes", metavar="NAME", help="random weights of this model's shapes, e.g. Qwen3-0.6B"
    )


def add_plot_flag(parser: argparse.ArgumentParser) -> None:
    """A picture of the figures."""
    parser.add_argument(
        "--plot", metavar="FILE", type=_writable, help="also draw the figures there, as SVG"
    )


def add_output_flag(parser: argparse.ArgumentParser) -> None:
    """A report of the figures."""
    parser.add_argument(
        "--output", metavar="FILE", type=_writable, help="also write the figures there, as JSON"
    )


def positive(text: str) -> int:
    """A count: an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return number


def positive_number(text: str) -> float:
    """A rate or a limit: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return number


def device_name(text: str) -> str:
    """A device that PyTorch knows by this name, or ``auto``."""
    # Here, for whoever asks for --help need not wait for it.
    import torch

    try:
        known = text == "auto" or torch.device(text).type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give cpu, cuda or cuda:N")
    return text


def _writable(name: str) -> str:
    """The name of a file that can be written: better learnt before the minutes of a benchmark."""
    file = Path(name)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} is a folder; name a file in it")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{name!r}: there is no folder {str(file.parent)!r}; make it first, or choose another"
        )
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name!r} cannot be written; choose another file")
    return name
