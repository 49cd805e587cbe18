"""The pictures of chapter 8, for its text and its notebook.

    python -m chapters.chapter08_cuda_graphs.figures    # writes figures/*.svg beside this file

The rows and the ladder are drawn from what the engine's own code did, the timeline from what an
H200 measured (see ``results``).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from chapters.chapter08_cuda_graphs import results, toy, waste
from chapters.chapter08_cuda_graphs.halves import Half

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "notebooks"))

from drawing import EMPTY, INK, PALETTE, write_figures  # noqa: E402

BLUE, ORANGE, GREEN, RED, PURPLE = PALETTE[:5]

# ---- the timeline --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """start, length in milliseconds; what: a key of ``COLOURS``."""

    lane: str
    start: float
    length: float
    what: str
    step: int


COLOURS = {"launches": ORANGE, "host's half": PURPLE, "waits": EMPTY, "kernels": BLUE}


def one_by_one(kernels: int, kernel_ms: float, launch_ms: float, steps: int = 1) -> list[Bar]:
    """Each kernel begins when it has been launched and its predecessor has ended."""
    bars, host, device = [], 0.0, 0.0
    for step in range(steps):
        for _ in range(kernels):
            bars.append(Bar("host", host, launch_ms, "launches", step))
            host += launch_ms
            device = max(device, host)
            bars.append(Bar("GPU", device, kernel_ms, "kernels", step))
            device += kernel_ms
    return bars


def replayed(
    step_ms: float, host_ms: float, launch_ms: float, steps: int, *, overlap: bool
) -> list[Bar]:
    """A step is one launch; overlap: the host prepares the next one while it runs."""
    bars, host, device = [], 0.0, 0.0
    ends: list[float] = []
    for step in range(steps):
        bars.append(Bar("host", host, host_ms, "host's half", step))
        host += host_ms
        bars.append(Bar("host", host, launch_ms, "launches", step))
        host += launch_ms
        start = max(device, host)
        bars.append(Bar("GPU", start, step_ms, "kernels", step))
        device = start + step_ms
        ends.append(device)
        # The tokens of this step are read now, or those of the one before it.
        wanted = ends[step] if not overlap else ends[step - 1] if step else host
        if wanted > host:
            bars.append(Bar("host", host, wanted - host, "waits", step))
            host = wanted
    return bars


def timelines() -> list[tuple[str, list[Bar]]]:
    """Two pairs: batch 1 without and with a graph, batch 256 without and with overlap."""
    found = results.profiles()
    (small, one), *_, (large, many) = found.items()
    launch = results.launch_us()[0] / 1e3
    kernels, host = round(one["kernels_a_step"]), results.host_ms()
    apart = one_by_one(kernels, one["busy_ms"] / kernels, launch)
    batch = f"batch {large[0]}"
    return [
        (f"batch {small[0]}, {kernels} kernels launched one by one", apart),
        (
            f"batch {small[0]}, one graph a step, two steps",
            replayed(one["step_ms"], 0, launch, 2, overlap=True),
        ),
        (
            f"{batch}, graphs; the host waits",
            replayed(many["step_ms"], host, launch, 3, overlap=False),
        ),
        (
            f"{batch}, graphs; the host is a step ahead",
            replayed(many["step_ms"], host, launch, 3, overlap=True),
        ),
    ]


def draw_timelines(rows: Sequence[tuple[str, list[Bar]]] | None = None) -> Figure:
    """Host above, GPU below, for each row; a pair of rows shares its axis."""
    rows = rows or timelines()
    figure, axes = plt.subplots(len(rows), 1, figsize=(8.8, 1.32 * len(rows)))
    for first in range(0, len(rows), 2):
        end = max(bar.start + bar.length for _, bars in rows[first : first + 2] for bar in bars)
        for (title, bars), ax in zip(rows[first : first + 2], axes[first : first + 2], strict=True):
            _draw_timeline(ax, bars, end)
            ax.set_title(title, fontsize=9.5)
    axes[-1].set_xlabel("milliseconds", fontsize=9)
    handles = [Patch(fc=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(
        handles=handles, loc="lower center", ncols=4, fontsize=8.5, bbox_to_anchor=(0.5, -0.05)
    )
    figure.tight_layout(h_pad=0.7)
    return figure


def _draw_timeline(ax: Axes, bars: Sequence[Bar], end: float) -> None:
    for bar in bars:
        y = 0.06 if bar.lane == "host" else 1.06
        fade = 0.55 if bar.step % 2 and bar.what != "waits" else 1.0
        look = {
            "fc": COLOURS[bar.what],
            "ec": "none",
            "alpha": None if bar.what == "waits" else fade,
        }
        # A gap of a third of a thin bar shows that it is one of many.
        width = bar.length * (0.8 if bar.length < end / 100 else 1) - end / 900 * (
            bar.length > end / 100
        )
        ax.add_patch(Rectangle((bar.start, y), width, 0.88, **look))
    ax.set(xlim=(0, end * 1.005), ylim=(2.02, 0))
    ax.set_yticks([0.5, 1.5], ["host", "GPU"], fontsize=8.5)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines["left"].set_visible(False)


# ---- the rows ------------------------------------------------------------------------------------


def draw_rows(game: toy.Game) -> Figure:
    """Steps across, rows down: whose a row is, its newest token and its length after the step."""
    names = list(game.answers)
    colour = dict(zip(names, PALETTE, strict=False))
    owner: dict[int, str] = {}
    figure, ax = plt.subplots(figsize=(1.12 * len(game.notes) + 1.0, 3.3))
    bottom = toy.NUM_ROWS
    for x, note in enumerate(game.notes):
        owner |= dict(zip(note.places, note.names, strict=True))
        for row in range(toy.NUM_ROWS):
            box = (x + 0.05, row + 0.07), 0.9, 0.86
            if row not in owner:
                ax.add_patch(Rectangle(*box, fc=EMPTY, ec="none"))
                continue
            runs, shade = row in note.places, colour[owner[row]]
            ax.add_patch(Rectangle(*box, fc=shade, ec="none", alpha=1.0 if runs else 0.25))
            ink = "white" if runs else INK
            style = {"ha": "center", "va": "center", "color": ink}
            ax.text(
                x + 0.5, row + 0.36, str(note.last_token[row]), fontsize=10, weight="bold", **style
            )
            ax.text(x + 0.5, row + 0.7, f"length {note.length[row]}", fontsize=7.5, **style)
        what = f"graph of {note.size}" if note.size else "prompts"
        ax.text(x + 0.5, bottom + 0.32, what, ha="center", fontsize=8)
        words = f"{len(note.sent)} word{'s' * (len(note.sent) != 1)}" if note.sent else "nothing"
        ax.text(x + 0.5, bottom + 0.68, words, ha="center", fontsize=8, weight="bold")
    ax.text(-0.08, bottom + 0.32, "runs", ha="right", fontsize=8)
    ax.text(-0.08, bottom + 0.68, "sent", ha="right", fontsize=8)
    ax.set(xlim=(0, len(game.notes)), ylim=(bottom + 0.85, 0))
    ax.set_yticks([row + 0.5 for row in range(bottom)], [f"row {row}" for row in range(bottom)])
    ax.set_xticks(
        [x + 0.5 for x in range(len(game.notes))], [f"step {note.step}" for note in game.notes]
    )
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=9)
    ax.spines[:].set_visible(False)
    handles = [Patch(fc=shade, label=name) for name, shade in colour.items()]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5)
    return figure


# ---- the ladder ----------------------------------------------------------------------------------


def draw_ladder(most: int = 64) -> Figure:
    """The places that run for each batch size, by the real ladder's choice."""
    figure, axes = plt.subplots(1, 3, figsize=(9.2, 2.7), sharey=True)
    for ax, name in zip(axes, ("only the largest", "powers of two", "ours"), strict=True):
        found = waste.waste_of(waste.LADDERS[name](most))
        batches = list(range(1, most + 1))
        total = [batch + extra for batch, extra in zip(batches, found.padding, strict=True)]
        look = {"step": "mid", "lw": 0}
        ax.fill_between(batches, batches, color=BLUE, alpha=0.75, label="sequences", **look)
        ax.fill_between(batches, batches, total, color=ORANGE, alpha=0.75, label="padding", **look)
        graphs = f"{found.graphs} graph{'s' * (found.graphs > 1)}"
        ax.set_title(f"{name}\n{graphs}, {found.share:.1%} padding", fontsize=9)
        ax.set_xlabel("batch", fontsize=9)
        ax.set(xlim=(0.5, most + 0.5), ylim=(0, most * 1.02))
    axes[0].set_ylabel("places that run", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.tight_layout()
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02)}
    figure.legend(handles, labels, ncols=2, fontsize=8.5, **place)
    return figure


# ---- the host's half -----------------------------------------------------------------------------


def draw_halves(halves: Sequence[Half]) -> Figure:
    """Milliseconds and bytes of the host's half of a step, by batch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 2.7))
    batches = [half.batch for half in halves]
    for attribute, label in (
        ("schedule", "schedule, hand out"),
        ("plain", "lay out all anew"),
        ("prepare", "find what changed"),
    ):
        left.plot(
            batches, [getattr(half, attribute) for half in halves], marker="o", ms=4, label=label
        )
    left.set(xlabel="batch", ylabel="ms a step", ylim=(0, None))
    left.legend(fontsize=8.5)
    for attribute, label in (("plain_bytes", "laid out"), ("sent_bytes", "sent")):
        right.plot(
            batches, [getattr(half, attribute) for half in halves], marker="o", ms=4, label=label
        )
    right.set(xlabel="batch", ylabel="bytes a step", yscale="log")
    right.legend(fontsize=8.5)
    for ax in (left, right):
        ax.grid(axis="y")
    figure.tight_layout()
    return figure


def all_figures() -> dict[str, Figure]:
    """The figures of the text, by file name."""
    return {
        "timeline.svg": draw_timelines(),
        "rows.svg": draw_rows(toy.play()),
        "ladder.svg": draw_ladder(),
    }


def main(folder: Path = FOLDER / "figures") -> None:
    write_figures(all_figures, folder)


if __name__ == "__main__":
    main()
