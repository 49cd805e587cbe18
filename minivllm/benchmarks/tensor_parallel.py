"""Decode on several ranks: time a token, throughput, time in exchanges, and the limit beside it.

Run it with ``python -m minivllm.benchmarks.tensor_parallel --shapes Qwen3-8B --ranks 1 2``. Weights
are random, and the same for every number of ranks, so greedy tokens can be compared. Every stage is
a process of its own, and the report is written after each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from minivllm.benchmarks.harness import ceilings, format_table
from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.benchmarks.shapes import SHAPES, shape_folder
from minivllm.benchmarks.tensor_parallel_stages import NUM_INPUT
from minivllm.benchmarks.workload import matrix_parameters
from minivllm.models.config import ModelConfig


@dataclass
class Stage:
    """A process to run on ``gpus`` GPUs, and what to do with its result (None if it failed)."""

    name: str
    command: list[str]
    gpus: int
    take: Callable[[dict[str, Any] | None], None]
    output: Path
    held: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each shape on each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=["Qwen3-8B"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=128, help="decoded in each measurement")
    parser.add_argument("--requests", type=int, default=64, help="of the throughput run (64)")
    parser.add_argument("--device", default="auto")
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
    parser.add_argument("--output", help="write a JSON report here")
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
    models = {name: _empty_report(name, given.tokens) for name in given.shapes}
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
        several["float32"] = {"answers": exact, "equal": _compare(exact)}
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
    if not given.finish:
        run_stages(stages, beside=given.beside and on_gpu, limit=given.limit, save=save)
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
        run_stages(checks, beside=given.beside and on_gpu, limit=given.limit, save=save)
    save()
    for model in models.values():
        print_model(model)
    print("float32, the same tokens as on the fewest ranks:", several["float32"]["equal"])


def notes_of(by_ranks: dict[str, Any]) -> list[str]:
    """What no comparison should be drawn from: few sequences that take longer than many."""
    notes = []
    for ranks, facts in by_ranks.items():
        batches = sorted((key for key in facts if key.isdigit()), key=int)
        for few, many in itertools.pairwise(batches):
            slow, fast = facts[few]["ms_per_token"], facts[many]["ms_per_token"]
            if slow > 1.1 * fast:
                notes.append(
                    f"{ranks} ranks: a token of batch {few} takes {slow:.2f} ms, of batch {many} "
                    f"{fast:.2f}; the kernels for {few} do not fit this shape, so do not compare it"
                )
    return notes


def take_over(
    report: dict[str, Any],
    models: dict[str, Any],
    several: dict[str, Any],
    greedy: dict[str, dict[str, Any]],
    exact: dict[str, Any],
) -> None:
    """Fill in what ``report``, of a run that was cut short, holds already."""
    several["exchange"] = report["exchange"]
    several["faults"] = report.get("faults")
    exact |= report["float32"].get("answers", {})
    runs = report.get("runs") or [{name: report[name] for name in ("date", "command", "device")}]
    several["runs"] = runs
    for part in (report, *report["others"].values()):
        model = models[part["model"]]
        model["ranks"], model["checks"] = part["ranks"], part["checks"]
        found = {ranks: facts.get("greedy") for ranks, facts in part["ranks"].items()}
        greedy[part["model"]] |= {ranks: answers for ranks, answers in found.items() if answers}


def run_stages(
    stages: list[Stage], *, beside: bool, limit: float, save: Callable[[], None]
) -> None:
    """Run them in their order; with ``beside`` a later one may begin on GPUs that are free."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    free = visible.split(",") if visible else [str(number) for number in range(count)]
    waiting, running = list(stages), []
    while waiting or running:
        for stage in list(waiting):
            fits = stage.gpus <= len(free) or not count
            if fits and (beside or not running):
                waiting.remove(stage)
                stage.held = [free.pop(0) for _ in range(min(stage.gpus, len(free)))]
                _begin(stage)
                running.append(stage)
        if not running and waiting:
            # More GPUs than there are: the stage itself says so.
            running.append(waiting.pop(0))
            _begin(running[-1])
        time.sleep(0.1)
        for stage in list(running):
            assert stage.process is not None
            code, took = stage.process.poll(), time.monotonic() - stage.began
            if code is None and took > limit:
                # With the processes that it started itself.
                os.killpg(stage.process.pid, signal.SIGKILL)
                code = stage.process.wait()
            if code is None:
                continue
            running.remove(stage)
            free += stage.held
            found = None
            if stage.output.exists():
                found = json.loads(stage.output.read_text(encoding="utf-8"))
            stage.take(found)
            save()
            how = "done" if code == 0 else f"FAILED (exit code {code})"
            print(f"{stage.name}: {how} after {took:.0f} s", flush=True)


def _exchange_stage(ranks: int, into: dict[str, Any]) -> Stage:
    output = Path(mkdtemp()) / "exchange.json"
    command = ["minivllm.benchmarks.exchange", "--ranks", str(ranks), "--output", str(output)]

    def take(facts: dict[str, Any] | None) -> None:
        if facts is not None:
            into[str(ranks)] = facts["sizes"][str(ranks)]

    return Stage(f"exchange of {ranks}", command, ranks, take, output)


def _compare(answers: dict[str, Any]) -> dict[str, Any]:
    """Are the tokens in float32 the same on every number of ranks?"""
    found = {number: facts for number, facts in answers.items() if facts is not None}
    first = found.get(min(found, key=int)) if found else None
    return {
        number: {kind: tokens == first[kind] for kind, tokens in facts.items()}
        for number, facts in found.items()
        if first is not None
    }


def _begin(stage: Stage) -> None:
    environment = dict(os.environ)
    if stage.held:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(stage.held)
    stage.process = subprocess.Popen(
        [sys.executable, "-m", *stage.command], env=environment, start_new_session=True
    )
    stage.began = time.monotonic()


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


def _empty_report(name: str, tokens: int) -> dict[str, Any]:
    return {
        "model": name,
        "input_tokens": NUM_INPUT,
        "output_tokens": tokens,
        "ranks": {},
        "checks": {},
    }


def _config(name: str) -> ModelConfig:
    return ModelConfig.from_folder(shape_folder(name))


def print_model(model: dict[str, Any]) -> None:
    """Decode, throughput and loading of one shape, and how its tokens compare."""
    by_ranks = model["ranks"]
    decodes, loads = [], []
    firsts: dict[str, float] = {}
    for ranks, facts in by_ranks.items():
        for batch in (key for key in facts if key.isdigit()):
            one = facts[batch]
            first = firsts.setdefault(batch, one["ms_per_token"])
            decodes.append(
                [
                    ranks,
                    batch,
                    f"{one['ms_per_token']:.3f}",
                    f"{one['tokens_per_s']:,.0f}",
                    f"{first / one['ms_per_token']:.2f}x",
                    f"{one['communication_ms']:.3f}" if "communication_ms" in one else "-",
                    f"{one['limit_ms']:.3f}",
                ]
            )
        run = facts["throughput"]
        first = firsts.setdefault("throughput", run["output_tokens_per_s"])
        speed = run["output_tokens_per_s"]
        scaling = f"{speed / first:.2f}x"
        requests = f"{run['requests']} requests"
        decodes.append([ranks, requests, "-", f"{speed:,.0f}", scaling, "-", "-"])
        for rank in facts["stats_of_ranks"]:
            peak = rank["peak_host_bytes"]
            loads.append(
                [
                    f"{rank['rank']} of {ranks}",
                    f"{rank['load_seconds']:.2f} s",
                    f"{rank['weight_bytes'] / 2**30:.2f} GiB",
                    "unknown" if peak is None else f"{peak / 2**30:.2f} GiB",
                    rank["sums_by"],
                ]
            )
    headers = ["ranks", "batch", "ms a token", "tokens/s", "scaling", "ms in exchanges", "limit ms"]
    print(f"\n{model['model']}, {machine_facts()['device']}")
    print(format_table(headers, decodes))
    if loads:
        print(format_table(["rank", "loaded in", "weights", "peak of the host", "sums by"], loads))
    for note in model["notes"]:
        print(note)
    for ranks, facts in by_ranks.items():
        if facts.get("same_tokens_as_first") is not None:
            print(f"{ranks} ranks: {facts['same_tokens_as_first']:.0%} of answers as the first's")
    for ranks, check in model["checks"].items():
        verdict = "agree with" if check["agrees"] else "DIFFER from"
        print(
            f"{ranks} ranks: greedy tokens {verdict} the plain model in float32, "
            f"{check['likeliest_share']:.1%} the likeliest, worst {check['worst_shortfall']:.4f} "
            f"short (rounding: {check['rounding_of_plain_model']:.4f})"
        )


def least_ms(
    config: ModelConfig,
    batch: int,
    tokens: int,
    ranks: int,
    bytes_per_s: float,
    device: torch.device,
) -> float:
    """The least time of a decode step: a rank's weights and cache, read once, and no exchange."""
    size = 4 if device.type == "cpu" else config.dtype.itemsize
    kv_heads = max(1, config.num_kv_heads // ranks)
    context = NUM_INPUT + 8 + tokens / 2
    kv = 2 * config.num_layers * kv_heads * config.head_size * batch * context
    return 1e3 * size * (matrix_parameters(config) / ranks + kv) / bytes_per_s


if __name__ == "__main__":
    main()
