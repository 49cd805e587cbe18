"""The measured figures of chapter 8's text and pictures, read from the reports beside this file.

    python -m chapters.chapter08_cuda_graphs.results    # writes them into README.md

``minivllm bench throughput --profile --output FILE``, ``minivllm bench latency --output FILE``,
both also with ``--shapes Qwen3-8B``, and ``python -m minivllm.benchmarks.forward --output FILE``
make the reports. No figure of theirs stands anywhere else in the text.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from minivllm.benchmarks.profile import part_of

FOLDER = Path(__file__).parent
THROUGHPUT, LATENCY = FOLDER / "throughput_h200.json", FOLDER / "latency_h200.json"
FORWARD = FOLDER / "forward_h200.json"
LARGER = FOLDER / "latency_8b_h200.json", FOLDER / "throughput_8b_h200.json"
# What earlier chapters measured on the same kind of GPU.
FORMS = FOLDER.parent / "chapter01_layers" / "forms_gpu.json"
STEPS = FOLDER.parent / "chapter03_naive_attention" / "steps_gpu.json"
NAMED_PARTS = ("matrix products", "attention", "norm, RoPE, activation", "rows")
OPERATIONS = 9  # of add_rms_norm in plain PyTorch, which chapter 1 counts


@cache
def read(file: Path) -> dict[str, Any]:
    """A report."""
    return json.loads(file.read_text(encoding="utf-8"))


def launch_us() -> tuple[float, float]:
    """Microseconds for an operation of plain PyTorch: started from Python, and in a graph."""
    row = next(
        row
        for row in read(FORMS)["rows"]
        if (row["function"], row["form"], row["tokens"]) == ("add_rms_norm", "eager", 1)
    )
    return row["call_us"] / OPERATIONS, row["device_us"] / OPERATIONS


def profiles() -> dict[tuple[int, int], dict[str, Any]]:
    """(batch, context) -> the profile of a decode step, the smallest batch first."""
    found = {}
    for name, profile in read(THROUGHPUT)["profile"].items():
        batch, context = map(int, re.findall(r"\d+", name))
        found[batch, context] = profile
    return dict(sorted(found.items()))


def host_ms() -> float:
    """The host's half of a step of the throughput run, in its last round."""
    return read(THROUGHPUT)["rounds"][-1]["host_ms_per_step"]


def of(report: dict[str, Any]) -> str:
    """Device and date."""
    return f"{report['device']}, {report['date'][:10]}"


def pain() -> str:
    """Chapter 3's step on a GPU, as a table."""
    report = read(STEPS)
    rows = [
        "| tokens before | " + " | ".join(f"{row['length']:,}" for row in report["rows"]) + " |",
        "|---|" + "---|" * len(report["rows"]),
        "| ms for the next | "
        + " | ".join(f"{row['cached']:.2f}" for row in report["rows"])
        + " |",
    ]
    return "\n".join([*rows, "", f"(Embedded model, cached; {of(report)}.)"])


def launch() -> str:
    """What one start costs, in a sentence."""
    python, device = launch_us()
    return (
        f"Chapter 1 measured it for `add_rms_norm`: {OPERATIONS} operations, each "
        f"{python:.1f} µs when started from Python, and {device:.1f} µs when the GPU has them all "
        "in hand."
    )


def profile_table() -> str:
    """Where the time of a decode step goes, by batch."""
    found = profiles()
    report = read(THROUGHPUT)
    head = [f"batch {batch}, context {context}" for batch, context in found]
    rows = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(found)]

    def row(label: str, cells: list[str]) -> None:
        rows.append(f"| {label} | " + " | ".join(cells) + " |")

    row("kernels a step", [f"{p['kernels_a_step']:.0f}" for p in found.values()])
    row("from step to step, ms", [f"{p['step_ms']:.2f}" for p in found.values()])
    row("GPU busy, ms", [f"{p['busy_ms']:.2f}" for p in found.values()])
    row("GPU idle", [f"{p['idle_share']:.0%}" for p in found.values()])
    for part in NAMED_PARTS:
        row(f"{part}, ms", [_part(profile, part) for profile in found.values()])
    row("else, ms", [_rest(profile) for profile in found.values()])
    note = f"{report['model']} shapes, bfloat16; {of(report)}."
    if any(" – |" in line for line in rows):
        note += " –: done inside the others."
    return "\n".join([*rows, "", f"({note})"])


def _part(profile: dict[str, Any], part: str) -> str:
    """Milliseconds of a part, or a dash where no kernel does only that."""
    ms = _parts(profile).get(part)
    return "–" if ms is None else f"{ms:.3f}"


def _parts(profile: dict[str, Any]) -> dict[str, float]:
    """part -> milliseconds a step, by what the profiler says today of each kernel's name."""
    found: dict[str, float] = {}
    for kernel in profile["kernels"]:
        part = part_of(kernel["name"])
        found[part] = found.get(part, 0.0) + kernel["ms_a_step"]
    return found


def _rest(profile: dict[str, Any]) -> str:
    """Milliseconds of the parts that have no row."""
    return f"{sum(ms for part, ms in _parts(profile).items() if part not in NAMED_PARTS):.3f}"


def folding() -> str:
    """What two kernels a layer fewer bring, in a sentence."""
    report = read(FORWARD)
    step = report["records"][0]
    return (
        f"- Folded norms: a step of {step['step'].split(',')[0]} takes {step['ms']['folded']:.2f} "
        f"ms instead of {step['ms']['fused']:.2f} ({of(report)})."
    )


def larger() -> str:
    """A model of which reading the weights is nearly all, in a sentence."""
    slow, fast = map(read, LARGER)
    one = slow["batches"]["1"]
    return (
        f"- {slow['model']}'s shapes: {one['ms_per_token']:.2f} ms a token at batch 1 (its weights "
        f"are read in {slow['weights']['ms']:.2f}); {fast['requests']} requests: "
        f"{fast['first_output_tokens_per_s']:,.0f} tokens/s, "
        f"{fast['first_share_of_limit']:.2f} of the limit ({of(fast)})."
    )


def speed() -> str:
    """Latency and throughput, in a table and a few lines."""
    fast, slow = read(THROUGHPUT), read(LATENCY)
    rows = ["| batch | ms a token, all in | median between tokens | to the first token |"]
    rows.append("|---|---|---|---|")
    for batch, facts in slow["batches"].items():
        between, first = facts["between_tokens_ms"]["p50"], facts["first_token_ms"]["p50"]
        rows.append(f"| {batch} | {facts['ms_per_token']:.2f} | {between:.2f} | {first:.1f} |")
    rates = sorted(entry["output_tokens_per_s"] for entry in fast["rounds"])
    graphs = fast["graphs"]
    lines = [
        *rows,
        "",
        f"({slow['input_tokens']} tokens in, {slow['output_tokens']} out; {of(slow)}.)",
        "",
        f"- {fast['requests']} requests at once: {rates[0]:,.0f} to {rates[-1]:,.0f} tokens/s; the "
        "[front page](../../README.md#beside-the-engines-next-door) sets the limit beside it.",
        f"- The host's half of a step: {host_ms():.2f} ms, while the GPU runs the step before.",
        f"- Graphs for {len(graphs['sizes'])} batch sizes and for prompts were recorded in "
        f"{graphs['seconds']:.1f} s and take {graphs['num_bytes'] / 2**20:.0f} MiB.",
        folding(),
        larger(),
    ]
    return "\n".join(lines)


BLOCKS = {"pain": pain, "launch": launch, "profile": profile_table, "speed": speed}


if __name__ == "__main__":
    from chapters.machine.texts import replace_block

    for mark, content in BLOCKS.items():
        replace_block(FOLDER / "README.md", mark, content())
