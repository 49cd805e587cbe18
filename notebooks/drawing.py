"""Pictures of what a kernel did, drawn from a `recorder.Recorder`, in one style for all notebooks.

Backgrounds are transparent. Text and colours have a middle lightness, so that they keep a contrast
of at least 3:1 (text 4:1) on a white page and on a dark one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from recorder import Event, Program, Recorder

INK = "#787c84"
EMPTY = (0.5, 0.5, 0.5, 0.2)
PALETTE = (
    "#337bd0",
    "#da7e1e",
    "#00986c",
    "#d83f66",
    "#9f5dcb",
    "#8b8d2e",
    "#008192",
    "#d472ac",
)
_KINDS = {"read": ("load", "atomic"), "written": ("store", "atomic")}
_MOST_CELLS = 20_000


def use_style(form: str = "png") -> None:
    """Set the course's look for all later figures, in a notebook its picture format too.

    Args:
        form: "png" (at twice the resolution) or "svg".
    """
    if form not in ("png", "svg"):
        raise ValueError(f"form={form!r}: choose png or svg")
    mpl.rcParams.update(
        {
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "figure.dpi": 100,
            "savefig.dpi": 200,
            "savefig.bbox": "tight",
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": mpl.cycler(color=PALETTE),
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": INK,
            "grid.alpha": 0.25,
            "lines.linewidth": 2,
            "legend.frameon": False,
            "legend.labelcolor": INK,
            "svg.fonttype": "none",
            "svg.hashsalt": "course",  # the same picture gives the same file
        }
    )
    if mpl.get_backend().lower().endswith("inline"):
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina" if form == "png" else "svg")


def program_colours(programs: Sequence[Program]) -> dict[Program, str]:
    """A colour for each program, in the order given; they repeat after the eighth."""
    distinct = dict.fromkeys(programs)
    return {program: PALETTE[i % len(PALETTE)] for i, program in enumerate(distinct)}


def program_label(program: Program, rec: Recorder) -> str:
    """A program id without the axes that the recorded grids do not use: "3" or "(3, 1)"."""
    used = max((axis for p in rec.programs for axis in range(3) if p[axis]), default=0) + 1
    return str(program[0]) if used == 1 else str(program[:used])


@dataclass(frozen=True)
class _Canvas:
    """Where each element of a tensor is drawn: the upper left corner of its unit cell.

    Gaps are multiples of 1/4, so that neighbouring corners differ by exactly 1 in floating point.
    """

    x: np.ndarray
    y: np.ndarray
    pages: list[tuple[float, float, str]]

    @classmethod
    def of(cls, shape: tuple[int, ...], width: int = 32) -> _Canvas:
        """Lay out a tensor.

        One dimension wraps after `width` cells; two are rows and columns; of three or four the
        first counts pages, each with rows of the second and columns of the others.
        """
        size = math.prod(shape)
        if not 0 < size <= _MOST_CELLS or len(shape) > 4:
            raise ValueError(
                f"cannot draw shape {shape}: 1 to {_MOST_CELLS} elements in at most 4 dimensions; "
                "record a smaller example"
            )
        flat = np.arange(size)
        if len(shape) <= 1:
            return cls(flat % width + 0.0, flat // width + 0.0, [])
        index = np.unravel_index(flat, shape)
        if len(shape) == 2:
            return cls(index[1] + 0.0, index[0] + 0.0, [])
        page, row, column = index[0], index[1], index[2] + 0.0
        columns = float(shape[2])
        if len(shape) == 4:  # a small gap between the heads of a page
            column = index[2] * (shape[3] + 0.5) + index[3]
            columns = shape[2] * (shape[3] + 0.5) - 0.5
        across = max(1, min(shape[0], int((2 * width + 1) // (columns + 1.5))))
        left, top = (page % across) * (columns + 1.5), (page // across) * (shape[1] + 2.25)
        corners = [
            ((n % across) * (columns + 1.5), (n // across) * (shape[1] + 2.25), f"page {n}")
            for n in range(shape[0])
        ]
        return cls(left + column, top + row, corners)

    def boxes(self, elements: np.ndarray, start: float = 0.0, end: float = 1.0) -> np.ndarray:
        """Outlines of the elements' cells, from `start` to `end` of their width: (n, 4, 2)."""
        x, y = self.x[elements], self.y[elements]
        left, right = x + 0.05 + 0.9 * start, x + 0.05 + 0.9 * end
        up, down = y + 0.05, y + 0.95
        return np.stack(
            [np.stack(c, axis=-1) for c in ((left, up), (right, up), (right, down), (left, down))],
            axis=1,
        )

    def new_axes(self, ax: Axes | None, scale: float = 1.0) -> Axes:
        width, height = self.x.max() + 1, self.y.max() + 1
        if ax is None:
            cell = min(0.32, 9.0 / width) * scale
            _, ax = plt.subplots(figsize=(width * cell + 1.2, height * cell + 0.5))
        ax.set(xlim=(-0.2, width + 0.2), ylim=(height + 0.2, -0.9 if self.pages else -0.2))
        ax.set_aspect("equal")
        ax.axis("off")
        for x, y, text in self.pages:
            ax.text(x, y - 0.25, text, fontsize=8, va="bottom")
        return ax


def _events(rec: Recorder, name: str, kind: str, where: dict[str, Any]) -> list[Event]:
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r}: choose read or written")
    return rec.select(name, _KINDS[kind], **where)


def _visitors(events: list[Event], size: int) -> list[list[Program]]:
    """For each element the programs that touched it, each once, in order of their first visit."""
    found: list[dict[Program, None]] = [{} for _ in range(size)]
    for event in events:
        for element in event.elements[event.mask].tolist():
            found[element][event.program] = None
    return [list(programs) for programs in found]


def _fill(ax: Axes, boxes: np.ndarray | list, colours: Any, alpha: float | None = None) -> None:
    if len(boxes):
        ax.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors="none", alpha=alpha))


def _legend(ax: Axes, entries: list[tuple[Any, str]], title: str) -> None:
    shown = (
        entries if len(entries) <= 16 else [*entries[:15], ("none", f"{len(entries) - 15} more")]
    )
    handles = [Patch(facecolor=colour, label=label) for colour, label in shown]
    columns = 1 if len(shown) <= 8 else 2
    legend = ax.legend(
        handles=handles,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        fontsize=8.5,
        title_fontsize=8.5,
        ncols=columns,
        handlelength=1,
        handleheight=1,
    )
    legend.get_title().set_color(INK)


def draw_tensor_accesses(
    rec: Recorder,
    name: str,
    *,
    kind: str = "read",
    by: str = "program",
    ax: Axes | None = None,
    **where: Any,
) -> Axes:
    """Draw a tensor as a grid of cells, coloured by who touched them or how often.

    Args:
        name: the recorded tensor, of at most 4 dimensions and 20,000 elements.
        kind: "read" or "written"; atomics are both.
        by: "program" (a cell that several programs touched is striped, at most 4 stripes), or
            "times".
        where: filters of `Recorder.select`, such as `kernel=` or `line=`.

    Raises:
        ValueError: an unknown name or choice, or a tensor too large to draw.
    """
    if by not in ("program", "times"):
        raise ValueError(f"by={by!r}: choose program or times")
    events = _events(rec, name, kind, where)
    shape = rec.shapes[name]
    canvas = _Canvas.of(shape)
    ax = canvas.new_axes(ax)
    ax.set_title(f"{name} {list(shape)}, {kind}")
    _fill(ax, canvas.boxes(np.arange(canvas.x.size)), EMPTY)
    if by == "times":
        count = (rec.times_read if kind == "read" else rec.times_written)(name, **where).ravel()
        seen = [int(n) for n in np.unique(count) if n]
        shade = mpl.colormaps["viridis"]
        colours: dict[int, Any] = {n: PALETTE[i % 8] for i, n in enumerate(seen)}
        if len(seen) > len(PALETTE):
            colours = {n: shade(0.15 + 0.7 * i / len(seen)) for i, n in enumerate(seen)}
        touched = np.flatnonzero(count)
        _fill(ax, canvas.boxes(touched), [colours[n] for n in count[touched].tolist()])
        _legend(ax, [(colours[n], f"{n} time{'s' * (n > 1)}") for n in seen], "")
        return ax
    colour = program_colours(rec.programs)
    boxes, fills, present = [], [], {}
    for element, programs in enumerate(_visitors(events, canvas.x.size)):
        present.update(dict.fromkeys(programs))
        stripes = programs[:4]
        for i, program in enumerate(stripes):
            span = (i / len(stripes), (i + 1) / len(stripes))
            boxes.append(canvas.boxes(np.array([element]), *span)[0])
            fills.append(colour[program])
    _fill(ax, boxes, fills)
    order = [program for program in colour if program in present]
    _legend(ax, [(colour[p], program_label(p, rec)) for p in order], "program")
    return ax


def draw_programs(
    rec: Recorder, name: str, *, kind: str = "written", ax: Axes | None = None, **where: Any
) -> Axes:
    """Draw which tile of a tensor belongs to which program: outlined, labelled with its id.

    A cell that several programs touched belongs to the first. Arguments as in
    `draw_tensor_accesses`.
    """
    events = _events(rec, name, kind, where)
    canvas = _Canvas.of(rec.shapes[name])
    ax = canvas.new_axes(ax)
    ax.set_title(f"{name} {list(rec.shapes[name])}: the tile of each program, {kind}")
    colour = program_colours(rec.programs)
    visitors = _visitors(events, canvas.x.size)
    owner = [programs[0] if programs else None for programs in visitors]
    _fill(ax, canvas.boxes(np.array([i for i, p in enumerate(owner) if p is None], int)), EMPTY)
    for program in dict.fromkeys(p for p in owner if p is not None):
        cells = np.array([i for i, p in enumerate(owner) if p == program])
        _fill(ax, canvas.boxes(cells), colour[program], alpha=0.35)
        for tile in _tiles(canvas, cells):
            ax.add_collection(
                LineCollection(
                    _outline(tile), colors=colour[program], linewidths=2, capstyle="round"
                )
            )
            x, y = np.mean(list(tile), axis=0) + 0.5
            text = program_label(program, rec)
            ax.text(x, y, text, color=colour[program], ha="center", va="center", weight="bold")
    return ax


def _tiles(canvas: _Canvas, cells: np.ndarray) -> list[set[tuple[float, float]]]:
    """The cells in groups that hang together on the canvas, as corners."""
    left = set(zip(canvas.x[cells].tolist(), canvas.y[cells].tolist(), strict=True))
    tiles = []
    while left:
        tile, edge = set(), [left.pop()]
        while edge:
            x, y = edge.pop()
            tile.add((x, y))
            near = {(x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)} & left
            left -= near
            edge.extend(near)
        tiles.append(tile)
    return tiles


def _outline(tile: set[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    lines = []
    for x, y in sorted(tile):
        corners = [(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1), (x, y)]
        neighbours = [(x, y - 1), (x + 1, y), (x, y + 1), (x - 1, y)]
        for side, neighbour in enumerate(neighbours):
            if neighbour not in tile:
                lines.append(corners[side : side + 2])
    return lines


def draw_over_time(
    rec: Recorder,
    names: Sequence[str],
    *,
    panels: int = 6,
    kind: str = "read",
    **where: Any,
) -> Figure:
    """Draw how accesses move over tensors: a row for each tensor, a column for each span of time.

    In a panel the cells touched during its span are full, those touched before it are faint.

    Args:
        names: the recorded tensors.
        panels: number of spans, equal in instructions on these tensors; fewer if there are fewer.
        kind, where: as in `draw_tensor_accesses`; `program=` follows one program.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"names={names!r}: pass a non-empty list of tensor names")
    if panels < 1:
        raise ValueError(f"panels={panels}: at least 1 is needed")
    events = {name: _events(rec, name, kind, where) for name in names}
    orders = sorted({event.order for found in events.values() for event in found})
    if not orders:
        raise ValueError(
            f"nothing to draw: no event of kind {kind!r} on {list(names)} fits {where}"
        )
    spans = [span for span in np.array_split(orders, min(panels, len(orders))) if len(span)]
    canvases = {name: _Canvas.of(rec.shapes[name], width=16) for name in names}
    cell = min(0.2, 10.0 / sum(max(c.x.max() + 2 for c in canvases.values()) for _ in spans))
    heights = [c.y.max() + 2 for c in canvases.values()]
    width = max(c.x.max() + 2 for c in canvases.values()) * len(spans)
    figure, grid = plt.subplots(
        len(names),
        len(spans),
        squeeze=False,
        figsize=(width * cell + 0.8, sum(heights) * cell + 0.5 * len(names)),
        height_ratios=heights,
    )
    colour = program_colours(rec.programs)
    for row, (name, canvas) in enumerate(canvases.items()):
        for column, span in enumerate(spans):
            ax = canvas.new_axes(grid[row, column])
            _fill(ax, canvas.boxes(np.arange(canvas.x.size)), EMPTY)
            for event in events[name]:
                if event.order <= span[-1]:
                    cells = np.unique(event.elements[event.mask])
                    now = event.order >= span[0]
                    _fill(ax, canvas.boxes(cells), colour[event.program], 1.0 if now else 0.3)
            if row == 0:
                first, last = orders.index(span[0]) + 1, orders.index(span[-1]) + 1
                verb = "load" if kind == "read" else "store"
                ax.set_title(f"{verb} {first}" if first == last else f"{verb}s {first}–{last}")
            if column == 0:
                ax.text(-0.6, (canvas.y.max() + 1) / 2, name, ha="right", va="center")
    return figure


def draw_snapshots(
    rec: Recorder,
    name: str,
    *,
    lanes: Sequence[int] = (0,),
    ax: Axes | None = None,
    **where: Any,
) -> Axes:
    """Draw a watched variable of a kernel: its value each time that a line bound it anew.

    Args:
        name: one of the recorder's `watch`.
        lanes: which elements of the value to follow, flat positions; a scalar has lane 0 only.
        where: `program=`, `line=` or `launch=` to choose among the snapshots.

    Raises:
        ValueError: no snapshot fits, a lane is out of range, or a filter is unknown.
    """
    if unknown := set(where) - {"program", "line", "launch"}:
        raise ValueError(f"unknown filter {sorted(unknown)}; choose from program, line, launch")
    chosen = [
        shot
        for shot in rec.snapshots
        if shot.name == name and all(getattr(shot, key) == value for key, value in where.items())
    ]
    if not chosen:
        raise ValueError(f"no snapshot of {name!r} fits {where}; watched were {list(rec.watch)}")
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 2.6))
    programs = dict.fromkeys(shot.program for shot in chosen)
    for program in programs:
        values = [shot.value.ravel() for shot in chosen if shot.program == program]
        for lane in lanes:
            if not all(0 <= lane < value.size for value in values):
                raise ValueError(f"lane {lane} is out of range for {name!r}")
            label = f"program {program_label(program, rec)}"
            label += f", lane {lane}" if values[0].size > 1 else ""
            height = [float(value[lane]) for value in values]
            ax.plot(range(len(height)), height, marker="o", drawstyle="steps-post", label=label)
    ax.set_title(name)
    ax.set_xlabel("time it was set")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(axis="y")
    if len(ax.get_lines()) > 1:
        ax.legend(fontsize=8.5)
    return ax


def write_figures(make: Callable[[], Mapping[str, Figure]], folder: Path) -> None:
    """Draw the figures of a text, by file name, and write them into ``folder`` as SVG."""
    use_style("svg")
    folder.mkdir(exist_ok=True)
    for name, figure in make().items():
        # No date in the file: the same picture gives the same file.
        figure.savefig(folder / name, metadata={"Date": None})
        plt.close(figure)
        print(f"wrote {os.path.relpath(folder / name)}")
