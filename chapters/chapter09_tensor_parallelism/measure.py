"""A decode step on real processes of this machine, with gloo: how long it takes, and who waits.

    python -m chapters.chapter09_tensor_parallelism.measure
    python -m chapters.chapter09_tensor_parallelism.measure --output steps_cpu.json

Every rank has one thread. Times are wall-clock, so nothing else should run. The second model has
the shapes of Qwen3-0.6B and random weights, in float32: 2.4 GB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.benchmarks.shapes import shape_folder
from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM

MODELS = ("embedded", "Qwen3-0.6B")
RANKS, BATCHES = (1, 2), (1, 8)
PROMPT, WARM = 16, 4


@dataclass(frozen=True)
class TimedWord:
    """An exchange as rank 0 lived through it. start_ms: since its step began."""

    kind: str
    nbytes: int
    start_ms: float
    ms: float


class Clock:
    """Notes on every exchange of this process, between two calls of :meth:`take`."""

    def __init__(self, llm: Any) -> None:
        self.words: list[TimedWord] = []
        self.message_bytes = 0
        self.began = time.perf_counter()
        runner = llm.engine.runner
        if not hasattr(runner, "vocabulary"):
            return  # one rank speaks to nobody
        group, crew = runner.vocabulary.group, runner.crew
        group.all_reduce = self._timed("all_reduce", group.all_reduce)
        group.all_gather = self._timed("all_gather", group.all_gather)
        send = crew.send_step

        def counted(message: bytes) -> None:
            self.message_bytes = len(message)
            send(message)

        crew.send_step = counted

    def _timed(self, kind: str, call: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def timed(x: torch.Tensor) -> torch.Tensor:
            nbytes, began = x.nbytes, time.perf_counter()
            result = call(x)
            now = time.perf_counter()
            start, took = 1e3 * (began - self.began), 1e3 * (now - began)
            self.words.append(TimedWord(kind, nbytes, start, took))
            return result

        return timed

    def start(self) -> None:
        """A step begins."""
        self.words, self.began = [], time.perf_counter()


def measure(model: str, ranks: int, batch: int, steps: int) -> dict[str, Any]:
    """The median of ``steps`` decode steps of ``batch`` sequences, and all that it said."""
    settings: dict[str, Any] = {"device": "cpu", "skip_tokenizer_init": True, "max_model_len": 128}
    settings |= {"num_kv_blocks": 8 * batch, "max_num_seqs": 8, "tensor_parallel_size": ranks}
    if model != "embedded":
        settings |= {"model": str(shape_folder(model)), "load_format": "dummy"}
    params = SamplingParams(temperature=0.6, seed=0, ignore_eos=True, max_tokens=WARM + steps + 4)
    taken: list[tuple[float, list[TimedWord]]] = []
    with LLM(**settings) as llm:
        clock = Clock(llm)
        for place in range(batch):
            llm.engine.add_request(str(place), [1 + place] * PROMPT, params)
        for number in range(1 + WARM + steps):
            clock.start()
            llm.engine.step()
            if number > WARM:  # the prompts, and steps that still find their memory
                taken.append((1e3 * (time.perf_counter() - clock.began), clock.words))
        while llm.engine.has_unfinished_requests:
            llm.engine.step()
        message = clock.message_bytes
    ms = statistics.median(ms for ms, _ in taken)
    # The step that is nearest to the median is shown as it was.
    _, words = min(taken, key=lambda step: abs(step[0] - ms))
    return {
        "model": model,
        "ranks": ranks,
        "batch": batch,
        "steps": steps,
        "ms": ms,
        "waiting_ms": statistics.median(sum(word.ms for word in words) for _, words in taken),
        "message_bytes": message,
        "words": [asdict(word) for word in words],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", help="write a JSON report here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = []
    print("  model         ranks  batch  ms a step  of them in exchanges")
    for model in arguments.models:
        for batch in arguments.batches:
            for ranks in RANKS:
                run = measure(model, ranks, batch, arguments.steps)
                runs.append(run)
                ms, waiting = run["ms"], run["waiting_ms"]
                print(f"  {model:<12}{ranks:>7}{batch:>7}{ms:>11.2f}{waiting:>22.2f}", flush=True)
    facts = machine_facts()
    print(f"({facts['device']}; torch {facts['versions']['torch']}, {facts['date']})")
    if arguments.output:
        file = Path(arguments.output)
        write_report(str(file), {"prompt": PROMPT, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
