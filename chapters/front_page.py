"""The measured parts of the front page: the ladder's picture, and the engines next door.

    python -m chapters.front_page            # print them
    python -m chapters.front_page --write    # put them into README.md, and the rungs into chapters

They are made from what the benchmarks wrote, and a test compares the texts with these files:

    minivllm bench throughput --output chapters/chapter08_cuda_graphs/throughput_h200.json ...
    minivllm bench latency --output chapters/chapter08_cuda_graphs/latency_h200.json ...
    minivllm bench ladder --output chapters/ladder_cpu.json --plot chapters/ladder_cpu.svg

A ladder that is not there leaves no trace; ``ladder_h200`` is shown below ``ladder_cpu``. Of the
other engines ``neighbours_h200.json`` keeps a run of its own; those that run along with ``bench
throughput --peers`` are shown as well.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from chapters import ROOT
from chapters.machine.texts import replace_block
from minivllm.benchmarks.shapes import shape_config
from minivllm.benchmarks.workload import Work, matrix_parameters, usual_workload, work_of
from minivllm.models.config import ModelConfig

FOLDER = ROOT / "chapters"
MEASURED = FOLDER / "chapter08_cuda_graphs"
LADDERS = ("ladder_cpu", "ladder_h200")
BATCHES = ("1", "32")
# What a command says of the machine on which it ran, and not of what ran.
_PLACES = re.compile(r" --(?:output|plot) \S+")


def read(file: Path) -> dict[str, Any]:
    """What a benchmark wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def engines() -> str:
    """The table of engines as Markdown, and what it has to be read with."""
    ours = read(MEASURED / "throughput_h200.json")
    latency = read(MEASURED / "latency_h200.json")
    others = read(FOLDER / "neighbours_h200.json")
    for one in (ours, latency):
        if not one["check"]["agrees"]:
            raise ValueError(f"{one['benchmark']}: this run's tokens were wrong; measure again")
    for name in ("device", "model", "requests", "input_tokens", "output_tokens"):
        if ours[name] != others[name]:
            raise ValueError(f"{name}: {ours[name]} here, but the others have {others[name]}")
    limit = _limit(ours)
    lines = [
        "| engine | output tokens/s | share of the limit | ms a token, batch 1 | batch 32 | ready "
        "after |",
        "|---|---|---|---|---|---|",
        _row(
            "limit of the machine",
            [limit],
            limit,
            [[_least_ms(ours, latency, batch)] for batch in BATCHES],
            [],
        ),
        _row(
            "**minivllm**",
            [one["output_tokens_per_s"] for one in ours["rounds"]],
            limit,
            [[latency["batches"][batch]["ms_per_token"]] for batch in BATCHES],
            [ours["ready_seconds"], latency["ready_seconds"]],
        ),
    ]
    lines += _peers_of_the_run(ours, limit)
    for engine in others["engines"]:
        rates, times = engine["output_tokens_per_s"], engine["ms_per_token"]
        name = f"{engine['name']} ¹: {engine['how']}"
        spans = [times[batch] for batch in BATCHES]
        lines.append(_row(name, rates, limit, spans, engine["ready_seconds"]))
    return "\n".join([*lines, "", *_notes(ours, latency, others)])


def _peers_of_the_run(ours: dict[str, Any], limit: float) -> Iterator[str]:
    for name, peer in ours.get("peers", {}).items():
        if "skipped" in peer:
            continue
        rates = [peer["output_tokens"] / seconds for seconds in peer["seconds"]]
        what = f"{name} {peer['version']}, in the same run: {peer['requests']} requests, "
        yield _row(what + peer["how"], rates, limit, [[], []], [peer["ready_seconds"]])


def _row(
    name: str, rates: list[float], limit: float, times: list[list[float]], ready: list[float]
) -> str:
    shares = _span([rate / limit for rate in rates], ".2f")
    cells = [_span([round(rate, -2 if rate > 9999 else 0) for rate in rates], ",.0f"), shares]
    cells += [_span(span, ".2f" if max(span, default=0) < 10 else ".0f") for span in times]
    cells.append(f"{_span(ready, '.0f')} s" if ready else "")
    return f"| {name} | {' | '.join(cells)} |"


def _span(values: list[float], form: str) -> str:
    ends = [format(end(values), form) for end in (min, max)] if values else [""]
    return " to ".join(dict.fromkeys(ends))


def _notes(ours: dict[str, Any], latency: dict[str, Any], others: dict[str, Any]) -> Iterator[str]:
    check, ceilings, work = ours["check"], ours["ceilings"], _work(ours)
    versions = {key: ours["versions"][key] for key in ("torch", "triton")}
    for key in (*versions, "python"):
        if ours["versions"][key] != latency["versions"][key]:
            raise ValueError(f"{key} differs between the two runs; measure both again")
    yield (
        f"{ours['requests']} requests at once, {ours['input_tokens']:,} tokens in and "
        f"{ours['output_tokens']:,} out, temperature 0.6; for the times, prompts of "
        f"{latency['input_tokens']} and answers of {latency['output_tokens']} tokens. Random "
        f"bfloat16 weights in the shapes of {ours['model']}. Where there are two "
        "figures, they are the lowest and the highest of several runs."
    )
    yield ""
    yield (
        f"minivllm: {ours['device']}, {_versions(versions)}, {_day(ours, latency)}, by "
        f"{_command(ours)} and {_command(latency)}. In the same run {check['tokens']:,} greedy "
        f"tokens were compared with chapter 2's model in float32: {check['likeliest_share']:.1%} "
        "are its likeliest, and the others fall short of that by no more than rounding explains."
    )
    yield ""
    yield (
        f"¹ On the same kind of machine on {others['date']}, not in the same run; "
        f"{_versions(others['versions'])}, the same workload."
    )
    yield ""
    copied = f"{ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    multiplied = f"{ceilings['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s"
    yield (
        f"The limit is arithmetic: {work.kv_bytes / 1e12:.2f} TB of keys and values and "
        f"{work.weight_bytes / 1e12:.2f} TB of weights at the {copied} that this machine copies, "
        f"and for the prompts {work.flop / 1e12:.0f} TFLOP at the {multiplied} of its large matrix "
        "products, both measured in the same run; for a token's time, one reading of all weights "
        "and of the keys and values."
    )


def _work(ours: dict[str, Any]) -> Work:
    """What the workload asks of the machine, counted as the benchmark counts it today."""
    config = _config(ours)
    workload = usual_workload(ours["requests"], vocab_size=config.vocab_size)
    asked = (workload.num_input_tokens, workload.num_output_tokens)
    if asked != (ours["input_tokens"], ours["output_tokens"]):
        raise ValueError(f"{ours['command']!r} did not run the usual workload of {asked} tokens")
    return work_of(workload, config, torch.bfloat16)


def _limit(ours: dict[str, Any]) -> float:
    """Output tokens a second that no engine can pass."""
    limits = ours["ceilings"]
    seconds = _work(ours).seconds(limits["copy_bytes_per_s"], limits["matmul_flop_per_s"])
    return ours["output_tokens"] / seconds


def _least_ms(ours: dict[str, Any], latency: dict[str, Any], batch: str) -> float:
    """Milliseconds to read all weights once, and the keys and values of a mean decode step."""
    config, size = _config(ours), torch.bfloat16.itemsize
    context = latency["input_tokens"] + latency["output_tokens"] / 2
    kv_token = 2 * config.num_layers * config.num_kv_heads * config.head_size * size
    read_bytes = matrix_parameters(config) * size + int(batch) * context * kv_token
    return 1e3 * read_bytes / ours["ceilings"]["copy_bytes_per_s"]


def _config(ours: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_hf(shape_config(ours["model"]))


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _day(*results: dict[str, Any]) -> str:
    return " and ".join(dict.fromkeys(result["date"].split()[0] for result in results))


def _command(result: dict[str, Any]) -> str:
    words = _PLACES.sub("", result["command"]).split()[1:]
    return f"`minivllm {' '.join(words)}`"


def _weights(result: dict[str, Any]) -> str:
    """Of which model a ladder is, and whether its weights are random."""
    model, dtype = result["model"], result["dtype"]
    random = "--shapes" in result["command"]
    return f"random {dtype} weights in the shapes of {model}" if random else f"{model} in {dtype}"


def ladders() -> str:
    """The pictures of the ladder that are there, each with its figures as text."""
    parts = []
    for name in LADDERS:
        picture = FOLDER / f"{name}.svg"
        if not picture.exists():
            continue
        result = read(picture.with_suffix(".json"))
        if not result["all_agree"]:
            raise ValueError(f"{name}: the rungs' tokens differ; measure again")
        rungs = ", ".join(
            f"{rung['name']} {_rate(rung['output_tokens_per_s'])}"
            for rung in result["rungs"]
            if "skipped" not in rung
        )
        work = result["workload"]
        parts.append(
            f"![Output tokens a second, chapter by chapter: {rungs}]"
            f"({picture.relative_to(ROOT).as_posix()})\n\n"
            f"{work['requests']} requests, {work['input_tokens']:,} tokens in and "
            f"{work['output_tokens']:,} out, with {_weights(result)} on "
            f"{result['device']}; torch {result['versions']['torch']}, {_day(result)}, by "
            f"{_command(result)}, which compares every token with chapter 2's model."
        )
    return "\n\n".join(parts)


def rungs(number: int) -> str:
    """The ladder as far as chapter ``number``, whose rungs are marked: a fenced block.

    Of each ladder that is there one column; a line below says of what and when.
    """
    ladders = [read(file) for name in LADDERS if (file := FOLDER / f"{name}.json").exists()]
    climbed = [
        [rung for rung in ladder["rungs"] if rung["chapter"] <= number] for ladder in ladders
    ]
    heads = ["CPU" if ladder["device_type"] == "cpu" else ladder["device"] for ladder in ladders]
    lines = ["The ladder so far, in output tokens/s (minivllm bench ladder):", ""]
    lines.append(f"{'':34}" + "".join(f"{head:>13}" for head in heads))
    for same in zip(*climbed, strict=True):
        rung = same[0]
        mark = ">" if rung["chapter"] == number else " "
        rates = ("-" if "skipped" in each else _rate(each["output_tokens_per_s"]) for each in same)
        label = f"{mark} {rung['key']:<2} {rung['name']}"
        lines.append(f"{label:34}" + "".join(f"{rate:>13}" for rate in rates))
    lines.append("")
    for head, ladder in zip(heads, ladders, strict=True):
        lines.append(f"{head}: {_weights(ladder)}, {_day(ladder)}")
    return "\n".join(["```text", *lines, "```"])


def climbing_texts() -> dict[int, Path]:
    """Number -> text of the chapters that have a rung."""
    steps = read(FOLDER / f"{LADDERS[0]}.json")["rungs"]
    return {
        number: next(FOLDER.glob(f"chapter{number:02}_*/README.md"))
        for number in dict.fromkeys(rung["chapter"] for rung in steps)
    }


def _rate(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"


# The marks in README.md, and what stands behind each.
BLOCKS = {"ladder": ladders, "engines": engines}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into the texts")
    arguments = parser.parse_args(argv)
    for mark, made in BLOCKS.items():
        if arguments.write:
            replace_block(ROOT / "README.md", mark, made())
        else:
            print(f"{made()}\n")
    for number, text in climbing_texts().items():
        if arguments.write:
            replace_block(text, "rung", rungs(number))
        else:
            print(f"{rungs(number)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
