"""Decode on several ranks: time a token, throughput, time in exchanges, and the limit beside it.

Run it with ``python -m minivllm.benchmarks.tensor_parallel --shapes Qwen3-8B --ranks 1 2``. Weights
are random, and the same for every number of ranks, so greedy tokens can be compared. Every stage is
a process of its own, and the report is written after each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
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
from minivllm.cli_flags import Parser, add_output_flag, device_name, positive
from minivllm.models.config import ModelConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each shape on each number of ranks; returns 1 if a stage failed, else 0."""
    parser = Parser(
        prog="minivllm bench tensor-parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=["Qwen3-8B"])
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
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a stage may take (600)")
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
    models = {name: empty_report(name, given.tokens) for name in given.shapes}
    several: dict[str, Any] = {"exchange": {}, "float32": {}, "faults": None, "runs": []}
    greedy: dict[str, dict[str, Any]] = {name: {} for name in given.shapes}
    exact: dict[str, Any] = {}
    stages: list[Stage] = []
    if given.resume:
        take_over(earlier, models, several, greedy, exact)
    if not given.finish:
        facts = machine_facts()
        several["runs"].append({name: facts[name] for name in ("date", "command", "device")})

    def save() -> None:
        several["float32"] = {"answers": exact, "equal": same_tokens(exact)}
        first, *others = models.values()
        report = {
            "benchmark": "tensor_parallel",
            "copy_bytes_per_s": bandwidth,
            "beside": given.beside,
            **first,
            "others": {other["model"]: other for other in others},
            **several,
            **origin,
        }
        write_report(given.output, report)

    def take_engine(name: str, ranks: int, facts: dict[str, Any] | None) -> None:
        if facts is None:
            return
        greedy[name][str(ranks)] = facts["greedy"]
        if str(ranks) in models[name]["ranks"]:
            # Only the answers were missing.
            models[name]["ranks"][str(ranks)]["greedy"] = facts["greedy"]
            return
        for batch in given.batch:
            limit = least_ms(_config(name), batch, given.tokens, ranks, bandwidth, device)
            facts[str(batch)]["limit_ms"] = limit
        models[name]["ranks"][str(ranks)] = facts

    # The largest first: they need all GPUs, and the others find room beside one another.
    for ranks in sorted(given.ranks, reverse=True):
        if on_gpu and ranks > 1 and str(ranks) not in several["exchange"]:
            stages.append(_exchange_stage(ranks, several["exchange"]))
        for name in given.shapes:
            measured = str(ranks) in models[name]["ranks"]
            if str(ranks) in greedy[name]:
                continue
            options = {
                "shapes": name,
                "ranks": ranks,
                "batches": [] if measured else given.batch,
                "tokens": given.tokens,
                "requests": 0 if measured else given.requests,
                "device": given.device,
            }
            take = partial(take_engine, name, ranks)
            stages.append(_stage("engine", f"{name} on {ranks}", options, ranks, take))
        if ranks == 2 and given.faults and several["faults"] is None:
            options = {"ranks": ranks, "device": given.device}
            take = partial(several.__setitem__, "faults")
            stages.append(_stage("faults", "faults", options, ranks, take))
        if not given.no_check and str(ranks) not in exact:
            options = {"ranks": ranks, "device": given.device}
            take = partial(exact.__setitem__, str(ranks))
            stages.append(_stage("exact", f"float32 on {ranks}", options, ranks, take))
    failed = 0
    if not given.finish:
        failed = run_stages(stages, beside=given.beside and on_gpu, limit=given.limit, save=save)
    for model in models.values():
        model["ranks"] = dict(sorted(model["ranks"].items(), key=lambda item: int(item[0])))
    for name in given.shapes:
        first = greedy[name].get(str(given.ranks[0]))
        for ranks, answers in greedy[name].items():
            same = [mine == theirs for mine, theirs in zip(first or [], answers, strict=False)]
            share = sum(same) / len(same) if same else None
            models[name]["ranks"][ranks]["same_tokens_as_first"] = share
    for model in models.values():
        model["notes"] = notes_of(model["ranks"])
    if not given.no_check and not given.finish:
        # On one GPU, and a layer at a time in float32 too.
        room = torch.cuda.get_device_properties(0).total_memory if on_gpu else 1 << 60
        checks = []
        for name in given.shapes:
            if greedy[name] and 3 * matrix_parameters(_config(name)) < room:
                options = {"shapes": name, "answers": greedy[name], "device": given.device}

                def take_check(facts: dict[str, Any] | None, name: str = name) -> None:
                    models[name]["checks"] = facts or {}

                checks.append(_stage("check", f"check of {name}", options, 1, take_check))
        failed += run_stages(checks, beside=given.beside and on_gpu, limit=given.limit, save=save)
    save()
    for model in models.values():
        print_model(model)
    print("float32, the same tokens as on the fewest ranks:", several["float32"]["equal"])
    return 1 if failed else 0


def _exchange_stage(ranks: int, into: dict[str, Any]) -> Stage:
    output = Path(mkdtemp()) / "exchange.json"
    command = ["minivllm.benchmarks.exchange", "--ranks", str(ranks), "--output", str(output)]

    def take(facts: dict[str, Any] | None) -> None:
        if facts is not None:
            into[str(ranks)] = facts["sizes"][str(ranks)]

    return Stage(f"exchange of {ranks}", command, ranks, take, output)


def _stage(
    kind: str,
    name: str,
    options: dict[str, Any],
    gpus: int,
    take: Callable[[dict[str, Any] | None], None],
) -> Stage:
    output = Path(mkdtemp()) / "stage.json"
    words = json.dumps({"stage": kind, **options})
    module = "minivllm.benchmarks.tensor_parallel_stages"
    return Stage(name, [module, words, str(output)], gpus, take, output)


def _config(name: str) -> ModelConfig:
    return ModelConfig.from_folder(shape_folder(name))


if __name__ == "__main__":
    raise SystemExit(main())
