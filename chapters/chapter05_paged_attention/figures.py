"""The pictures of chapter 5, for its text and its notebook.

    python -m chapters.chapter05_paged_attention.figures    # writes figures/*.svg beside this file

Every picture is drawn from what the real code did: from recorded runs of the kernels, from the pool
of a batch that the embedded model answered, from counted request lengths.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import nn

from chapters.chapter03_naive_attention.memory import GIB, MODELS, bytes_per_token, workload
from chapters.chapter05_paged_attention import toy
from chapters.chapter05_paged_attention.drive import Pages, Request
from chapters.chapter05_paged_attention.memory import film
from chapters.chapter05_paged_attention.records import Recorder, Shares, record_decode, record_store
from minivllm.attention.paged_split import attend_to_piece

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "notebooks"))

from drawing import EMPTY, INK, PALETTE, write_figures  # noqa: E402

BLUE, ORANGE, GREEN, RED, PURPLE = PALETTE[:5]
NAMES = "ABCDEFGH"


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _cell(ax: Axes, x: float, y: float, colour: object, text: str = "", width: float = 1.0) -> None:
    box = Rectangle((x + 0.04, y + 0.04), width - 0.08, 0.92, fc=colour, ec="none")
    ax.add_patch(box)
    shade = INK if colour == EMPTY else "white"
    ax.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=8.5, color=shade)


# ---- the toy -------------------------------------------------------------------------------------


def draw_tables(store: Recorder, decode: Recorder) -> Figure:
    """Block tables, and the pool: which token the store kernel put where, who reads which block."""
    size, gap = toy.BLOCK_SIZE, 0.7
    written: dict[tuple[int, int], str] = {}
    for (token, _, _), events in store.stores_by_program("k_cache").items():
        seq, position = (0, token) if token < toy.LENGTHS[0] else (1, token - toy.LENGTHS[0])
        for event in events:
            block, offset = (int(part[0]) for part in event.index[:2])
            written[block, offset] = f"{NAMES[seq]}{position}"
    figure, ax = plt.subplots(figsize=(8.6, 2.5))
    left = [block * (size + gap) for block in range(toy.NUM_BLOCKS)]
    for block in range(toy.NUM_BLOCKS):
        for offset in range(size):
            text = written.get((block, offset), "")
            colour = (BLUE, ORANGE)[NAMES.index(text[0])] if text else EMPTY
            _cell(ax, left[block] + offset, 0, colour, text)
        ax.text(left[block], 1.35, f"block {block}", fontsize=8.5, va="center")
        slots = f"slots {block * size} to {(block + 1) * size - 1}"
        ax.text(left[block], 1.85, slots, fontsize=8, va="center")
    # The entries of the tables that the decode kernel looked up, and where they led it.
    looked_up = sorted(
        {
            (int(seq), int(entry))
            for event in decode.select("block_tables", "load")
            for seq, entry in zip(*event.index, strict=True)
        }
    )
    places = {0: 9.0, 1: 15.5}
    tables = toy.block_tables()
    for seq, entry in looked_up:
        x, block = places[seq] + 1.2 * entry, int(tables[seq, entry])
        colour = (BLUE, ORANGE)[seq]
        _cell(ax, x, -3.6, colour, str(block), width=1.2)
        ax.plot(
            (x + 0.6, x + 0.6, left[block] + size / 2, left[block] + size / 2),
            # A later entry turns off higher up, so that no corner lies on another entry's line.
            (-2.6, -1.7 + 0.25 * seq - 0.5 * entry, -1.0 + 0.2 * seq - 0.5 * entry, -0.05),
            color=colour,
            lw=1.4,
        )
    for seq, x in places.items():
        ax.text(x - 0.25, -3.1, f"table of {NAMES[seq]}", ha="right", va="center", fontsize=9)
    ax.set(xlim=(-0.2, left[-1] + size + 0.2), ylim=(2.2, -3.8))
    _bare(ax)
    return figure


# ---- a pool at work ------------------------------------------------------------------------------


def fill_pool(
    model: nn.Module, requests: Sequence[tuple[int, int]], num_blocks: int, block_size: int
) -> list[list[tuple[int, list[int], int]]]:
    """Run requests side by side and look at the pool after every step.

    requests: (prompt, new) token counts; all begin at once, and a request that ends gives its
    blocks back before the next step. Returns for each step the running ones: (number, block table,
    tokens stored).
    """
    generator = torch.Generator().manual_seed(0)
    pages = Pages(model, num_blocks, block_size)
    waiting = []
    for number, (prompt, _) in enumerate(requests):
        token_ids = torch.randint(model.config.vocab_size, (prompt,), generator=generator)
        waiting.append((number, Request(NAMES[number], token_ids.tolist())))
    pictures = []
    while waiting:
        pages.step([request for _, request in waiting])
        held = (pages.cache.k[0] != 0).flatten(2).any(dim=2).flatten()
        for _, request in waiting:
            slots = _slots(request.table, request.stored, block_size)
            assert held[slots].all(), "a token is not where the table says"
        pictures.append([(n, list(r.table), r.stored) for n, r in waiting])
        for number, request in waiting:
            if len(request.answer) == requests[number][1]:
                pages.end(request)
        waiting = [(n, r) for n, r in waiting if r.table]
    return pictures


def _slots(table: Sequence[int], count: int, block_size: int) -> list[int]:
    return [block * block_size + i for block in table for i in range(block_size)][:count]


def draw_pool(
    pictures: Sequence[list[tuple[int, list[int], int]]],
    num_blocks: int,
    block_size: int,
    steps: Sequence[int],
) -> Figure:
    """The pool after some steps, four blocks a row: tokens full, empty slots of a block faint."""
    across = 4
    rows = -(-num_blocks // across)
    figure, axes = plt.subplots(
        len(steps), 1, figsize=(8.6, len(steps) * (0.26 * rows + 0.42)), squeeze=False
    )
    owners = {number for step in pictures for number, _, _ in step}
    labels = [f"blocks {across * row}–{across * row + across - 1}" for row in range(rows)]
    for ax, step in zip(axes[:, 0], steps, strict=True):
        owner: dict[int, tuple[int, int]] = {}
        for number, table, stored in pictures[step]:
            for place, block in enumerate(table):
                owner[block] = number, min(block_size, stored - place * block_size)
        for block in range(num_blocks):
            x = block % across * (block_size + 1.5)
            y = block // across
            number, count = owner.get(block, (-1, 0))
            fill = EMPTY if number < 0 else PALETTE[number]
            alpha = None if number < 0 else 0.3
            ax.add_patch(
                Rectangle((x, y + 0.08), block_size, 0.84, fc=fill, ec="none", alpha=alpha)
            )
            for offset in range(count):
                box = Rectangle((x + offset + 0.06, y + 0.08), 0.88, 0.84, fc=fill, ec="none")
                ax.add_patch(box)
        ax.set(xlim=(0, across * (block_size + 1.5) - 1.5), ylim=(rows, 0))
        ax.set_yticks(np.arange(rows) + 0.5, labels)
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        used = sum(stored for _, _, stored in pictures[step])
        taken = len(owner)
        ax.set_title(
            f"after step {step}: {taken} of {num_blocks} blocks taken, "
            f"{used} of their {taken * block_size} slots used"
        )
    handles = [Patch(fc=PALETTE[n], label=f"request {NAMES[n]}") for n in sorted(owners)]
    handles.append(Patch(fc=EMPTY, label="free"))
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(handles)
    )
    figure.tight_layout(h_pad=0.6)
    return figure


def draw_memory(model: str = "Qwen3-0.6B") -> Figure:
    """GiB that 256 requests hold after every step: in rows of 2,048, in pages of 64, the tokens."""
    requests, token = workload(), bytes_per_token(MODELS[model])
    figure, ax = plt.subplots(figsize=(8.6, 2.9))
    for name, unit, colour in (("rows of 2,048", 2048, RED), ("pages of 64", 64, BLUE)):
        run = film(requests, unit)
        ax.plot(np.array(run.reserved) * token / GIB, color=colour, label=name)
    tokens = np.array(film(requests, 1).held) * token / GIB
    ax.fill_between(range(len(tokens)), tokens, color=GREEN, alpha=0.35, lw=0, label="tokens")
    ax.set(xlabel="step", ylabel="GiB reserved", xlim=(0, len(tokens)), ylim=(0, None))
    ax.grid()
    ax.legend()
    return figure


# ---- pieces --------------------------------------------------------------------------------------


def draw_shares(run: Shares) -> Figure:
    """The line of tiles: which tokens of which sequence each program read, and the borders."""
    figure, ax = plt.subplots(figsize=(8.6, 1.75))
    x, programs = 0.0, run.tiles()
    cut_at = []
    for number, mine in enumerate(programs):
        begin = x
        for seq, token, count in mine:
            width = 1.0
            box = Rectangle((x + 0.05, 0.05), width - 0.1, 0.9, fc=PALETTE[seq], ec="none")
            box.set_alpha(0.3)
            ax.add_patch(box)
            filled = (width - 0.1) * count / 16
            ax.add_patch(Rectangle((x + 0.05, 0.05), filled, 0.9, fc=PALETTE[seq], ec="none"))
            if token == 0:
                ax.text(x + 0.1, -0.3, NAMES[seq], color=PALETTE[seq], weight="bold", fontsize=10)
            x += width
        ax.plot((begin + 0.08, x - 0.08), (1.3, 1.3), color=INK, lw=1.5)
        ax.text((begin + x) / 2, 1.75, f"program {number}", ha="center", va="center", fontsize=8.5)
        if number:
            cut_at.append(begin)
    for border in cut_at:
        ax.plot((border, border), (-0.1, 1.1), color=INK, lw=1.2, ls=(0, (2, 1.5)))
    ax.set(xlim=(-0.1, x + 0.1), ylim=(2.1, -0.75))
    _bare(ax)
    return figure


def draw_weights() -> Figure:
    """exp(score) of each key of the toy's A for query head 0, by piece.

    Read off the real ``attend_to_piece``: with one-hot values its output is the weights.
    """
    figure, ax = plt.subplots(figsize=(6.4, 2.3))
    for number, (part, colour) in enumerate(
        zip((slice(0, 4), slice(4, 6)), (BLUE, ORANGE), strict=True)
    ):
        keys = toy.K[part]
        one_hot = torch.eye(len(keys))[:, None].expand(-1, 2, -1)
        weights, lse = attend_to_piece(toy.Q[0], keys, one_hot, toy.SCALE)
        exps = weights[0] * lse[0].exp()
        ax.bar(range(6)[part], exps, color=colour, label=f"piece {number}: {exps.sum():.0f}")
    ax.set_xticks(range(6), [f"A{token}" for token in range(6)])
    ax.set_ylabel("exp(score)")
    ax.grid(axis="y")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_work(each: Sequence[int], shares: Sequence[int]) -> Figure:
    """How many tiles the programs of the two forms read."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.4), sharey=True)
    forms = (("a program a sequence", each, RED), ("equal shares", shares, BLUE))
    for ax, (name, tiles, colour) in zip(axes, forms, strict=True):
        ax.bar(range(len(tiles)), tiles, color=colour)
        ax.set_title(name)
        ax.set_xlabel("program")
        ax.grid(axis="y")
    axes[0].set_ylabel("tiles of keys")
    return figure


def draw_waste(sizes: Sequence[int]) -> Figure:
    """Chapter 3's 256 requests in pages of these sizes: what is used, and how long a table gets."""
    films = [film(workload(), size) for size in sizes]
    used = [100 * run.used for run in films]
    entries = [
        sum(run.reserved) / size / sum(run.running) for run, size in zip(films, sizes, strict=True)
    ]
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.6))
    for ax, values, title, colour in (
        (axes[0], used, "slots that hold a token, %", BLUE),
        (axes[1], entries, "entries of a block table", ORANGE),
    ):
        ax.plot(sizes, values, "o-", color=colour)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes[::2], [f"{size:,}" for size in sizes[::2]])
        ax.set(title=title, xlabel="slots a page")
        ax.grid()
    axes[0].set_ylim(0, 105)
    axes[1].set_yscale("log")
    return figure


def all_figures() -> dict[str, Figure]:
    """The figures of the text, by file name."""
    from minivllm.models.hub import model_folder
    from minivllm.models.loader import load_model

    model = load_model(model_folder(None), dtype=torch.float32)
    pictures = fill_pool(model, REQUESTS, 16, 16)
    return {
        "tables.svg": draw_tables(record_store(), record_decode()),
        "pool.svg": draw_pool(pictures, 16, 16, [0, 11, 29]),
        "memory.svg": draw_memory(),
        "shares.svg": draw_shares(Shares(LINE, 4)),
    }


# Chapter 3's four requests, (prompt, new) tokens; and the sequences of the line of tiles.
REQUESTS = [(6, 30), (20, 12), (11, 24), (3, 5)]
LINE = [60, 25, 150, 40]


def main(folder: Path = FOLDER / "figures") -> None:
    write_figures(all_figures, folder)


if __name__ == "__main__":
    # Triton reads this when it is first imported; the recorder needs the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    main()
