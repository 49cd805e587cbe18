"""What ``bench tensor-parallel`` reports: the limit, notes on what not to compare, and tables.

A model's report is a dict: its name, how many tokens went in and came out, what was measured by
number of ranks (``ranks``), and how the answers compare with the plain model's (``checks``).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from minivllm.benchmarks.harness import format_table
from minivllm.benchmarks.report import machine_facts
from minivllm.benchmarks.tensor_parallel_stages import NUM_INPUT
from minivllm.benchmarks.workload import matrix_parameters
from minivllm.models.config import ModelConfig


def empty_report(name: str, tokens: int) -> dict[str, Any]:
    """What is reported of the shape ``name``, of which nothing has been measured yet."""
    return {
        "model": name,
        "input_tokens": NUM_INPUT,
        "output_tokens": tokens,
        "ranks": {},
        "checks": {},
    }


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


def same_tokens(answers: dict[str, Any]) -> dict[str, Any]:
    """Are the tokens in float32 the same on every number of ranks? ``answers``: by that number."""
    found = {number: facts for number, facts in answers.items() if facts is not None}
    first = found.get(min(found, key=int)) if found else None
    return {
        number: {kind: tokens == first[kind] for kind, tokens in facts.items()}
        for number, facts in found.items()
        if first is not None
    }


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
