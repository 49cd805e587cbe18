"""How long one more token takes when everything before it is computed again.

    python -m chapters.chapter02_qwen3_model.measure
    python -m chapters.chapter02_qwen3_model.measure --json FILE
    python -m chapters.chapter02_qwen3_model.measure --keep    # and put it into text and figure

A CPU is timed with one thread and in CPU seconds, so that other programs disturb less; a GPU by the
clock on the wall.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chapters.chapter02_qwen3_model import results
from minivllm.models.generate import generate_by_recomputing
from minivllm.models.hub import model_folder
from minivllm.models.loader import load_model

LENGTHS = (1, 64, 128, 256, 512, 1024, 2048, 4095)


@dataclass(frozen=True)
class Growth:
    """What the next token takes after ``length`` tokens: the median of some rounds."""

    length: int
    milliseconds: float


def time_of_next_token(model: nn.Module, length: int, rounds: int = 5) -> float:
    """Milliseconds for the token after ``length`` tokens: the median of ``rounds``."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
    on_cpu = model.lm_head.weight.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    times = []
    for _ in range(rounds + 1):
        start = clock()
        # The token is copied to the host, so a GPU has finished when it is here.
        next(generate_by_recomputing(model, prompt, max_tokens=1))
        times.append((clock() - start) * 1e3)
    return statistics.median(times[1:])


def environment(device: str) -> dict[str, Any]:
    """What a measured number has to be read with."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or a name on the hub; the embedded model if none")
    parser.add_argument("--lengths", nargs="+", type=int, default=None, metavar="T")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--keep", action="store_true", help="put the results into the text")
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        folder = model_folder(arguments.model)
        model = load_model(folder, dtype=torch.float32 if device == "cpu" else None, device=device)
        longest = model.config.max_positions
        lengths = arguments.lengths or [length for length in LENGTHS if length < longest]
        if not all(1 <= length < longest for length in lengths):
            raise ValueError(f"--lengths must be from 1 to {longest - 1}, the model's positions")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.keep:
        if device != "cpu" or arguments.model or arguments.lengths:
            print(
                "--keep: the text shows the embedded model on a CPU, and all lengths",
                file=sys.stderr,
            )
            return 2
        arguments.json = results.RESULT
    settings = environment(device)
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    print(f"{'tokens so far':>13} {'ms for the next':>16} {'rows computed':>14} {'new':>4}")
    rows = []
    for length in lengths:
        rows.append(Growth(length, time_of_next_token(model, length)))
        print(f"{length:>13,} {rows[-1].milliseconds:>16.1f} {length:>14,} {1:>4}", flush=True)
    if arguments.json:
        content = {**settings, "model": folder.name, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if arguments.keep:
        from chapters.chapter02_qwen3_model import figures

        results.main()
        figures.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
