"""The pictures of chapter 9, for its text and its notebook.

    python -m chapters.chapter09_tensor_parallelism.figures    # writes figures/*.svg

Who owns what is drawn from what the package's layers ask of a checkpoint, the exchanges from what
the engine's own ranks said. The timed ones are drawn from reports (see ``results``).
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from chapters.chapter09_tensor_parallelism import results, toy
from chapters.chapter09_tensor_parallelism.crew import Step, talk
from chapters.chapter09_tensor_parallelism.threads import Meeting, ThreadGroup, Word
from minivllm.distributed.parallel_layers import QKVParallelLinear, shard_model, share_of
from minivllm.layers.checkpoint import CheckpointSource
from minivllm.layers.linear import QKVLinear
from minivllm.models.config import ModelConfig
from minivllm.models.loader import checkpoint_sources, model_class

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "notebooks"))

from drawing import EMPTY, INK, PALETTE, write_figures  # noqa: E402

# One for each rank; what all of them have is of no colour.
RANKS = PALETTE[:4]
WORK, EXCHANGE, LEAST = PALETTE[0], PALETTE[1], PALETTE[2]

# ---- the toy -------------------------------------------------------------------------------------


def draw_mlp(size: int = 2) -> Figure:
    """The toy on ``size`` ranks: who has which numbers, both summands and their sum."""
    parts, _ = toy.run_mlp(size)
    figure, ax = plt.subplots(figsize=(8.8, 2.75))
    share = len(toy.UP) // size
    row_of = [RANKS[row // share] for row in range(len(toy.UP))]
    _grid(ax, 0.0, 1.0, toy.X[:, None].tolist(), [[EMPTY]] * 2, "x")
    ax.annotate("", (5.15, 2), (4.15, 2), arrowprops={"arrowstyle": "->", "color": INK})
    ax.text(4.6, 1.75, "relu", ha="center", fontsize=8.5)
    _grid(ax, 2.0, 0.0, toy.UP.tolist(), [[colour] * 2 for colour in row_of], "up")
    hidden = [[value] for part in parts for value in part.hidden]
    _grid(ax, 5.3, 0.0, hidden, [[colour] for colour in row_of], "hidden")
    _grid(ax, 7.4, 1.0, toy.DOWN.tolist(), [row_of] * 2, "down")
    x = 12.6
    for rank, part in enumerate(parts):
        column = [[value] for value in part.summand]
        _grid(ax, x, 1.0, column, [[RANKS[rank]]] * 2, f"rank {rank}'s")
        last = rank == size - 1
        ax.text(x + 1.5, 2.0, "=" if last else "+", ha="center", va="center", fontsize=13)
        x += 2.0
    _grid(ax, x, 1.0, [[value] for value in parts[0].out], [[EMPTY]] * 2, "out")
    ax.text(x + 0.5, 3.55, "on every rank", ha="center", fontsize=8.5)
    ax.text(3.0, 4.45, "cut by outputs: rows", ha="center", fontsize=8.5)
    ax.text(5.8, 4.45, "no word", ha="center", fontsize=8.5)
    ax.text(9.4, 4.45, "cut by inputs: columns", ha="center", fontsize=8.5)
    ax.text(14.6, 4.45, "all-reduce", ha="center", fontsize=8.5, weight="bold", color=EXCHANGE)
    handles = [Patch(fc=RANKS[rank], label=f"rank {rank}") for rank in range(size)]
    ax.legend(handles=handles, loc="upper right", bbox_to_anchor=(1.02, 1.05), fontsize=8.5)
    ax.set(xlim=(-0.2, x + 1.6), ylim=(4.8, -0.7))
    ax.set_aspect("equal")
    ax.axis("off")
    return figure


def _grid(
    ax: Axes,
    left: float,
    top: float,
    values: Sequence[Sequence[float]],
    colours: Sequence[Sequence[Any]],
    title: str,
) -> None:
    for row, (numbers, shades) in enumerate(zip(values, colours, strict=True)):
        for column, (number, shade) in enumerate(zip(numbers, shades, strict=True)):
            x, y = left + column, top + row
            ax.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, fc=shade, ec="none"))
            ink = INK if shade is EMPTY else "white"
            style = {"ha": "center", "va": "center", "color": ink, "weight": "bold"}
            ax.text(x + 0.5, y + 0.52, f"{number:g}", fontsize=11, **style)
    middle = left + len(values[0]) / 2
    ax.text(middle, top - 0.25, title, ha="center", fontsize=9.5, weight="bold")


# ---- heads ---------------------------------------------------------------------------------------


def heads_of(heads: int, kv_heads: int, size: int) -> list[tuple[list[int], list[int]]]:
    """(query heads, KV heads) of every rank, as the package's layer asks for them."""
    found = []
    for rank in range(size):
        own = QKVLinear(1, heads // size, max(1, kv_heads // size), 1, **toy.FLOAT)
        layer = QKVParallelLinear(own, ThreadGroup(Meeting(size), rank), kv_heads)
        slices = {
            source.name.split(".")[1]: range(source.shape[0])[source.index[0]]
            for source in layer.checkpoint_sources("attn.qkv_proj")
        }
        found.append((list(slices["q_proj"]), list(slices["k_proj"])))
    return found


def draw_heads(heads: int = 4, kv_heads: int = 2, sizes: Sequence[int] = (1, 2, 4)) -> Figure:
    """Each rank a box with its query heads above the KV heads that those look at."""
    figure, axes = plt.subplots(1, len(sizes), figsize=(8.8, 2.0))
    for ax, size in zip(axes, sizes, strict=True):
        step = heads / size
        for rank, (queries, keys) in enumerate(heads_of(heads, kv_heads, size)):
            left, width = rank * step, step - 0.12
            ax.add_patch(Rectangle((left, 0), width, 2.5, fc=RANKS[rank], ec="none", alpha=0.25))
            ax.text(left + width / 2, 2.8, f"rank {rank}", ha="center", fontsize=8.5)
            for row, (kind, found) in enumerate((("q", queries), ("kv", keys))):
                cell = width / len(found)
                for place, head in enumerate(found):
                    box = (left + place * cell + 0.06, 0.15 + 1.2 * row), cell - 0.12, 1.0
                    ax.add_patch(Rectangle(*box, fc=RANKS[rank], ec="none"))
                    middle = left + (place + 0.5) * cell
                    style = {"ha": "center", "va": "center", "color": "white", "fontsize": 8.5}
                    ax.text(middle, 0.66 + 1.2 * row, f"{kind}{head}", weight="bold", **style)
        copies = max(1, size // kv_heads)
        title = f"{size} rank{'s' * (size > 1)}"
        ax.set_title(title + (f": each KV head {copies} times" if copies > 1 else ""))
        ax.set(xlim=(-0.05, heads), ylim=(3.1, -0.1))
        ax.axis("off")
    figure.tight_layout()
    return figure


# ---- shares of a whole model ---------------------------------------------------------------------


def shares_of(config: ModelConfig, size: int) -> list[dict[str, CheckpointSource]]:
    """For every rank: tensor of the checkpoint -> which slice of it the rank asks for."""
    return [share_of_rank(config, rank, size) for rank in range(size)]


def share_of_rank(config: ModelConfig, rank: int, size: int) -> dict[str, CheckpointSource]:
    """Tensor of the checkpoint -> which slice of it this rank asks for."""
    share = model_class(config.architecture)(share_of(config, size), device="meta")
    model = shard_model(share, config, ThreadGroup(Meeting(size), rank))
    return {source.name: source for source in checkpoint_sources(model)}


def draw_shards(config: ModelConfig, size: int) -> Figure:
    """The tensors of one layer, and those around the layers, to scale; coloured by their owners."""
    every = shares_of(config, size)
    inside = "model.layers.0."
    names = [name for name in every[0] if len(every[0][name].shape) == 2]
    around = [name for name in names if not name.startswith("model.layers.")]
    inner = [name for name in names if name.startswith(inside)]
    scale = 5.2 / max(every[0][name].shape[0] for name in names)
    figure, ax = plt.subplots(figsize=(8.6, 5.0))
    x = 0.0
    for name in around:
        x += _draw_tensor(ax, name, every, (x, 0.0), scale) + 1.1
    ends = [x]
    for y, part in ((0.0, "attn"), (2.5, "mlp")):
        at = x
        for name in (name for name in inner if part in name):
            at += _draw_tensor(ax, name, every, (at, y), scale) + 0.6
        ends.append(at)
    handles = [Patch(fc=RANKS[rank], label=f"rank {rank}") for rank in range(size)]
    ax.legend(handles=handles, loc="lower right", fontsize=9, ncols=size)
    ax.set(xlim=(-0.3, max(ends)), ylim=(5.9, -0.5))
    ax.set_aspect("equal")
    ax.axis("off")
    return figure


def _draw_tensor(
    ax: Axes,
    name: str,
    every: Sequence[dict[str, CheckpointSource]],
    corner: tuple[float, float],
    scale: float,
) -> float:
    """A tensor and who asks for which part of it; what several ask for is striped. Its width."""
    (x, y), (rows, columns) = corner, every[0][name].shape
    height, width = rows * scale, columns * scale
    owners: dict[tuple[Any, ...], list[int]] = {}
    for rank, tensors in enumerate(every):
        spans = [*tensors[name].index, slice(None)][:2]
        edges = [span.indices(n)[:2] for span, n in zip(spans, (rows, columns), strict=True)]
        owners.setdefault(tuple(edges), []).append(rank)
    for ((top, bottom), (left, right)), ranks in owners.items():
        # So many stripes that nobody takes them for columns.
        stripes = len(ranks) * (6 if len(ranks) > 1 else 1)
        part = (right - left) * scale / stripes
        for stripe in range(stripes):
            at = x + left * scale + stripe * part, y + top * scale
            look = {"fc": RANKS[ranks[stripe % len(ranks)]], "ec": "none", "alpha": 0.9}
            ax.add_patch(Rectangle(at, part, (bottom - top) * scale, **look))
    label = name.removesuffix(".weight").rpartition(".")[2]
    ax.text(x + width / 2, y - 0.1, label, ha="center", va="bottom", fontsize=9, weight="bold")
    text = f"{rows:,} × {columns:,}"
    ax.text(x + width / 2, y + height + 0.06, text, ha="center", va="top", fontsize=8)
    return max(width, 0.7)


def bytes_of_rank(config: ModelConfig, size: int, itemsize: int = 2) -> int:
    """What the weights of rank 0 of ``size`` weigh."""
    sources = share_of_rank(config, 0, size).values()
    return sum(source.target.numel() for source in sources) * itemsize


# ---- one step ------------------------------------------------------------------------------------

PROMPTS = ([10, 11, 12, 13], [40, 41, 42])


def a_step(ranks: int = 2) -> Step:
    """A decode step of two sequences of the embedded model."""
    return next(step for step in talk(ranks, list(PROMPTS)).steps if step.decodes)


def draw_step(step: Step, ranks: int = 2, layers_shown: int = 1) -> Figure:
    """Lanes of ranks from left to right: what each computes alone, and every word between them."""
    figure, ax = plt.subplots(figsize=(9.2, 2.3))
    shown, left_out = [], 0
    for word in step.words:
        layer = word.who.split(".")[1] if word.who.startswith("layers.") else ""
        if layer and layers_shown <= int(layer):
            left_out += 1
            continue
        shown.append(word)
    x = 1.9
    _word(ax, 0.95, ranks, f"step\n{len(step.message)} bytes", arrow=True)
    for number, word in enumerate(shown):
        sampler = word.kind == "all_gather"
        if sampler and left_out:
            ax.text(x + 0.65, ranks / 2, "...", ha="center", va="center", fontsize=14)
            text = f"{left_out} sums of\n{left_out // 2} layers"
            ax.text(x + 0.65, ranks / 2 + 0.15, text, ha="center", va="top", fontsize=7.5)
            x += 1.5
        width = 1.0 if number == 0 else 1.95
        for rank in range(ranks):
            box = (x, rank + 0.12), width, 0.76
            ax.add_patch(Rectangle(*box, fc=RANKS[rank], ec="none", alpha=0.85))
            style = {"ha": "center", "va": "center", "color": "white", "fontsize": 7.5}
            ax.text(x + width / 2, rank + 0.5, _alone(word), weight="bold", **style)
        x += width
        sign = "gather" if sampler else "sum"
        _word(ax, x + 0.45, ranks, f"{sign}\n{word.nbytes:,} bytes")
        x += 0.9
    ax.text(x + 0.1, ranks / 2, "tokens", va="center", fontsize=9, weight="bold")
    ax.set(xlim=(0, x + 1.1), ylim=(ranks + 0.75, -0.1))
    ax.set_yticks([rank + 0.5 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def _alone(word: Word) -> str:
    """What a rank does by itself before this word."""
    if word.kind == "all_gather":
        return "head,\nbest of its own"
    name = word.who.rpartition(".")[2]
    alone = {"embed_tokens": "embed", "o_proj": "qkv, attention,\no", "down_proj": "gate-up,\ndown"}
    return alone[name]


def _word(ax: Axes, x: float, ranks: int, text: str, *, arrow: bool = False) -> None:
    ends = (x, 0.5), (x, ranks - 0.5)
    style = "-|>" if arrow else "<|-|>"
    look = {"arrowstyle": style, "mutation_scale": 11, "lw": 1.6, "color": EXCHANGE}
    ax.add_patch(FancyArrowPatch(*ends, shrinkA=0, shrinkB=0, **look))
    ax.text(x, ranks + 0.2, text, ha="center", va="top", fontsize=7.5)


def draw_bytes(steps: Sequence[Step]) -> Figure:
    """The bytes that a rank brings to the exchanges of each step, and how many there are."""
    figure, ax = plt.subplots(figsize=(8.6, 2.4))
    for number, step in enumerate(steps):
        total = sum(word.nbytes for word in step.words)
        ax.bar(number, total, color=WORK if step.decodes else LEAST, width=0.6)
        ax.text(number, total, f"{len(step.words)} words", ha="center", va="bottom", fontsize=8)
    ax.set(xlabel="step", ylabel="bytes of a rank", yscale="log", ylim=(1e3, 2e6))
    ax.set_xticks(range(len(steps)))
    handles = [Patch(fc=LEAST, label="prompts"), Patch(fc=WORK, label="decode")]
    ax.legend(handles=handles, loc="upper right", fontsize=8.5, ncols=2)
    return figure


# ---- sampling ------------------------------------------------------------------------------------


def draw_scores(scores: Sequence[torch.Tensor], first: Sequence[int]) -> Figure:
    """Every rank's scores [V / P] of one row, logit / temperature + noise, and their best."""
    figure, ax = plt.subplots(figsize=(8.8, 2.6))
    best = []
    for rank, (own, start) in enumerate(zip(scores, first, strict=True)):
        tokens = torch.arange(start, start + len(own))
        ax.vlines(tokens, own.min() - 9, own, color=RANKS[rank], lw=1.0, alpha=0.6)
        at = int(own.argmax())
        best.append((float(own[at]), start + at))
        ax.plot([start + at], [own[at]], "o", ms=6, color=RANKS[rank])
    highest = max(best)
    for rank, ((score, token), start) in enumerate(zip(best, first, strict=True)):
        middle, text = start + len(scores[rank]) / 2, f"({score:.2f}, {token})"
        style = {"ha": "center", "fontsize": 9, "color": RANKS[rank], "weight": "bold"}
        ax.text(middle, highest[0] + 1.0, f"rank {rank}: {text}", **style)
    ax.axhline(highest[0], ls=(0, (4, 2)), lw=0.8, color=INK)
    ax.set_title(f"all ranks choose token {highest[1]}", pad=16)
    ax.set(xlabel="token", ylabel="score", ylim=(highest[0] - 14, highest[0] + 0.8))
    ax.margins(x=0.01)
    figure.tight_layout()
    return figure


# ---- times ---------------------------------------------------------------------------------------


def draw_timed_steps(runs: Iterable[dict[str, Any]]) -> Figure:
    """A step of rank 0 on this kind of machine: alone, and in exchanges."""
    runs = [run for run in runs if run["words"]]
    figure, axes = plt.subplots(len(runs), 1, figsize=(9.2, 0.95 * len(runs) + 0.5))
    for ax, run in zip(axes, runs, strict=True):
        end = max(run["ms"], max(w["start_ms"] + w["ms"] for w in run["words"]))
        ax.add_patch(Rectangle((0, 0), end, 1, fc=WORK, ec="none"))
        for word in run["words"]:
            box = (word["start_ms"], 0), word["ms"], 1
            ax.add_patch(Rectangle(*box, fc=EXCHANGE, ec="none"))
        title = f"{run['model']}, batch {run['batch']}, {run['ranks']} ranks: "
        title += f"{run['ms']:.0f} ms a step, {run['waiting_ms']:.0f} of them in "
        ax.set_title(title + f"{len(run['words'])} exchanges", fontsize=9)
        ax.set(xlim=(0, end), ylim=(0, 1), yticks=[])
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="x", labelsize=8)
    axes[-1].set_xlabel("milliseconds", fontsize=9)
    handles = [Patch(fc=WORK, label="rank 0 computes"), Patch(fc=EXCHANGE, label="in exchanges")]
    figure.legend(handles=handles, loc="lower center", ncols=2, fontsize=8.5)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def draw_gpus(reports: Sequence[dict[str, Any]]) -> Figure:
    """Milliseconds a token on the GPUs: the least, the exchanges, and what remains."""
    panels = [(report, batch) for report in reports for batch in results.decodes(report)]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 + 1.9 * len(panels), 2.9))
    for ax, (report, batch) in zip(axes, panels, strict=True):
        by_ranks = results.decodes(report)[batch]
        for place, (ranks, facts) in enumerate(by_ranks.items()):
            if not results.fits(report, batch, ranks):
                ax.text(place, 0, "a kernel\ndid not fit", ha="center", va="bottom", fontsize=8)
                continue
            least, talked = facts.get("limit_ms", 0.0), facts.get("communication_ms", 0.0)
            # What overlaps is counted once.
            talked = max(0.0, min(talked, facts["ms_per_token"] - least))
            rest = max(0.0, facts["ms_per_token"] - least - talked)
            bottom = 0.0
            for height, colour in ((least, LEAST), (talked, EXCHANGE), (rest, WORK)):
                ax.bar(place, height, bottom=bottom, color=colour, width=0.62)
                bottom += height
            ax.text(place, bottom, f"{facts['ms_per_token']:.2f}", ha="center", va="bottom")
        ax.set_xticks(range(len(by_ranks)), [f"{n} GPU{'s' * (n > 1)}" for n in by_ranks])
        ax.set_title(f"{report['model']}, batch {batch}", fontsize=9.5)
        ax.set_xlim(-0.6, len(by_ranks) - 0.4)
        ax.margins(y=0.12)
    axes[0].set_ylabel("ms a token")
    names = ("least: reading", "in exchanges", "everything else")
    handles = [Patch(fc=c, label=n) for c, n in zip((LEAST, EXCHANGE, WORK), names, strict=True)]
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=8.5)
    return figure


def draw_sums(found: dict[int, dict[str, list[float]]]) -> Figure | None:
    """Microseconds a sum, addition and norm of so many tokens; None if nobody has measured it."""
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(4.3 * len(found), 2.8), squeeze=False)
    for ax, (size, us) in zip(axes[0], found.items(), strict=True):
        for name, label in results.SUMS.items():
            ax.plot(us["rows"], us[name], marker="o", ms=4, label=label)
        ax.set(xlabel="tokens", ylabel="µs a sum", xscale="log", ylim=(0, None))
        ax.set_xticks(us["rows"], [str(rows) for rows in us["rows"]])
        ax.set_title(f"{size} GPUs")
        ax.minorticks_off()
        ax.grid(axis="y")
        ax.legend(fontsize=8.5)
    figure.tight_layout()
    return figure


def draw_wait(name: str, gpus: Sequence[int], waits_us: Sequence[float]) -> Figure:
    """The least time a token on several GPUs, if an exchange takes so long (arithmetic)."""
    figure, ax = plt.subplots(figsize=(6, 2.8))
    for wait in waits_us:
        exchanges = results.exchanges(name) * wait / 1e3
        times = [results.least_ms(name, n) + exchanges * (n > 1) for n in gpus]
        ax.plot(gpus, times, marker="o", ms=4, label=f"{wait:g} µs an exchange")
    ax.set(xlabel="GPUs", ylabel="ms a token", ylim=(0, None))
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(gpus), [str(n) for n in gpus])
    ax.grid(axis="y")
    ax.legend(fontsize=8.5)
    figure.tight_layout()
    return figure


def all_figures() -> dict[str, Figure]:
    """The figures of the text, by file name."""
    return {"step.svg": draw_step(a_step()), "mlp.svg": draw_mlp(), "heads.svg": draw_heads()}


def main(folder: Path = FOLDER / "figures") -> None:
    write_figures(all_figures, folder)


if __name__ == "__main__":
    main()
