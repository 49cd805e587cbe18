"""How long one more token takes with and without a KV cache.

    python -m chapters.chapter03_naive_attention.measure
    python -m chapters.chapter03_naive_attention.measure --json FILE
    python -m chapters.chapter03_naive_attention.measure --keep    # and put it into the text

A CPU is timed with one thread and in CPU seconds, so that other programs disturb less; a GPU by the
clock on the wall.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from chapters.chapter03_naive_attention import results
from minivllm.attention.naive import generate_with_cache
from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.models.generate import generate_by_recomputing
from minivllm.models.hub import model_folder
from minivllm.models.loader import load_model

LENGTHS = (64, 256, 1024, 4000)
STEPS = 9

Generate = Callable[[nn.Module, list[int], int], Iterator[int]]


@dataclasses.dataclass(frozen=True)
class Step:
    """Milliseconds for the token after about ``length`` others: the median of some steps."""

    length: int
    recomputing: float
    cached: float


def time_of_decode_step(generate: Generate, model: nn.Module, length: int) -> float:
    """Milliseconds for one token after the first, which pays for the prompt."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
    on_cpu = model.lm_head.weight.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    times, start = [], 0.0
    for step, _ in enumerate(generate(model, prompt, STEPS + 1)):
        # The token is on the host, so a GPU has finished when it is here.
        if step:
            times.append((clock() - start) * 1e3)
        start = clock()
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or a name on the hub; the embedded model if none")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="T")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--keep", action="store_true", help="put the results into the text")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        folder = model_folder(arguments.model)
        model = load_model(
            folder, dtype=torch.float32 if device.type == "cpu" else None, device=device
        )
        longest = model.config.max_positions - STEPS
        if not all(1 <= length <= longest for length in arguments.lengths):
            raise ValueError(f"--lengths must be from 1 to {longest}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.keep:
        arguments.json = results.FOLDER / results.STEPS["CPU" if device.type == "cpu" else "GPU"]
    # An end token would end the measurement.
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    facts = machine_facts()
    print(f"{facts['device']}; torch {torch.__version__}; {facts['date']}")
    print(f"{'tokens so far':>13}  {'recomputing, ms':>15}  {'with the cache, ms':>18}")
    rows = []
    for length in arguments.lengths:
        both = (
            time_of_decode_step(generate, model, length)
            for generate in (generate_by_recomputing, generate_with_cache)
        )
        rows.append(Step(length, *both))
        print(f"{length:>13,}  {rows[-1].recomputing:>15.1f}  {rows[-1].cached:>18.2f}", flush=True)
    result = {"model": folder.name, "rows": [dataclasses.asdict(row) for row in rows]}
    write_report(arguments.json, result)
    if arguments.keep:
        results.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
