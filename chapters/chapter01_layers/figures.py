"""The pictures of chapter 1, for its text and its notebook.

    python -m chapters.chapter01_layers.figures      # writes figures/*.svg beside this file

Every picture is drawn from what the real code did: operations that PyTorch ran, loads that the
recorder saw, frequencies that ``inverse_frequencies`` returned.
"""

import math
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from chapters.chapter01_layers import toy
from chapters.chapter01_layers.traffic import Operation, count_traffic
from minivllm.layers.layernorm import add_rms_norm
from minivllm.layers.rotary_embedding import RopeScaling, inverse_frequencies

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "notebooks"))

from drawing import EMPTY, INK, PALETTE, write_figures  # noqa: E402
from recorder import Recorder  # noqa: E402

BLUE, ORANGE, _, RED = PALETTE[:4]
# Llama 3.1's numbers, for all four ways: 8,192 tokens of pretraining, stretched by 8.
ORIGINAL, FACTOR, HEAD_SIZE, BASE = 8192, 8.0, 128, 500000.0
SCALINGS = {
    "linear": RopeScaling("linear", FACTOR),
    # factor=1 makes the stretch exactly max_positions / original: the NTK-aware base change.
    "NTK-aware": RopeScaling("dynamic", 1.0, ORIGINAL),
    "YaRN": RopeScaling("yarn", FACTOR, ORIGINAL),
    "llama3": RopeScaling("llama3", FACTOR, ORIGINAL),
}


def eager_operations(tokens: int, size: int) -> list[Operation]:
    """What eager PyTorch does for add_rms_norm in bfloat16."""
    x, residual = torch.ones(2, tokens, size, dtype=torch.bfloat16)
    return count_traffic(add_rms_norm, x, residual, torch.ones_like(x[0]), 1e-6)


def fused_operation(tokens: int, size: int) -> Operation:
    """What the kernel of add_rms_norm does, as the recorder saw it, every tensor counted once.

    In float16, which has the size of bfloat16: the interpreter cannot do bfloat16. (The weight is
    asked for by every program, but it is small and stays in a cache.)
    """
    from minivllm.layers import layer_kernels

    x, residual = torch.ones(2, tokens, size, dtype=torch.float16)
    weight = torch.ones_like(x[0])
    tensors = {"x": x, "residual": residual, "weight": weight}
    with Recorder(tensors, register_arguments=True) as rec:
        layer_kernels.add_rms_norm(x, residual, weight, 1e-6)
    read = sum(int((rec.times_read(name) > 0).sum()) for name in rec.shapes)
    written = sum(int((rec.times_written(name) > 0).sum()) for name in rec.shapes)
    return Operation("one kernel", read * x.itemsize, written * x.itemsize)


def draw_traffic(operations: list[Operation], fused: Operation, numbers: int) -> Figure:
    """A bar for each operation, and one for the fused kernel: bytes for each of ``numbers``."""
    bars = [*operations, Operation("", 0, 0), fused]
    total = sum(operation.bytes for operation in operations) / numbers
    figure, ax = plt.subplots(figsize=(7.2, 3.4))
    place = np.arange(len(bars))
    read, written = np.array([(op.bytes_read, op.bytes_written) for op in bars]).T / numbers
    ax.barh(place, read, color=BLUE, label="read", height=0.7)
    ax.barh(place, written, left=read, color=ORANGE, label="written", height=0.7)
    for y, both in zip(place, read + written, strict=True):
        if bars[y].name:
            ax.text(both + 0.12, y, f"{both:.0f}", va="center", fontsize=9)
    ax.set_yticks(place, [operation.name.replace("_", " ") for operation in bars])
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 10.5), xlabel="bytes for each number of the result")
    least = fused.bytes / numbers
    ax.set_title(f"add_rms_norm in 16 bits: {total:.0f} bytes in eager PyTorch, {least:.0f} fused")
    ax.legend(loc="upper right")
    return figure


def record_toy(x: torch.Tensor, block: int = toy.BLOCK) -> Recorder:
    """Run the real kernel of add_rms_norm on the toy, with ``x`` in place of the toy's own x."""
    from minivllm.layers.layer_kernels import add_rms_norm_kernel

    tensors = {"x": x, "residual": toy.RESIDUAL, "weight": toy.WEIGHT}
    tensors |= {"out": torch.empty(3, 6), "total": torch.empty(3, 6)}
    with Recorder(tensors) as rec:
        add_rms_norm_kernel[(3,)](
            *tensors.values(), x.stride(0), toy.RESIDUAL.stride(0), 6, 6, toy.EPS, BLOCK=block
        )
    return rec


def draw_lanes(rec: Recorder, values: torch.Tensor, name: str = "x") -> Figure:
    """Memory as the line it is, and below it the lanes that each program loaded from it.

    values: the memory that holds the tensor ``name``, one flat tensor that begins where it begins.
    """
    loads = rec.select(name, "load")
    lanes, memory = loads[0].mask.size, len(values)
    figure, ax = plt.subplots(figsize=(0.34 * max(memory, 2 * lanes) + 1.6, 0.36 * 6.2))
    shift = (memory - lanes) / 2
    for place in range(memory):
        _cell(ax, place, 0, f"{values[place]:g}", EMPTY)
    for load in loads:
        row, colour = load.program[0], PALETTE[load.program[0]]
        y = 2.2 + 1.25 * row
        ax.text(shift - 0.4, y + 0.5, f"program {row}", ha="right", va="center", color=colour)
        for lane in range(lanes):
            if load.mask[lane]:
                place = int(load.offsets[lane])
                _cell(ax, place, 0, f"{values[place]:g}", colour)
                _cell(ax, shift + lane, y, f"{values[place]:g}", colour)
            else:
                _cell(ax, shift + lane, y, "0", "none", edge=colour)
    ax.text(-0.4, 0.5, f"memory of {name}", ha="right", va="center")
    for lane in range(lanes):
        ax.text(shift + lane + 0.5, 1.85, str(lane), ha="center", va="center", fontsize=8)
    ax.text(shift - 0.4, 1.85, "lane", ha="right", va="center", fontsize=8)
    ax.set(xlim=(-5.2, memory + 0.3), ylim=(2.2 + 1.25 * 3, -0.2))
    ax.set_aspect("equal")
    ax.axis("off")
    return figure


def _cell(ax: Axes, x: float, y: float, text: str, colour: object, edge: object = "none") -> None:
    dashed = (0, (2, 1.5)) if edge != "none" else "solid"
    box = Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, fc=colour, ec=edge, linestyle=dashed)
    ax.add_patch(box)
    on_colour = isinstance(colour, str) and colour != "none"
    ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8.5)
    if on_colour:
        ax.texts[-1].set_color("white")


def draw_rope_scaling() -> Figure:
    """For each pair of a head: the share of its speed that each way of scaling leaves it."""
    plain = inverse_frequencies(HEAD_SIZE, BASE, RopeScaling(), ORIGINAL)
    wavelength = 2 * math.pi / plain
    figure, ax = plt.subplots(figsize=(7.2, 3.5))
    for (name, scaling), colour in zip(SCALINGS.items(), PALETTE, strict=False):
        scaled = inverse_frequencies(HEAD_SIZE, BASE, scaling, int(ORIGINAL * FACTOR))
        ax.plot(wavelength, scaled / plain, ".-", color=colour, label=name, markersize=4, lw=1.3)
    ax.axvline(ORIGINAL, color=INK, lw=1, ls=":")
    ax.text(ORIGINAL * 1.15, 1.0, "8,192 tokens:\nthe pretraining", va="top", fontsize=9)
    ax.set_xscale("log")
    ax.set_yscale("log", base=2)
    ax.set_yticks([1, 0.5, 0.25, 0.125], ["1", "1/2", "1/4", "1/8"])
    ax.set(xlabel="wavelength: tokens until the pair has turned once", ylabel="speed kept")
    ax.set_title("What a stretch by 8 does to the 64 pairs of a head")
    ax.grid()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 0.06))
    return figure


def draw_hands(turned: torch.Tensor) -> Figure:
    """The pairs of a head as hands of clocks.

    turned: [positions, D], a head whose pairs were all (1, 0) before RoPE turned it.
    """
    positions, half = len(turned), turned.shape[-1] // 2
    figure, axes = plt.subplots(1, half, figsize=(2.3 * half, 2.5))
    for pair, ax in enumerate(axes):
        ax.add_patch(Circle((0, 0), 1, fill=False, ec=INK, lw=1, alpha=0.5))
        labelled: list[tuple[float, float]] = []
        for position in range(positions):
            x, y = float(turned[position, pair]), float(turned[position, pair + half])
            ax.plot([0, x], [0, y], color=PALETTE[pair], lw=1.5, alpha=0.45 + 0.55 * (not position))
            # Hands that lie close together are told apart by the first label alone.
            if all(math.dist((x, y), other) > 0.15 for other in labelled):
                ax.text(1.17 * x, 1.17 * y, str(position), ha="center", va="center", fontsize=8)
                labelled.append((x, y))
        ax.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
        ax.set_title(f"pair ({pair}, {pair + half})", loc="center")
        ax.axis("off")
    return figure


def draw_draws(shares: torch.Tensor, probabilities: torch.Tensor, races: torch.Tensor) -> Figure:
    """Left: how often each token was drawn. Right: logit + noise of every token in a few draws.

    shares, probabilities: [V]; races: [draws, V].
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.9), width_ratios=(3, 2))
    place = np.arange(len(shares))
    left.bar(place - 0.2, probabilities, 0.4, color=BLUE, label="softmax")
    left.bar(place + 0.2, shares, 0.4, color=ORANGE, label="drawn")
    left.set(xlabel="token", ylabel="share", xticks=place)
    left.legend()
    for draw, values in enumerate(races):
        right.plot([draw] * len(values), values, "o", color=EMPTY[:3], ms=4, alpha=0.7)
        winner = int(values.argmax())
        right.plot(draw, values[winner], "o", color=RED, ms=7)
        height = float(values[winner]) + 0.3
        right.text(draw, height, f"token {winner}", ha="center", va="bottom", fontsize=8.5)
    top = float(races.max()) + 1.3
    right.set(xlim=(-0.6, len(races) - 0.4), xlabel="draw", ylabel="logit + noise")
    right.set_ylim(top=top)
    right.set_xticks(range(len(races)))
    figure.tight_layout()
    return figure


def all_figures() -> dict[str, Figure]:
    """The figures of the text, by file name."""
    operations, fused = eager_operations(64, 1024), fused_operation(64, 1024)
    return {
        "traffic.svg": draw_traffic(operations, fused, 64 * 1024),
        "lanes.svg": draw_lanes(record_toy(toy.X), toy.X.flatten()),
        "rope_scaling.svg": draw_rope_scaling(),
    }


def main(folder: Path = FOLDER / "figures") -> None:
    write_figures(all_figures, folder)


if __name__ == "__main__":
    # Triton reads this when it is first imported; the recorder needs the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    main()
