"""The measured and computed tables of chapter 9's text, from the reports beside this file.

    python -m chapters.chapter09_tensor_parallelism.results    # writes them into README.md

``minivllm.benchmarks.tensor_parallel --output tensor_parallel_h200.json`` makes the GPUs' report,
``measure --output steps_cpu.json`` the other. No figure of theirs stands anywhere else in the text.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from minivllm.benchmarks.shapes import SHAPES, shape_config
from minivllm.benchmarks.workload import matrix_parameters
from minivllm.models.config import ModelConfig

FOLDER = Path(__file__).parent
GPUS, CPU = FOLDER / "tensor_parallel_h200.json", FOLDER / "steps_cpu.json"
EIGHT = FOLDER.parent / "chapter08_cuda_graphs"
LATENCY, THROUGHPUT = EIGHT / "latency_h200.json", EIGHT / "throughput_h200.json"

BYTES = 2  # of a bfloat16
LARGE, SEQUENCES, GPU_COUNT = "Qwen3-32B", 32, 4
PROMPT = 4000
NETWORK = 50e9  # bytes a second of a network card of 400 Gbit/s
# Qwen3-235B-A22B: experts a layer, how many a token visits, hidden size, layers; from its card.
EXPERTS, VISITED, EXPERT_HIDDEN, EXPERT_LAYERS = 128, 8, 4096, 94


@cache
def read(file: Path) -> dict[str, Any]:
    """A report."""
    return json.loads(file.read_text(encoding="utf-8"))


@cache
def shape(name: str) -> ModelConfig:
    return ModelConfig.from_hf(shape_config(name))


def read_bytes(name: str) -> int:
    """Bytes of all matrices that a decode step reads, in bfloat16."""
    return matrix_parameters(shape(name)) * BYTES


def weight_bytes(name: str) -> int:
    """The same with the embedding, of which a step reads a row a sequence."""
    config = shape(name)
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size * BYTES
    return read_bytes(name) + embedding


def bandwidth() -> float:
    """Bytes a second that one GPU copies, as measured."""
    return next(report["copy_bytes_per_s"] for report in reports() if "copy_bytes_per_s" in report)


def of(report: dict[str, Any]) -> str:
    """Device and date."""
    return f"{report['device']}, {report['date'][:10]}"


# ---- the GPUs' report ----------------------------------------------------------------------------


def reports() -> list[dict[str, Any]]:
    """Every part of the GPUs' report that has ``ranks``: one a model, the smallest first."""
    found = list(_with_ranks(read(GPUS), ""))
    return sorted(found, key=lambda part: [*SHAPES, part["model"]].index(part["model"]))


def _with_ranks(part: Any, name: str) -> Iterator[dict[str, Any]]:
    if not isinstance(part, dict):
        return
    ranks = part.get("ranks")
    if isinstance(ranks, dict) and any(key.isdigit() for key in ranks):
        named = {"model": name} if "model" not in part else {}
        above = {key: read(GPUS)[key] for key in ("copy_bytes_per_s",) if key in read(GPUS)}
        yield {**above, **part, **named}
    for key, value in part.items():
        if key != "ranks":
            yield from _with_ranks(value, key)


def decodes(report: dict[str, Any]) -> dict[int, dict[int, dict[str, Any]]]:
    """batch -> ranks -> what was measured, both ascending."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for ranks, facts in sorted(report["ranks"].items(), key=lambda item: int(item[0])):
        for batch, measured in facts.items():
            if batch.isdigit() and "ms_per_token" in measured:
                found.setdefault(int(batch), {})[int(ranks)] = measured
    return dict(sorted(found.items()))


def fits(report: dict[str, Any], batch: int, ranks: int) -> bool:
    """Whether a measurement may be compared: few sequences must not take longer than many."""
    found = decodes(report)
    mine = found[batch][ranks]["ms_per_token"]
    larger = [by_ranks for other, by_ranks in found.items() if other > batch and ranks in by_ranks]
    return all(mine <= 1.1 * by_ranks[ranks]["ms_per_token"] for by_ranks in larger)


def gpu_table() -> str:
    """Decode on one GPU and on several."""
    rows = [
        "| model | batch | GPUs | ms a token | times as fast | ms in exchanges | least ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports():
        for batch, by_ranks in decodes(report).items():
            one = min(by_ranks)
            first = by_ranks[one]["ms_per_token"] if fits(report, batch, one) else None
            named = (report["model"], batch)
            for ranks, facts in by_ranks.items():
                ms = facts["ms_per_token"]
                mark = "" if fits(report, batch, ranks) else " ¹"
                cells = [*named, ranks, f"{ms:.2f}{mark}", f"{first / ms:.2f}" if first else ""]
                cells += [_ms(facts.get("communication_ms")), _ms(facts.get("limit_ms"))]
                rows.append(f"| {' | '.join(map(str, cells))} |")
                named = ("", "")
    lines = [*rows, ""]
    if any("¹" in row for row in rows):
        lines += ["¹ Not to be compared: more sequences take less, so a kernel fits ill.", ""]
    lines.append(
        f"({of(read(GPUS))}; bfloat16, random weights. *Exchanges* include the wait for the "
        "slowest rank; *least* is reading a rank's weights and cache at "
        f"{bandwidth() / 1e12:.2f} TB/s.)" + _agreement()
    )
    return "\n".join([*lines, *throughput_table(), *sums_alone()])


def _agreement() -> str:
    """What the same run compared tokens with."""
    text, notes, missing = "", [], []
    for report in reports():
        checks = report.get("checks", {})
        if checks and all(check["agrees"] for check in checks.values()):
            worst = min(check["likeliest_share"] for check in checks.values())
            notes.append(f"at least {worst:.0%} of {report['model']}'s")
        else:
            missing.append(f"{report['model']}'s")
    if notes:
        text += (
            f" Of greedy tokens, {' and '.join(notes)} are the likeliest of chapter 2's model in "
        )
        text += "float32, the others but for rounding"
        text += f"; {' and '.join(missing)} were not compared." if missing else "."
    equal = read(GPUS).get("float32", {}).get("equal", {})
    if len(equal) > 1 and all(all(kinds.values()) for kinds in equal.values()):
        sizes = " and ".join(sorted(equal, key=int))
        text += f" In float32 a small model answers alike on {sizes} GPUs"
        runs = [facts for report in reports() for facts in report["ranks"].values()]
        apart = any(facts.get("same_tokens_as_first", 1.0) < 1.0 for facts in runs)
        text += "; in bfloat16 rounding makes answers part." if apart else "."
    return text


# With what a layer does next, the addition to the residual stream and the norm: one behind the
# other, with no kernel between them, NCCL's sums take twice as long. NCCL's also copy their input.
# The last leaves the norm's division to the product behind it, and makes many programs of a row.
SUMS = {
    "nccl, add and norm": "NCCL, and a kernel",
    "one-shot add and norm, 16 warps": "one of ours",
    "one-shot parts, gain": "ours, divided later",
}


def sums() -> dict[int, dict[str, list[float]]]:
    """GPUs -> "rows", tokens of a sum, and microseconds of both kinds of :data:`SUMS` for each."""
    found = read(GPUS).get("exchange", {})
    return {
        int(size): facts["us"] for size, facts in sorted(found.items(), key=lambda i: int(i[0]))
    }


def sums_alone() -> list[str]:
    """What a sum of one token takes, in a sentence, if the report says it."""
    parts = [
        f"{', '.join(f'{us[name][0]:.1f}' for name in SUMS)} µs on {size} GPUs"
        for size, us in sums().items()
    ]
    said = (
        "One token's sum, addition and norm: NCCL (and a copy), our kernel, and one "
        "that leaves the division to the next product: "
    )
    return ["", f"{said}{'; '.join(parts)}."] if parts else []


def throughput_table() -> list[str]:
    """Many requests at once, for those models of which the report says it."""
    rows = []
    for report in reports():
        ranks = sorted(report["ranks"].items(), key=lambda item: int(item[0]))
        runs = {number: facts["throughput"] for number, facts in ranks if "throughput" in facts}
        first = next((run["output_tokens_per_s"] for run in runs.values()), 0.0)
        named = (report["model"], *{str(run["requests"]) for run in runs.values()})
        for number, run in runs.items():
            speed = run["output_tokens_per_s"]
            rows.append(f"| {' | '.join(named)} | {number} | {speed:,.0f} | {speed / first:.2f} |")
            named = ("", "")
    if not rows:
        return []
    head = [
        "| model | requests | GPUs | tokens a second | times as many |",
        "|---|---|---|---|---|",
    ]
    return ["", *head, *rows]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def pain() -> str:
    """What weighs how much, and how long it takes to read that once."""
    measured = {read(LATENCY)["model"]: read(LATENCY)["batches"]["1"]["ms_per_token"]}
    for report in reports():
        one = decodes(report).get(1, {}).get(1)
        if one is not None and fits(report, 1, 1):
            measured[report["model"]] = one["ms_per_token"]
    rows = [
        "| model | weights, GB | ms to read them once | ms a token, batch 1, measured |",
        "|---|---|---|---|",
    ]
    for name in SHAPES:
        cells = [name, f"{weight_bytes(name) / 1e9:.1f}", f"{least_ms(name):.2f}"]
        cells.append(f"{measured[name]:.2f}" if name in measured else "")
        rows.append(f"| {' | '.join(cells)} |")
    dates = sorted({read(file)["date"][:10] for file in (LATENCY, GPUS)})
    note = f"(bfloat16; one {read(GPUS)['device']}, {' and '.join(dates)}.)"
    return "\n".join([*rows, "", note])


# ---- the CPU's report ----------------------------------------------------------------------------


def cpu_runs() -> list[dict[str, Any]]:
    return read(CPU)["runs"]


def cpu_table() -> str:
    """A decode step in one process, and in two."""
    rows = ["| model | batch | 1 rank, ms a step | 2 ranks | of them in exchanges | words |"]
    rows.append("|---|---|---|---|---|---|")
    alone = {(run["model"], run["batch"]): run["ms"] for run in cpu_runs() if run["ranks"] == 1}
    for run in cpu_runs():
        if run["ranks"] == 1:
            continue
        times = [alone[run["model"], run["batch"]], run["ms"], run["waiting_ms"]]
        cells = [f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" for ms in times]
        cells = [run["model"], str(run["batch"]), *cells, str(len(run["words"]))]
        rows.append(f"| {' | '.join(cells)} |")
    each = [run["waiting_ms"] / len(run["words"]) for run in cpu_runs() if run["words"]]
    report = read(CPU)
    # Of the device's name, not how many threads there were: a rank always has one.
    device = report["device"].rpartition(",")[0]
    note = (
        f"({device}, {report['date'][:10]}; one thread a rank, float32, gloo. An exchange takes "
        f"{min(each):.1f} to {max(each):.1f} ms.)"
    )
    return "\n".join([*rows, "", note])


# ---- what lies beyond ----------------------------------------------------------------------------


def exchanges(name: str) -> int:
    """All-reduces of a decode step: two a layer, one for the embedding."""
    return 2 * shape(name).num_layers + 1


def exchange_bytes(name: str, sequences: int) -> int:
    """Of one all-reduce: a hidden state a sequence."""
    return sequences * shape(name).hidden_size * BYTES


def least_ms(name: str, gpus: int = 1) -> float:
    """To read the weights of a step once, shared out to ``gpus``."""
    return 1e3 * read_bytes(name) / gpus / bandwidth()


def beyond() -> str:
    """Four ways to use several GPUs, in figures, and two more."""
    count, sequences = GPU_COUNT, SEQUENCES
    name, config = LARGE, shape(LARGE)
    kb = exchange_bytes(name, sequences) / 1e3
    one, divided = (f"{least_ms(name, gpus):.1f}" for gpus in (1, count))
    whole, part = (f"{weight_bytes(name) / gpus / 1e9:.1f}" for gpus in (1, count))
    rows = [
        "| way | what is divided | a decode step sends | weights, GB a GPU | least ms a token |",
        "|---|---|---|---|---|",
        f"| tensor | every matrix | {exchanges(name)} all-reduces of {kb:.0f} KB | {part} | "
        f"{divided} |",
        f"| pipeline | the layers | {count - 1} messages of {kb:.0f} KB | {part} | {one} |",
        f"| data | the requests | nothing | {whole} | {one} |",
    ]
    moved = EXPERT_HIDDEN * BYTES * VISITED
    kv_token = 2 * config.num_layers * config.num_kv_heads * config.head_size * BYTES
    kv = kv_token * PROMPT
    flop = 2 * matrix_parameters(config) * PROMPT
    rate = read(THROUGHPUT)["ceilings"]["matmul_flop_per_s"]
    lines = [
        f"({name}, {sequences} sequences, {count} GPUs; arithmetic from the bandwidth above.)",
        "",
        f"- **Pipeline** gives a token no speed, for it visits one stage after the other; {count} "
        "batches under way keep all stages at work. So little travels that hosts may differ.",
        "- **Data** is copies of the engine and a router; each copy has its own weights and cache.",
        f"- **Expert** parallelism is for mixtures of experts. In Qwen3-235B-A22B a token visits "
        f"{VISITED} of {EXPERTS} experts a layer. Experts lie on different GPUs, and tokens travel "
        f"there and back: at most 2 × {VISITED} × {EXPERT_HIDDEN:,} × {BYTES} bytes = "
        f"{2 * moved / 1024:.0f} KiB a token and layer, {2 * moved * EXPERT_LAYERS / 1e6:.0f} MB "
        "through all layers. It pays when a step has work for every expert.",
        f"- **Disaggregated prefill**: one engine reads prompts, another decodes, and K and V move "
        f"once, {kv_token // 1024} KiB a token, {kv / 1e9:.2f} GB for a prompt of {PROMPT:,}. At "
        f"{NETWORK / 1e9:.0f} GB/s that takes {1e3 * kv / NETWORK:.0f} ms, computing it at least "
        f"{1e3 * flop / rate:.0f} ms; and no decode ever waits for a prompt.",
    ]
    return "\n".join([*rows, "", *lines])


BLOCKS = {"pain": pain, "gpus": gpu_table, "cpu": cpu_table, "beyond": beyond}


if __name__ == "__main__":
    from chapters.machine.texts import replace_block

    for mark, content in BLOCKS.items():
        replace_block(FOLDER / "README.md", mark, content())
