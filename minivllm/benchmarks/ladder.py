"""``minivllm bench ladder``: the same prompts through every chapter's way of generating."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from minivllm.attention.paged_triton import triton_runs_on
from minivllm.benchmarks import ladder_rungs as rungs
from minivllm.benchmarks.harness import format_table
from minivllm.benchmarks.ladder_rungs import Answers, Bench, InAnEngine, OnPages
from minivllm.benchmarks.ladder_workload import ladder_workload, pick, subset_of
from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.benchmarks.shapes import shape_folder
from minivllm.benchmarks.svg import Bar, bar_chart, write_svg
from minivllm.benchmarks.workload import Margins, Workload, margins_of, verdict_of
from minivllm.engine.config import EngineConfig
from minivllm.models.config import ModelConfig
from minivllm.models.hub import model_folder
from minivllm.models.loader import load_model, random_model

# A way that takes longer than this is measured once.
LONG_ROUND_S = 3.0
# Chapter 3 in a batch works through the rows one by one, and each costs dozens of launches a layer.
MOST_ROWS = 16


@dataclass(frozen=True)
class Rung:
    """key: chapter and letter; serves: ``all`` requests, or where slow ``few`` or one ``batch``."""

    key: str
    name: str
    serves: str

    @property
    def chapter(self) -> int:
        return int(self.key[0])


RUNGS = (
    Rung("2", "recompute everything", "few"),
    Rung("3", "contiguous KV cache", "few"),
    Rung("3b", "the same, one fixed batch", "batch"),
    Rung("4", "flash prefill, one by one", "few"),
    Rung("5", "pages, fixed batches", "all"),
    Rung("6", "shared prefixes", "all"),
    Rung("7", "continuous batching", "all"),
    Rung("8", "CUDA graphs and overlap", "all"),
)


def run_ladder(
    *,
    model: str | None,
    shapes: str | None,
    device: str | None,
    dtype: str | None,
    num_requests: int | None,
    batch: int | None,
    subset: int,
    rounds: int,
    output: str | None,
    plot: str | None,
) -> dict[str, Any]:
    """Measure all rungs, compare their tokens, print a table and draw it.

    None means: the embedded model; the GPU if there is one; the checkpoint's dtype there and
    float32 on a CPU; 128 requests in batches of 32 on a GPU, 32 in batches of 8 on a CPU. Raises
    SystemExit, after the report is written, if any rung chose a token that it should not have.
    """
    bench, workload = _set_up(model, shapes, device, dtype, num_requests, batch)
    places = {
        "few": subset_of(workload, subset),
        "batch": subset_of(workload, min(bench.batch, MOST_ROWS)),
        "all": list(range(len(workload.prompts))),
    }
    results: list[dict[str, Any]] = []
    answers: list[tuple[list[int], Answers]] = []
    from tqdm.auto import tqdm

    with tqdm(RUNGS, desc="ladder", unit="rung") as bar:
        for rung in bar:
            bar.set_postfix_str(f"chapter {rung.chapter}: {rung.name}")
            reason = _cannot(rung, bench)
            facts = {"chapter": rung.chapter, "key": rung.key, "name": rung.name}
            if reason is not None:
                results.append({**facts, "skipped": reason})
                answers.append(([], []))
                continue
            which = places[rung.serves]
            chosen = pick(workload, which)
            seconds, found = _measure(rung, bench, chosen, rounds)
            median = statistics.median(seconds)
            results.append(
                {
                    **facts,
                    "requests": len(chosen.prompts),
                    "output_tokens": chosen.num_output_tokens,
                    "seconds": seconds,
                    "output_tokens_per_s": chosen.num_output_tokens / median,
                }
            )
            answers.append((which, found))
    good = _compare(bench, workload, results, answers)
    report = {
        "benchmark": "ladder",
        "model": shapes or model or "the embedded tiny Qwen3",
        "dtype": bench.dtype,
        "device_type": bench.device.type,
        "workload": {
            "description": " ".join((ladder_workload.__doc__ or "").split()),
            "requests": len(workload.prompts),
            "input_tokens": workload.num_input_tokens,
            "output_tokens": workload.num_output_tokens,
            "longest_prompt": max(map(len, workload.prompts)),
            "longest_answer": max(workload.max_tokens),
            "batch": bench.batch,
            "served_one_by_one": places["few"],
            "served_in_one_batch": places["batch"],
            "kv_blocks": bench.num_blocks,
            "block_size": bench.block_size,
        },
        "rungs": results,
        "all_agree": good,
    }
    print(_table(results))
    write_report(output, report)
    write_svg(plot, draw({**machine_facts(), **report}))
    if not good:
        raise SystemExit("minivllm: the rungs' tokens DIFFER by more than rounding: see above")
    return report


def draw(report: dict[str, Any]) -> str:
    """The report as one picture, on a logarithmic scale."""
    bars = []
    for number, rung in enumerate(report["rungs"]):
        label = f"{rung['key']}  {rung['name']}"
        if "skipped" in rung:
            bars.append(Bar(label, None, f"skipped: {rung['skipped']}"))
        else:
            factor = rung.get("times_chapter_2")
            bars.append(
                Bar(
                    label,
                    rung["output_tokens_per_s"],
                    f"{factor:,.{1 if factor < 100 else 0}f}x",
                    colour=number % 7,
                )
            )
    work = report["workload"]
    few, batch = len(work["served_one_by_one"]), len(work["served_in_one_batch"])
    return bar_chart(
        "Output tokens a second, chapter by chapter",
        bars,
        unit="tokens/s",
        log=True,
        notes=[
            f"{report['model']}, {report['dtype']}, on {report['device']}, {report['date']}",
            f"{work['requests']} greedy requests, {work['input_tokens']:,} tokens in and "
            f"{work['output_tokens']:,} out, at most {work['batch']} at a time; "
            f"2, 3 and 4 serve {few} of them one by one, 3b {batch}",
        ],
    )


def _set_up(
    model: str | None,
    shapes: str | None,
    device: str | None,
    dtype: str | None,
    num_requests: int | None,
    batch: int | None,
) -> tuple[Bench, Workload]:
    if model is not None and shapes is not None:
        raise ValueError(f"model={model!r} and shapes={shapes!r} exclude each other; give one")
    settings = EngineConfig(device=device or "auto", dtype=dtype or "auto")
    where = settings.resolve_device()
    on_gpu = where.type == "cuda"
    folder = shape_folder(shapes) if shapes is not None else model_folder(model)
    # No end token: the work is to be the same whatever the model says.
    config = replace(ModelConfig.from_folder(folder), eos_token_ids=())
    kind = settings.resolve_dtype(config.dtype, where)
    if shapes is not None:
        plain = random_model(config, dtype=kind, device=where)
    else:
        plain = load_model(folder, config, dtype=kind, device=where)
    count = num_requests if num_requests is not None else (128 if on_gpu else 32)
    workload = ladder_workload(count, scale=2 if on_gpu else 1, vocab_size=config.vocab_size)
    width = min(batch or (32 if on_gpu else 8), count)
    longest = max(
        len(prompt) + most
        for prompt, most in zip(workload.prompts, workload.max_tokens, strict=True)
    )
    if longest > config.max_positions:
        raise ValueError(
            f"the longest request has {longest} tokens, but the model only {config.max_positions} "
            "positions; choose a model with a longer context"
        )
    block_size = settings.resolve_block_size(where)
    bench = Bench(
        model=plain,
        folder=folder,
        load_format="dummy" if shapes is not None else "auto",
        dtype=str(kind).removeprefix("torch."),
        device=where,
        max_len=longest + 1,
        batch=width,
        block_size=block_size,
        # For every batch at its longest, and as much again for prefixes that are kept.
        num_blocks=2 * width * -(-(longest + 1) // block_size),
    )
    return bench, workload


def _cannot(rung: Rung, bench: Bench) -> str | None:
    """Why this rung cannot run here, if so."""
    if rung.chapter != 8:
        return None
    if bench.device.type != "cuda":
        return "CUDA graphs need a GPU"
    return None if triton_runs_on(bench.device) else "it needs Triton, which does not run here"


def _measure(
    rung: Rung, bench: Bench, workload: Workload, rounds: int
) -> tuple[list[float], Answers]:
    """Seconds of each round after a short one that warms up, and the last round's answers."""
    on_gpu = bench.device.type == "cuda"
    if rung.key in ("7", "8"):
        with closing(InAnEngine(bench, graphs=rung.key == "8")) as engine:
            return _time(engine, workload, rounds, on_gpu=on_gpu)
    if rung.key in ("5", "6"):
        way = OnPages(bench, prefix_caching=rung.key == "6")
        return _time(way, workload, rounds, on_gpu=on_gpu)
    ways = {
        "2": rungs.recompute,
        "3": rungs.contiguous,
        "3b": rungs.contiguous_batches,
        "4": rungs.flash_prefill,
    }
    return _time(partial(ways[rung.key], bench), workload, rounds, on_gpu=on_gpu)


def _time(
    way: Callable[[Workload], Answers], workload: Workload, rounds: int, *, on_gpu: bool
) -> tuple[list[float], Answers]:
    # Kernels are compiled and buffers found at the shapes to come, but hardly any token is made.
    few = workload.prompts[: None if on_gpu else 2]
    way(Workload(few, [2] * len(few)))
    seconds: list[float] = []
    answers: Answers = []
    while len(seconds) < rounds and (not seconds or seconds[-1] < LONG_ROUND_S):
        began = time.perf_counter()
        answers = way(workload)
        seconds.append(time.perf_counter() - began)
    return seconds, answers


def _compare(
    bench: Bench,
    workload: Workload,
    results: list[dict[str, Any]],
    answers: list[tuple[list[int], Answers]],
) -> bool:
    """Hold every rung to the first one that served the request, and all to the plain model.

    Adds what is found to ``results``. In float32 the answers must be equal; in 16 bits two logits
    may round to a tie, and a token need only be the likeliest within rounding.
    """
    first: dict[int, list[int]] = {}
    # Most answers are the same at all rungs, and are read only once.
    known: dict[tuple[int, tuple[int, ...]], Margins] = {}
    good = True
    base = results[0]["output_tokens_per_s"]
    for result, (places, found) in zip(results, answers, strict=True):
        if "skipped" in result:
            continue
        margins, equal = [], 0
        for place, answer in zip(places, found, strict=True):
            assert len(answer) == workload.max_tokens[place]
            equal += first.setdefault(place, answer) == answer
            key = place, tuple(answer)
            if key not in known:
                known[key] = margins_of(bench.model, workload.prompts[place], answer)
            margins.append(known[key])
        result["equal_answers"] = equal
        result["check"] = verdict_of(margins)
        result["times_chapter_2"] = result["output_tokens_per_s"] / base
        exact = bench.dtype != "float32" or equal == len(found)
        good = good and exact and bool(result["check"]["agrees"])
    return good


def _table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        label = f"{result['key']:3}{result['name']}"
        if "skipped" in result:
            rows.append([label, "skipped", result["skipped"], "", "", ""])
            continue
        check = result["check"]
        rows.append(
            [
                label,
                f"{result['output_tokens_per_s']:,.1f}",
                f"{result['times_chapter_2']:,.2f}",
                str(result["requests"]),
                f"{result['equal_answers']} of {result['requests']}",
                f"{'agrees' if check['agrees'] else 'DIFFERS'} ({check['worst_shortfall']:.1e})",
            ]
        )
    headers = ["chapter", "tokens/s", "x chapter 2", "requests", "equal", "plain model (worst)"]
    return format_table(headers, rows)
