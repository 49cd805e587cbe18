"""The figures of the chapter's text, drawn from what the model did.

    python -m chapters.chapter02_qwen3_model.figures

``growth.json`` comes from the chapter's ``measure``, everything else from the toy.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from chapters import ROOT
from chapters.chapter02_qwen3_model.toy import LETTERS, write_toy
from chapters.chapter02_qwen3_model.watch import watch
from minivllm.models.generate import generate_by_recomputing
from minivllm.models.loader import checkpoint_sources, load_model

matplotlib.use("svg")
sys.path.insert(0, str(ROOT / "notebooks"))

import matplotlib.pyplot as plt
from drawing import INK, PALETTE, use_style
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parent / "figures"
BLUE, ORANGE, GREEN, RED, VIOLET = PALETTE[:5]


def load_toy() -> nn.Module:
    with tempfile.TemporaryDirectory() as scratch:
        return load_model(write_toy(Path(scratch)))


def stream_of(model: nn.Module, letters: str) -> dict[str, list[float]]:
    """What the last token of ``letters`` meets on its way through the toy."""
    logits, paid = watch(model, [LETTERS.index(letter) for letter in letters])
    seen = {"logits": logits[-1], **{name: added[-1] for name, added in paid.items()}}
    seen["after attention"] = seen["embedding"] + seen["attention 1"]
    seen["after MLP"] = seen["after attention"] + seen["MLP 1"]
    with torch.inference_mode():
        seen["hidden"] = model.model.norm(seen["after MLP"])
    return {name: tensor.tolist() for name, tensor in seen.items()}


def draw_vector(
    ax: Axes,
    x: float,
    y: float,
    numbers: list[float],
    title: str,
    names: str = "",
    scale: float = 0.11,
) -> None:
    """Numbers as bars from a common zero, one below the other; ``y`` is the middle."""
    top = y + 0.5 * 0.2 * len(numbers)
    ax.text(x, top + 0.12, title, ha="center", va="bottom", fontsize=9.5, weight="bold")
    for row, number in enumerate(numbers):
        middle = top - 0.2 * (row + 0.5)
        shown = f"{number:.2f}".replace("-0.00", "0.00").replace("-", "\u2212")
        if names:
            ax.text(x - 0.5, middle, names[row], ha="center", va="center", fontsize=9)
        length = scale * number
        colour = BLUE if number > 0 else ORANGE
        ax.add_patch(Rectangle((x - 0.12, middle - 0.07), length, 0.14, color=colour, lw=0))
        ax.text(x + 0.46, middle, shown, ha="right", va="center", fontsize=8.5)
    ax.plot([x - 0.12] * 2, [top, top - 0.2 * len(numbers)], color=INK, lw=0.8)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **look: Any) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.2, **look}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)


def residual_stream() -> None:
    """Token b of ?ab: what each part reads from the stream and adds to it."""
    seen = stream_of(load_toy(), "?ab")
    _, ax = plt.subplots(figsize=(10.4, 4.0))
    ax.set(xlim=(-0.75, 9.5), ylim=(-0.85, 2.55))
    ax.axis("off")
    draw_vector(ax, 0, 0, seen["embedding"], "embedding", "abcd")
    for x, part, colour in ((1.6, "attention", GREEN), (4.4, "MLP", VIOLET)):
        draw_vector(ax, x, 1.7, seen[f"{part} 1"], f"{part} adds", "abcd")
        ax.text(x - 0.86, 1.15, "RMSNorm", ha="right", va="center", fontsize=9, color=colour)
        arrow(ax, (x - 0.78, 0), (x - 0.78, 1.69), color=colour, arrowstyle="-")
        arrow(ax, (x - 0.78, 1.67), (x - 0.6, 1.67), color=colour)
        arrow(ax, (x + 0.55, 1.67), (x + 0.73, 1.67), color=colour, arrowstyle="-")
        arrow(ax, (x + 0.73, 1.69), (x + 0.73, 0.12), color=colour)
        ax.text(x + 0.73, 0, "+", ha="center", va="center", fontsize=17, color=colour)
    arrow(ax, (0.52, 0), (2.22, 0))
    draw_vector(ax, 2.95, 0, seen["after attention"], "residual")
    arrow(ax, (2.42, 0), (2.74, 0))
    arrow(ax, (3.47, 0), (5.02, 0))
    draw_vector(ax, 5.75, 0, seen["after MLP"], "residual")
    arrow(ax, (5.22, 0), (5.54, 0))
    arrow(ax, (6.27, 0), (6.72, 0))
    draw_vector(ax, 7.05, 0, seen["hidden"], "RMSNorm")
    arrow(ax, (7.57, 0), (7.97, 0))
    draw_vector(ax, 8.75, 0, seen["logits"], "logits", LETTERS, scale=0.055)
    best = seen["logits"].index(max(seen["logits"]))
    middle = 0.2 * (len(LETTERS) / 2 - best - 0.5)
    ax.add_patch(Rectangle((8.13, middle - 0.1), 1.16, 0.2, fill=False, ec=RED, lw=1.6))
    ax.text(8.75, -0.79, f"next token: {LETTERS[best]}", ha="center", color=RED, fontsize=9.5)
    ax.text(-0.6, -0.79, "the residual stream of token b, the last of ?ab", fontsize=9.5)
    save("residual_stream")


def tensors_to_parameters() -> None:
    """The 13 tensors of the toy's file and the 10 parameters that they fill."""
    model = load_toy()
    sources = list(checkpoint_sources(model))
    parameters = dict(model.named_parameters())
    _, ax = plt.subplots(figsize=(9.6, 4.6))
    ax.set(xlim=(0, 10), ylim=(13.0, -1.5))
    ax.axis("off")
    ax.text(4.0, -1.1, "13 tensors in the file", ha="right", weight="bold")
    ax.text(6.0, -1.1, "10 parameters in the model", ha="left", weight="bold")
    rows = {name: 0.3 + index * 1.33 for index, name in enumerate(parameters)}
    fused = {"qkv_proj": GREEN, "gate_up_proj": VIOLET}
    for index, source in enumerate(sources):
        name = next(
            name
            for name, parameter in parameters.items()
            if parameter.data_ptr()
            <= source.target.data_ptr()
            < parameter.data_ptr() + parameter.numel() * parameter.element_size()
        )
        colour = next((colour for part, colour in fused.items() if part in name), BLUE)
        label = source.name.removeprefix("model.").replace(".weight", "")
        ax.text(4.0, index, f"{label}  {list(source.shape)}", ha="right", va="center", fontsize=9)
        ax.plot([4.1, 5.9], [index, rows[name]], color=colour, lw=2)
    for name, row in rows.items():
        label = name.removeprefix("model.").replace(".weight", "")
        shape = list(parameters[name].shape)
        colour = next((colour for part, colour in fused.items() if part in name), INK)
        ax.text(6.0, row, f"{label}  {shape}", va="center", fontsize=9, color=colour)
    save("tensors_to_parameters")


def recomputing() -> None:
    """Which rows of the toy are computed again, and what that costs on the embedded model."""
    model = load_toy()
    runs: list[list[int]] = []
    model.model.embed_tokens.register_forward_hook(
        lambda _module, args, _out: runs.append(args[0].tolist())
    )
    list(generate_by_recomputing(model, [LETTERS.index("?")], 9))
    growth = json.loads((FOLDER / "growth.json").read_text(encoding="utf-8"))
    _, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), width_ratios=(1, 1.25))
    for step, run in enumerate(runs):
        for row, token in enumerate(run):
            new = row >= (len(runs[step - 1]) if step else 0)
            box = Rectangle((step + 0.05, row + 0.05), 0.9, 0.9, lw=0)
            box.set(color=BLUE, alpha=1.0 if new else 0.22)
            left.add_patch(box)
            colour = "white" if new else INK
            place = (step + 0.5, row + 0.52)
            left.text(*place, LETTERS[token], color=colour, ha="center", va="center", fontsize=12)
    left.set(xlim=(0, len(runs)), ylim=(len(runs), 0), xlabel="step", ylabel="row")
    left.set_xticks([step + 0.5 for step in range(len(runs))], range(1, len(runs) + 1))
    left.set_yticks([])
    left.set_aspect("equal")
    left.spines[:].set_visible(False)
    rows = sum(map(len, runs))
    left.set_title(f"toy: {rows} rows computed, {len(runs)} were new")
    lengths = [row["length"] for row in growth["rows"]]
    times = [row["milliseconds"] for row in growth["rows"]]
    right.loglog(lengths, times, marker="o", color=BLUE)
    right.set(xlabel="tokens so far", ylabel="ms for the next token")
    right.set_title("embedded model, one CPU thread")
    right.set_xticks(lengths[:2] + lengths[3::2], [1, 64, 256, "1,024", "4,095"])
    right.set_yticks([10, 100, 1000], ["10", "100", "1,000"])
    right.minorticks_off()
    right.grid(axis="y")
    plt.tight_layout(w_pad=3)
    save("recomputing")


def save(name: str) -> None:
    plt.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close()


def main() -> None:
    use_style("svg")
    FOLDER.mkdir(exist_ok=True)
    residual_stream()
    tensors_to_parameters()
    recomputing()


if __name__ == "__main__":
    main()
