"""The pictures of chapter 4, for its text and its notebook.

    python -m chapters.chapter04_flash_attention.figures    # writes figures/*.svg beside this file

What a kernel did is drawn from recordings of the real kernel in Triton's interpreter; memory and
speed are those of ``attention_prefill_h200.json``, which ``minivllm bench prefill`` wrote.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import nn

from chapters.chapter04_flash_attention import toy
from chapters.machine.source import find

FOLDER = Path(__file__).parent
KERNELS = FOLDER.parents[1] / "minivllm" / "attention" / "flash_kernels.py"
MEASURED = FOLDER / "attention_prefill_h200.json"
sys.path.append(str(FOLDER.parents[1] / "notebooks"))

from drawing import INK, PALETTE, write_figures  # noqa: E402
from recorder import Program, Recorder  # noqa: E402

BLUE, ORANGE, GREEN, RED, PURPLE = PALETTE[:5]


# ---- recordings ----------------------------------------------------------------------------------


def record(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    tile: tuple[int, int],
) -> Recorder:
    """Run the real kernel on q [T, H, D], k, v [T, G, D] and watch what each step computes.

    tile: rows of queries and of keys. The interpreter takes any; a GPU wants 16 at least.
    """
    from minivllm.attention.flash_kernels import FlashTile, flash_attention_tiled

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}
    watch = ("scores", "new_max", "shrink", "weights", "row_sum", "acc")
    with Recorder(tensors, register_arguments=True, watch=watch) as rec:
        flash_attention_tiled(
            q,
            k,
            v,
            cu_seqlens,
            scale=scale,
            max_seqlen=max(lengths),
            tile=FlashTile(*tile, num_warps=4, num_stages=2),
        )
    return rec


def record_toy() -> Recorder:
    """The toy's six tokens, in tiles of 2 x 2."""
    return record(toy.Q, toy.K, toy.V, [6], toy.SCALE, (toy.TILE, toy.TILE))


def record_random(lengths: Sequence[int], tile: tuple[int, int]) -> Recorder:
    """Random sequences with 4 query heads on 2 KV heads of 8 numbers."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(lengths), 4, 8, generator=generator)
    k, v = torch.randn(2, sum(lengths), 2, 8, generator=generator)
    return record(q, k, v, lengths, 8**-0.5, tile)


def layer_inputs(model: nn.Module, token_ids: list[int], layer: int) -> tuple[torch.Tensor, ...]:
    """What attention gets in one layer of a model on one sequence: q [T, H, D], k, v [T, G, D]."""
    from minivllm.attention.naive import naive_attention

    found = {}

    def attend(at: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found[at] = q, k, v
        return naive_attention(q, k, v, model.config.head_size**-0.5)

    with torch.inference_mode():
        model(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
    return tuple(tensor.clone() for tensor in found[layer])


@dataclass(frozen=True)
class Step:
    """What one program computed on one tile. Rows are the program's queries.

    scores, weights: [rows, keys]; row_max (as a log2), shrink, row_sum: [rows];
    acc: [rows, padded head size].
    """

    scores: np.ndarray
    row_max: np.ndarray
    shrink: np.ndarray
    weights: np.ndarray
    row_sum: np.ndarray
    acc: np.ndarray


def steps(rec: Recorder, program: Program) -> list[Step]:
    """The steps of one program, in order: the local variables of ``attend_to_tile``."""
    helper = find(KERNELS.read_text(encoding="utf-8"), "attend_to_tile")
    inside = [
        shot
        for shot in rec.snapshots
        if shot.program == program and helper.first <= shot.line <= helper.last
    ]

    def bound(name: str) -> list[np.ndarray]:
        return [shot.value for shot in inside if shot.name == name]

    # The scores are masked after their product, acc grows after it shrank: the second counts.
    columns = (
        bound("scores")[1::2],
        bound("new_max"),
        bound("shrink"),
        bound("weights"),
        bound("row_sum"),
        bound("acc")[1::2],
    )
    return [Step(*values) for values in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Visit:
    """One program's rows and the keys that it loaded for them, tile by tile (of one sequence)."""

    program: Program
    rows: range
    tiles: tuple[range, ...]


def visits(rec: Recorder, head: int = 0, seq: int = 0, begin: int = 0) -> list[Visit]:
    """Who loaded what of one sequence, in the order in which the programs ran.

    begin: the sequence's first token in the flattened batch; the ranges count from there.
    """
    found = []
    for program, loads in rec.loads_by_program("k").items():
        if program[1:] != (head, seq) or not loads:
            continue
        rows = np.concatenate([e.index[0] for e in rec.stores_by_program("out_ptr")[program]])
        tiles = tuple(_span(event.index[0] - begin) for event in loads)
        found.append(Visit(program, _span(rows - begin), tiles))
    return found


def _span(tokens: np.ndarray) -> range:
    return range(int(tokens.min()), int(tokens.max()) + 1)


# ---- the toy -------------------------------------------------------------------------------------


def draw_toy(rec: Recorder) -> Figure:
    """The tiles that the toy's programs loaded, and the last row's denominator tile by tile."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.5), width_ratios=(1, 1.25))
    _draw_toy_tiles(left, rec)
    _draw_toy_sums(right, steps(rec, (0, 0, 0)))
    figure.tight_layout(w_pad=3)
    return figure


def _draw_toy_tiles(ax: Axes, rec: Recorder) -> None:
    size, tile = len(toy.Q), toy.TILE
    loaded = {(visit.rows.start, keys.start) for visit in visits(rec) for keys in visit.tiles}
    for row in range(0, size, tile):
        for col in range(0, size, tile):
            if (row, col) not in loaded:
                _frame(ax, col + 0.1, row + 0.1, tile - 0.2, tile - 0.2)
                middle = col + tile / 2, row + tile / 2
                ax.text(*middle, "never\nloaded", ha="center", va="center", size=8)
    for order, visit in enumerate(visits(rec)):
        colour = PALETTE[order]
        held = steps(rec, visit.program)
        for keys, step in zip(visit.tiles, held, strict=True):
            for i, row in enumerate(visit.rows):
                for j, key in enumerate(keys):
                    hidden = not np.isfinite(step.scores[i, j])
                    box = Rectangle((key + 0.06, row + 0.06), 0.88, 0.88, ec="none")
                    box.set_facecolor((*to_rgba(colour)[:3], 0.25 if hidden else 1.0))
                    ax.add_patch(box)
                    text = "" if hidden else f"{step.scores[i, j]:g}"
                    ax.text(key + 0.5, row + 0.5, text, ha="center", va="center", color="white")
        middle = (visit.rows.start + visit.rows.stop) / 2
        ax.text(
            size + 0.25, middle, f"program {visit.program[0]}", color=colour, va="center", size=9
        )
    ax.set(xlim=(-0.1, size + 0.1), ylim=(size + 0.1, -0.1), ylabel="query")
    ax.set_aspect("equal")
    ax.set_xticks(np.arange(size) + 0.5, range(size))
    ax.set_yticks(np.arange(size) + 0.5, range(size))
    ax.tick_params(length=0)
    ax.xaxis.tick_top()
    ax.spines[:].set_visible(False)
    ax.set_title("dot products, tile by tile (keys across)", pad=22)


def _frame(ax: Axes, x: float, y: float, width: float, height: float) -> None:
    ax.add_patch(Rectangle((x, y), width, height, fc="none", ec=INK, ls=(0, (2, 1.5)), lw=0.8))


def _draw_toy_sums(ax: Axes, held: Sequence[Step]) -> None:
    before = 0.0
    white = {"color": "white", "ha": "center", "va": "center"}
    for place, step in enumerate(held):
        total, shrink = float(step.row_sum[-1]), float(step.shrink[-1])
        old = before * shrink
        ax.bar(place, old, width=0.55, color=BLUE)
        ax.bar(place, total - old, width=0.55, bottom=old, color=ORANGE)
        if place:
            ax.text(place, old / 2, f"{before:g} × {shrink:g}", **white)
        new = " + ".join(f"{weight:g}" for weight in step.weights[-1])
        ax.text(place, (old + total) / 2, new, **white)
        ax.text(place, total + 0.08, f"{total:g}", ha="center", va="bottom", weight="bold")
        before = total
    ax.set_xticks(
        range(len(held)),
        [f"tile {i}\nmaximum {float(step.row_max[-1]):.0f}" for i, step in enumerate(held)],
    )
    ax.set(xlim=(-0.5, len(held) - 0.5), ylim=(0, 4.9), yticks=[])
    ax.tick_params(length=0)
    ax.spines["left"].set_visible(False)
    ax.set_title("the denominator of query 5", pad=22)
    handles = [Patch(fc=BLUE, label="earlier tiles, shrunk"), Patch(fc=ORANGE, label="this tile")]
    ax.legend(handles=handles, loc="upper left", fontsize=9)


# ---- larger recordings ---------------------------------------------------------------------------


def draw_tiles(rec: Recorder, lengths: Sequence[int], head: int = 0) -> Figure:
    """Which tiles of keys each program of one head loaded, numbered in its order of loading."""
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(8.6, 4.0), squeeze=False, width_ratios=lengths
    )
    for seq, (ax, length) in enumerate(zip(axes[0], lengths, strict=True)):
        for order, visit in enumerate(visits(rec, head, seq, sum(lengths[:seq]))):
            colour = PALETTE[order % len(PALETTE)]
            top, height = visit.rows.start, len(visit.rows)
            for number, keys in enumerate(visit.tiles):
                box = Rectangle((keys.start + 0.3, top + 0.3), len(keys) - 0.6, height - 0.6)
                box.set(fc=colour, ec="none")
                ax.add_patch(box)
                x, y = keys.start + len(keys) / 2, top + height / 2
                ax.text(x, y, str(number), ha="center", va="center", color="white")
            ax.text(
                length + 1, top + height / 2, f"{visit.program}", color=colour, va="center", size=8
            )
        ax.set(xlim=(0, length), ylim=(max(lengths), 0), xlabel="key", ylabel="query row")
        ax.xaxis.set_label_position("top")
        ax.xaxis.tick_top()
        ax.set_aspect("equal")
        ax.set_anchor("NW")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ticks = sorted({0, length, *(visit.rows.start for visit in visits(rec, head, seq))})
        ax.set_xticks([tick for tick in ticks if tick <= length])
        ax.set_yticks([tick for tick in ticks if tick <= length])
        ax.set_title(f"sequence {seq}: {length} tokens")
    figure.tight_layout(w_pad=4)
    return figure


def draw_running(held: Mapping[int, Sequence[Step]], row: int, names: Sequence[str]) -> Figure:
    """The running maximum and denominator of one row, as they stand after each tile.

    held: the steps of one program for each head; row: which of the program's rows.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.9))
    for mine, name, colour in zip(held.values(), names, PALETTE, strict=False):
        tiles = range(len(mine))
        axes[0].plot(tiles, [step.row_max[row] for step in mine], "o-", color=colour, label=name)
        axes[1].plot(tiles, [step.row_sum[row] for step in mine], "o-", color=colour)
        for ax in axes:
            ax.set_xticks(tiles)
    axes[0].set_title("running maximum (as a log2)")
    axes[1].set_title("running denominator")
    for ax in axes:
        ax.set_xlabel("after tile")
        ax.grid(axis="y")
    axes[0].legend(fontsize=8.5)
    figure.tight_layout(w_pad=3)
    return figure


def draw_reads(rec: Recorder, name: str = "k") -> Axes:
    """How often every token's share of each KV head was read."""
    times = rec.times_read(name)
    assert (times == times[..., :1]).all(), "the numbers of a head are read together"
    times = times[..., 0].T  # [G, T]
    seen = sorted({int(n) for n in times.flat}, reverse=True)
    _, ax = plt.subplots(figsize=(8.6, 0.35 * len(times) + 0.75))
    for (head, token), count in np.ndenumerate(times):
        colour = PALETTE[seen.index(int(count)) % len(PALETTE)]
        ax.add_patch(Rectangle((token + 0.05, head + 0.05), 0.9, 0.9, fc=colour, ec="none"))
    ax.set(xlim=(0, times.shape[1]), ylim=(len(times), 0), xlabel="token")
    ax.set_yticks(np.arange(len(times)) + 0.5, [f"KV head {head}" for head in range(len(times))])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    handles = [
        Patch(fc=PALETTE[i % len(PALETTE)], label=f"{count} times") for i, count in enumerate(seen)
    ]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
    ax.set_title(f"how often {name} is read")
    return ax


# ---- measured ------------------------------------------------------------------------------------


def measured() -> dict[str, Any]:
    """What ``minivllm bench prefill`` wrote on an H200."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))


# Forms of the file, under the names that the course's texts use.
MEMORY_FORMS = {
    "PyTorch, all scores": ("naive attention, PyTorch", RED, "o"),
    "Triton, tiles": ("the Triton kernel", BLUE, "s"),
}


def draw_memory(result: dict[str, Any]) -> Figure:
    """Memory beyond the inputs by length, on axes where a square law is twice as steep."""
    figure, ax = plt.subplots(figsize=(7.6, 3.4))
    for form, (name, colour, marker) in MEMORY_FORMS.items():
        points = [(r["length"], r["peak_bytes"]) for r in result["memory"] if r["form"] == form]
        lengths, sizes = zip(*sorted(points), strict=True)
        ax.plot(lengths, [size / 2**20 for size in sizes], marker + "-", color=colour, label=name)
    every = sorted({r["length"] for r in result["memory"]})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(every, [f"{length // 1024}k" for length in every])
    marks = [2**exponent for exponent in range(2, 18, 3)]
    ax.set_yticks(marks, [f"{m} MiB" if m < 1024 else f"{m // 1024} GiB" for m in marks])
    ax.minorticks_off()
    ax.grid()
    ax.set(xlabel="tokens of one prompt", ylabel="beyond the inputs, one layer")
    ax.set_title(f"{result['device']}, {result['shape']['num_heads']} query heads, bfloat16")
    ax.legend()
    return figure


RATE_FORMS = {
    "PyTorch, all scores": ("naive attention, PyTorch", RED, "o"),
    "Triton, tiles": ("your kernel", BLUE, "s"),
    "Hopper": ("the Hopper kernel", GREEN, "D"),
    "SDPA flash": ("PyTorch's own, flash", ORANGE, "v"),
    "SDPA cuDNN": ("PyTorch's own, cuDNN", PURPLE, "^"),
}


def draw_rates(result: dict[str, Any]) -> Figure:
    """TFLOP/s by length, under what a large matrix product reaches."""
    figure, ax = plt.subplots(figsize=(7.6, 3.6))
    lengths = sorted({r["length"] for r in result["records"]})
    for form, (name, colour, marker) in RATE_FORMS.items():
        points = [(r["length"], r["tflop_per_s"]) for r in result["records"] if r["form"] == form]
        ax.plot(*zip(*sorted(points), strict=True), marker + "-", color=colour, label=name)
    ceiling = result["ceilings"]["matmul_flop_per_s"] / 1e12
    ax.axhline(ceiling, color=INK, ls=":", lw=1.5)
    # Below the line: above it the grid's next line would run through the words.
    ax.text(lengths[0], 0.985 * ceiling, "a large matrix product", va="top", size=8.5)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.minorticks_off()
    ax.grid(axis="y")
    ax.set(xlabel="tokens of a prompt", ylabel="TFLOP/s", ylim=(0, 1.1 * ceiling))
    ax.set_title(f"causal prefill, {result['device']}")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
    return figure


def all_figures() -> dict[str, Figure]:
    """The figures of the text, by file name."""
    return {"toy.svg": draw_toy(record_toy()), "memory.svg": draw_memory(measured())}


def main(folder: Path = FOLDER / "figures") -> None:
    write_figures(all_figures, folder)


if __name__ == "__main__":
    # Triton reads this when it is first imported; the recorder needs the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    main()
