"""Decode on several ranks: time a token, throughput, time in exchanges, and the limit beside it.

Run it with ``python -m minivllm.benchmarks.tensor_parallel --shapes Qwen3-8B --ranks 1 2``. Weights
are random, and the same for every number of ranks, so greedy tokens can be compared. Every stage is
a process of its own, and the report is written after each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from minivllm.benchmarks.harness import ceilings
from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.benchmarks.shapes import SHAPES, shape_folder
from minivllm.benchmarks.stages import Stage, run_stages
from minivllm.benchmarks.tensor_parallel_report import (
    empty_report,
    least_ms,
    notes_of,
    print_model,
    same_tokens,
    take_over,
)
from minivllm.benchmarks.workload import matrix_parameters
from minivllm.cli_flags import Parser, add_output_flag, device_name, positive, positive_number
from minivllm.models.config import ModelConfig

# What is done with the result of a stage; None, if it failed.
Take = Callable[[dict[str, Any] | None], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each shape on each number of ranks; returns 1 if a stage failed, else 0."""
    given = _parse(arguments)
    run = _begin(given)
    failed = 0 if given.finish else run.execute(_measuring_stages(run))
    _compare(run)
    if not given.no_check and not given.finish:
        failed += run.execute(_checking_stages(run))
    run.save()
    for model in run.models.values():
        print_model(model)
    equal = run.several["float32"]["equal"]
    print("float32, the same tokens as on the fewest ranks:", equal)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="minivllm bench tensor-parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", help="(on GPUs: Qwen3-8B)")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=positive, default=128, help="decoded in each measurement")
    parser.add_argument("--requests", type=positive, default=64, help="of the throughput run (64)")
    parser.add_argument("--device", type=device_name, default="auto")
    parser.add_argument("--no-check", action="store_true", help="skip the plain float32 model")
    parser.add_argument("--faults", action="store_true", help="also kill and stop one of 2 ranks")
    parser.add_argument(
        "--beside", action="store_true", help="run stages beside one another where GPUs are free"
    )
    parser.add_argument(
        "--limit", type=positive_number, default=600.0, help="seconds a stage may take (600)"
    )
    parser.add_argument(
        "--resume", help="a JSON report of a run that was cut short; what it holds is not repeated"
    )
    parser.add_argument(
        "--finish", action="store_true", help="measure nothing more: only put --resume's together"
    )
    add_output_flag(parser)
    given = parser.parse_args(arguments)
    if given.finish and not given.resume:
        raise ValueError("--finish puts together what a report holds; name it with --resume")
    if given.shapes is None:
        alone = not torch.cuda.is_available() or given.device == "cpu"
        if alone and not given.finish:
            raise ValueError(
                "without a GPU, say which shapes are not too large: for example --shapes Qwen3-0.6B"
            )
        given.shapes = ["Qwen3-8B"]
    return given


@dataclass
class Run:
    """What was asked for, where it runs, and what is known so far.

    bandwidth: bytes a second of a large copy here. origin: of a report that is only put together,
    its machine and its date. models: the report of each shape. greedy: each shape's answers, by
    number of ranks; exact: those in float32. several: what does not belong to one shape.
    """

    given: argparse.Namespace
    device: torch.device
    bandwidth: float
    origin: dict[str, Any]
    models: dict[str, dict[str, Any]]
    greedy: dict[str, dict[str, Any]]
    exact: dict[str, Any]
    several: dict[str, Any]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def execute(self, stages: list[Stage]) -> int:
        """Run them, and write the report after each; returns how many failed."""
        beside = self.given.beside and self.on_gpu
        return run_stages(stages, beside=beside, limit=self.given.limit, save=self.save)

    def take_engine(self, name: str, ranks: int, facts: dict[str, Any] | None) -> None:
        """What a stage has measured of one shape on so many ranks; None: it failed."""
        if facts is None:
            return
        self.greedy[name][str(ranks)] = facts["greedy"]
        measured = self.models[name]["ranks"]
        if str(ranks) in measured:
            # Only the answers were missing.
            measured[str(ranks)]["greedy"] = facts["greedy"]
            return
        config, tokens = _config(name), self.given.tokens
        for batch in self.given.batch:
            limit = least_ms(config, batch, tokens, ranks, self.bandwidth, self.device)
            facts[str(batch)]["limit_ms"] = limit
        measured[str(ranks)] = facts

    def take_exchange(self, ranks: int, facts: dict[str, Any] | None) -> None:
        """The times of sums over so many ranks."""
        if facts is not None:
            self.several["exchange"][str(ranks)] = facts["sizes"][str(ranks)]

    def take_check(self, name: str, facts: dict[str, Any] | None) -> None:
        """How one shape's answers compare with the plain model's."""
        self.models[name]["checks"] = facts or {}

    def save(self) -> None:
        """Write the report, as far as it has come."""
        self.several["float32"] = {"answers": self.exact, "equal": same_tokens(self.exact)}
        first, *others = self.models.values()
        report = {
            "benchmark": "tensor_parallel",
            "copy_bytes_per_s": self.bandwidth,
            "beside": self.given.beside,
            **first,
            "others": {other["model"]: other for other in others},
            **self.several,
            **self.origin,
        }
        write_report(self.given.output, report)


def _begin(given: argparse.Namespace) -> Run:
    """A run in which nothing has been measured, but for what --resume holds."""
    on_gpu = torch.cuda.is_available() and given.device != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    earlier: dict[str, Any] = {}
    if given.resume:
        earlier = json.loads(Path(given.resume).read_text(encoding="utf-8"))
    # Who measures nothing is of no interest: the report keeps its machine and its date.
    kept = ("device", "versions", "date", "command", "beside", "copy_bytes_per_s")
    origin = {name: earlier[name] for name in kept} if given.finish else {}
    bandwidth = origin.get("copy_bytes_per_s") or ceilings(device)["copy_bytes_per_s"]
    if on_gpu:
        torch.cuda.empty_cache()
    run = Run(
        given,
        device,
        bandwidth,
        origin,
        models={name: empty_report(name, given.tokens) for name in given.shapes},
        greedy={name: {} for name in given.shapes},
        exact={},
        several={"exchange": {}, "float32": {}, "faults": None, "runs": []},
    )
    if given.resume:
        take_over(earlier, run.models, run.several, run.greedy, run.exact)
    if not given.finish:
        facts = machine_facts()
        run.several["runs"].append({name: facts[name] for name in ("date", "command", "device")})
    return run


def _measuring_stages(run: Run) -> list[Stage]:
    """All that is not known yet, but for the checks, which need the answers."""
    given = run.given
    stages: list[Stage] = []
    # The largest first: they need all GPUs, and the others find room beside one another.
    for ranks in sorted(given.ranks, reverse=True):
        if run.on_gpu and ranks > 1 and str(ranks) not in run.several["exchange"]:
            stages.append(_exchange_stage(ranks, partial(run.take_exchange, ranks)))
        for name in given.shapes:
            if str(ranks) not in run.greedy[name]:
                stages.append(_engine_stage(run, name, ranks))
        options = {"ranks": ranks, "device": given.device}
        if ranks == 2 and given.faults and run.several["faults"] is None:
            take = partial(run.several.__setitem__, "faults")
            stages.append(_stage("faults", "faults", options, ranks, take))
        if not given.no_check and str(ranks) not in run.exact:
            take = partial(run.exact.__setitem__, str(ranks))
            stages.append(_stage("exact", f"float32 on {ranks}", options, ranks, take))
    return stages


def _engine_stage(run: Run, name: str, ranks: int) -> Stage:
    """One shape on so many ranks; only its answers, if the times are known."""
    given, measured = run.given, str(ranks) in run.models[name]["ranks"]
    options = {
        "shapes": name,
        "ranks": ranks,
        "batches": [] if measured else given.batch,
        "tokens": given.tokens,
        "requests": 0 if measured else given.requests,
        "device": given.device,
    }
    take = partial(run.take_engine, name, ranks)
    return _stage("engine", f"{name} on {ranks}", options, ranks, take)


def _compare(run: Run) -> None:
    """Put each shape's numbers of ranks in order, and compare their answers with the first's."""
    for name, model in run.models.items():
        model["ranks"] = dict(sorted(model["ranks"].items(), key=lambda item: int(item[0])))
        first = run.greedy[name].get(str(run.given.ranks[0]))
        for ranks, answers in run.greedy[name].items():
            same = [mine == theirs for mine, theirs in zip(first or [], answers, strict=False)]
            share = sum(same) / len(same) if same else None
            model["ranks"][ranks]["same_tokens_as_first"] = share
        model["notes"] = notes_of(model["ranks"])


def _checking_stages(run: Run) -> list[Stage]:
    """Every shape's answers beside the plain model's."""
    # On one GPU, and a layer at a time in float32 too.
    room = torch.cuda.get_device_properties(0).total_memory if run.on_gpu else 1 << 60
    stages = []
    for name, answers in run.greedy.items():
        if answers and 3 * matrix_parameters(_config(name)) < room:
            options = {"shapes": name, "answers": answers, "device": run.given.device}
            take = partial(run.take_check, name)
            stages.append(_stage("check", f"check of {name}", options, 1, take))
    return stages


def _exchange_stage(ranks: int, take: Take) -> Stage:
    output = Path(mkdtemp()) / "exchange.json"
    command = ["minivllm.benchmarks.exchange", "--ranks", str(ranks), "--output", str(output)]
    return Stage(f"exchange of {ranks}", command, ranks, take, output)


def _stage(kind: str, name: str, options: dict[str, Any], gpus: int, take: Take) -> Stage:
    output = Path(mkdtemp()) / "stage.json"
    words = json.dumps({"stage": kind, **options})
    module = "minivllm.benchmarks.tensor_parallel_stages"
    return Stage(name, [module, words, str(output)], gpus, take, output)


def _config(name: str) -> ModelConfig:
    return ModelConfig.from_folder(shape_folder(name))


if __name__ == "__main__":
    raise SystemExit(main())
