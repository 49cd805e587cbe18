"""The pictures of chapter 6, for its text and its notebook.

    python -m chapters.chapter06_block_manager.figures    # writes figures/*.svg beside this file

Every picture is drawn from what the real block manager did, most of them from its event log.
"""

import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from chapters.chapter03_naive_attention.memory import MODELS, bytes_per_token
from chapters.chapter06_block_manager import toy
from chapters.chapter06_block_manager.driver import Driver, Request
from chapters.chapter06_block_manager.film import frames
from chapters.chapter06_block_manager.memory import (
    GIB,
    MODEL,
    Count,
    Counter,
    count_blocks,
    count_rows,
)
from minivllm.engine.block_manager import ROOT, BlockManager, hash_block
from minivllm.engine.events import Event, EventLog

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "notebooks"))

from drawing import EMPTY, INK, PALETTE, write_figures  # noqa: E402

BLUE, ORANGE, GREEN, RED, PURPLE = PALETTE[:5]


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each request, in the order given; they repeat after the eighth."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


# ---- names ---------------------------------------------------------------------------------------


def draw_names(prompts: Mapping[str, str]) -> Figure:
    """The full blocks of some prompts, coloured by the names that hash_block gives them."""
    size = toy.BLOCK_SIZE
    longest = max(len(prompt) // size for prompt in prompts.values())
    figure, ax = plt.subplots(figsize=(1.95 * longest + 1.9, 0.5 * len(prompts) + 0.3))
    seen: dict[int, str] = {}
    for row, (title, prompt) in enumerate(prompts.items()):
        name = ROOT
        for column in range(len(prompt) // size):
            piece = prompt[column * size : (column + 1) * size]
            name = hash_block(name, [ord(letter) for letter in piece])
            colour = seen.setdefault(name, PALETTE[len(seen) % len(PALETTE)])
            box = Rectangle((column + 0.03, row + 0.1), 0.94, 0.8, fc=colour, alpha=0.22, ec="none")
            ax.add_patch(box)
            edge = Rectangle((column + 0.03, row + 0.1), 0.94, 0.8, fc="none", ec=colour, lw=1.4)
            ax.add_patch(edge)
            style = {"ha": "center", "va": "center"}
            ax.text(column + 0.5, row + 0.36, f"“{piece}”", fontsize=8, **style)
            ax.text(column + 0.5, row + 0.68, f"{name:016x}"[:8] + "…", fontsize=7.5, **style)
        ax.text(-0.06, row + 0.5, title, ha="right", va="center", fontsize=9)
    _bare(ax, longest, len(prompts))
    return figure


def _bare(ax: Axes, width: float, height: float) -> None:
    ax.set(xlim=(-0.05, width + 0.05), ylim=(height + 0.05, -0.05), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


# ---- the film ------------------------------------------------------------------------------------


def draw_film(
    events: Sequence[Event], num_blocks: int, group: Callable[[str], str] = str
) -> Figure:
    """Blocks down, steps across: who holds which block, what is findable, hits and evictions.

    group: request -> what gives it its colour; each request has its own by default.
    """
    pictures = list(frames(events, num_blocks))
    names = [event.request_id for event in events if event.kind in ("taken", "shared")]
    groups = colours_of(group(name) for name in names)
    colour = {name: groups[group(name)] for name in names}
    width = min(9.4, 0.34 * len(pictures) + 1.2)
    cell = max(width / (len(pictures) + 2), 0.1)
    large = len(pictures) > 60
    mark = 3.0 if large else 7.0
    figure, ax = plt.subplots(figsize=(width, cell * num_blocks + 0.9))
    for block in range(num_blocks):
        states = [(frame.holders[block], frame.findable[block]) for frame in pictures]
        start = 0
        for (holders, findable), run in groupby(states):
            end = start + len(list(run))
            _draw_run(ax, block, start, end, holders, findable, colour)
            if end - start > 1 and len(holders) in (1, 2) and not large:
                _name_run(ax, block, start, holders, findable, colour)
            start = end
    for event in events:
        for block in event.blocks:
            y = block + 0.5
            if event.kind == "shared":
                look = {"color": "white", "mec": INK, "mew": 0.085 * mark}
                ax.plot(event.step + 0.14, y, marker=">", ms=0.8 * mark, **look)
            elif event.kind == "evicted":
                look = {"color": RED, "mec": "white", "mew": 0.085 * mark}
                ax.plot(event.step, y, marker="X", ms=mark, **look)
    ax.set(xlim=(-0.1, len(pictures) + 0.1), ylim=(num_blocks + 0.05, -0.05))
    for axis, count in ((ax.xaxis, len(pictures)), (ax.yaxis, num_blocks)):
        shown = range(0, count, 1 if count <= 30 else 8)
        axis.set_ticks([place + 0.5 for place in shown], shown, fontsize=8)
    ax.set_xlabel("step", fontsize=9)
    ax.set_ylabel("block", fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _film_legend(ax, colour)
    return figure


def _draw_run(
    ax: Axes,
    block: int,
    start: int,
    end: int,
    holders: Sequence[str],
    findable: bool,
    colour: Mapping[str, str],
) -> None:
    """A block's state from step ``start`` up to ``end``; holders lie one above the other."""
    left, top, width, height = start + 0.04, block + 0.07, end - start - 0.08, 0.86
    if not holders:
        look = {"fc": "none", "ec": INK, "hatch": "////", "lw": 0.5, "alpha": 0.75}
        blank = {"fc": EMPTY, "ec": "none"}
        ax.add_patch(Rectangle((left, top), width, height, **(look if findable else blank)))
    for index, name in enumerate(holders):
        share = height / len(holders)
        place = (left, top + index * share)
        if findable:
            ax.add_patch(Rectangle(place, width, share, fc=colour[name], ec="none"))
        else:
            ax.add_patch(Rectangle(place, width, share, fc=colour[name], ec="none", alpha=0.25))
            ax.add_patch(Rectangle(place, width, share, fc="none", ec=colour[name], lw=1.2))


def _name_run(
    ax: Axes,
    block: int,
    start: int,
    holders: Sequence[str],
    findable: bool,
    colour: Mapping[str, str],
) -> None:
    for index, name in enumerate(holders):
        y = block + 0.07 + 0.86 * (index + 0.5) / len(holders)
        style = {"color": "white" if findable else colour[name], "weight": "bold"}
        ax.text(start + 0.38, y, name, va="center", fontsize=7.5, **style)


def _film_legend(ax: Axes, colour: Mapping[str, str]) -> None:
    first = next(iter(colour.values()))
    handles = [
        Patch(fc=first, label="held and findable"),
        Patch(fc=(*to_rgb(first), 0.25), ec=first, lw=1.2, label="held, not findable"),
        Patch(fc="none", ec=INK, hatch="////", lw=0.5, label="free, but findable"),
        Patch(fc=EMPTY, label="blank"),
        Line2D([], [], ls="", marker=">", ms=6, color="white", mec=INK, label="hit"),
        Line2D([], [], ls="", marker="X", ms=7, color=RED, mec="white", label="eviction"),
    ]
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.45 / (ax.figure.get_figheight() - 0.6)),
        ncols=6,
        fontsize=8,
        handlelength=1.2,
        columnspacing=1.4,
    )


# ---- the tree ------------------------------------------------------------------------------------


@dataclass
class Node:
    """A caching of a block. users: the requests that computed it or found it."""

    block: int
    depth: int
    users: list[str]
    findable: bool = True
    children: list["Node"] = field(default_factory=list)
    y: float = 0.0


def prefix_tree(events: Iterable[Event]) -> list[Node]:
    """What was ever cached, as trees: every block below the one that stands before it."""
    nodes: dict[int, Node] = {}
    roots: list[Node] = []
    now: dict[int, Node] = {}  # block -> what it holds at the moment
    for event in events:
        if event.kind == "cached":
            (block,) = event.blocks
            parent = nodes.get(event["parent"])
            node = Node(block, parent.depth + 1 if parent else 0, [event.request_id])
            nodes[event["identity"]] = now[block] = node
            (parent.children if parent else roots).append(node)
        elif event.kind == "evicted":
            now.pop(event.blocks[0]).findable = False
        elif event.kind == "shared":
            for block in event.blocks:
                now[block].users.append(event.request_id)
    return roots


def draw_tree(roots: Sequence[Node], texts: Mapping[tuple[str, int], str] | None = None) -> Figure:
    """The tree from left to right; colours say how many requests used a block.

    texts: (request, index of the block) -> the block's letters, written into its node.
    """
    height = 0.0
    for root in roots:
        height = _place(root, height)
    nodes = [node for root in roots for node in _walk(root)]
    deep = max(node.depth for node in nodes) + 1
    wide = 2.0 if texts else 0.62
    row = 0.62 if texts else 0.2
    figure, ax = plt.subplots(figsize=(min(9.4, wide * deep + 1.6), row * height + 0.5))
    most = max(len(node.users) for node in nodes)
    for node in nodes:
        for child in node.children:
            x = node.depth + 0.86
            middle = node.depth + 0.93
            line = [(x, node.y), (middle, node.y), (middle, child.y), (node.depth + 1, child.y)]
            ax.plot(*zip(*line, strict=True), color=INK, lw=1)
        _draw_node(ax, node, texts)
    ax.set(xlim=(-0.05, deep + 0.05), ylim=(height - 0.4, -0.6), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    shown = sorted({min(len(node.users), 4) for node in nodes})
    names = ["1 request", "2 requests", "3 requests", "4 or more" if most > 4 else "4 requests"]
    handles = [Patch(fc=_shade(number), label=names[number - 1]) for number in shown]
    handles.append(Patch(fc="none", ec=INK, ls=(0, (2, 1.5)), label="evicted"))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def _shade(users: int) -> str:
    return (INK, BLUE, GREEN, ORANGE)[min(users, 4) - 1]


def _place(node: Node, top: float) -> float:
    """Give the node and all below it rows from ``top`` on; the first free row after them."""
    if not node.children:
        node.y = top
        return top + 1
    bottom = top
    for child in node.children:
        bottom = _place(child, bottom)
    node.y = (node.children[0].y + node.children[-1].y) / 2
    return bottom


def _walk(node: Node) -> Iterable[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _draw_node(ax: Axes, node: Node, texts: Mapping[tuple[str, int], str] | None) -> None:
    colour = _shade(len(node.users))
    look = {"fc": colour, "ec": "none"} if node.findable else {"fc": "none", "ec": colour}
    if not node.findable:
        look["ls"] = (0, (2, 1.5))
    half = 0.36 if texts else 0.34
    ax.add_patch(Rectangle((node.depth, node.y - half), 0.86, 2 * half, lw=1.2, **look))
    ink = "white" if node.findable else colour
    centre = {"ha": "center", "va": "center", "color": ink}
    if texts is None:
        ax.text(node.depth + 0.43, node.y, str(node.block), fontsize=6.5, **centre)
        return
    letters = texts[node.users[0], node.depth]
    ax.text(node.depth + 0.43, node.y - 0.14, f"“{letters}”", fontsize=8.5, **centre)
    users = f"block {node.block}: {', '.join(node.users)}"
    ax.text(node.depth + 0.43, node.y + 0.17, users, fontsize=7, **centre)


def toy_texts() -> dict[tuple[str, int], str]:
    """The letters of every full block that a request of the toy comes to have."""
    answers = toy.play().answers
    size = toy.BLOCK_SIZE
    found = {}
    for request in toy.REQUESTS:
        text = request.prompt + answers[request.name]
        for index in range(len(text) // size):
            found[request.name, index] = text[index * size : (index + 1) * size]
    return found


# ---- chats ---------------------------------------------------------------------------------------


def chats(num_chats: int = 8, num_turns: int = 3) -> list[Request]:
    """Conversations of several turns behind three system prompts of 64 tokens.

    A turn's prompt is all that was said before, and 20 to 40 tokens more; it comes 40 steps after
    the turn before it. Answers are of 8 to 24 tokens, all 0, as ``Counter`` says.
    """
    generator = random.Random(3)
    systems = [generator.choices(range(1, 1000), k=64) for _ in range(3)]
    requests = []
    for chat in range(num_chats):
        prompt = list(systems[chat % 3])
        begin = generator.randrange(30)
        for turn in range(num_turns):
            prompt = prompt + generator.choices(range(1, 1000), k=generator.randint(20, 40))
            new = generator.randint(8, 24)
            requests.append(Request(f"{chat}.{turn}", prompt, new, begin + 40 * turn))
            prompt = prompt + [0] * new
    return requests


def run_chats(num_blocks: int) -> tuple[Driver, EventLog]:
    """The chats on a pool of so many blocks of 16."""
    log = EventLog()
    manager = BlockManager(num_blocks, toy.BLOCK_SIZE, events=log)
    driver = Driver(manager, Counter(manager))
    driver.run(chats())
    return driver, log


def draw_pool_sizes(sizes: Sequence[int]) -> Figure:
    """How many prompt tokens of the chats are found, and how many blocks evicted, by pool size."""
    whole = sum(len(request.prompt) for request in chats())
    shares, evictions = [], []
    for size in sizes:
        driver, log = run_chats(size)
        shares.append(sum(driver.found.values()) / whole)
        evictions.append(len(log.of("evicted")))
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.6))
    for ax, values, title in zip(
        axes, (shares, evictions), ("prompt tokens found", "blocks evicted"), strict=True
    ):
        ax.plot(sizes, values, marker="o", ms=4)
        ax.set_title(title)
        ax.set_xlabel("blocks in the pool")
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.tight_layout()
    return figure


# ---- memory --------------------------------------------------------------------------------------


def draw_memory(rows: Count, alone: Count, shared: Count) -> Figure:
    """GiB held in every step: chapter 3's rows, blocks, and shared blocks."""
    token = bytes_per_token(MODELS[MODEL]) / GIB
    figure, ax = plt.subplots(figsize=(8.6, 3.0))
    steps = range(0, len(alone.held), 5)  # a curve of a thousand points needs no more
    ax.plot(steps, [rows.peak_gib] * len(steps), color=RED, ls=(0, (4, 2)))
    ax.text(20, rows.peak_gib - 6.5, f"a row for each: {rows.peak_gib:.1f} GiB", color=RED)
    for count, colour, name, y in (
        (alone, ORANGE, "blocks", 35.5),
        (shared, BLUE, "blocks, shared", 10),
    ):
        held = [count.held[step] * token for step in steps]
        ax.plot(steps, held, color=colour)
        ax.fill_between(steps, held, color=colour, alpha=0.15, lw=0)
        ax.text(20, y, f"{name}: {count.peak_gib:.1f} GiB at most", color=colour)
    ax.set(xlabel="step", ylabel="GiB", ylim=(0, rows.peak_gib * 1.06), xlim=(0, len(alone.held)))
    ax.grid(axis="y")
    return figure


def all_figures() -> dict[str, Figure]:
    """The figures of the text, by file name."""
    events = toy.play().manager.events.events
    return {
        "film.svg": draw_film(events, toy.NUM_BLOCKS),
        "tree.svg": draw_tree(prefix_tree(events), toy_texts()),
        "memory.svg": draw_memory(
            count_rows(), count_blocks(16, sharing=False), count_blocks(16, sharing=True)
        ),
    }


def main(folder: Path = FOLDER / "figures") -> None:
    write_figures(all_figures, folder)


if __name__ == "__main__":
    main()
