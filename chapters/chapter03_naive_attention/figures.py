"""The pictures of chapter 3, for its text and its notebook.

    python -m chapters.chapter03_naive_attention.figures    # writes figures/*.svg beside this file

Every picture is drawn from what the real code did. Attention weights are read off the real
``naive_attention`` by giving it one-hot values: its output then is the weights themselves.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import nn

from chapters.chapter03_naive_attention import toy
from minivllm.attention.naive import (
    CachedNaiveAttention,
    ContiguousKVCache,
    NaiveAttention,
    causal_mask,
    naive_attention,
)

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "notebooks"))

from drawing import EMPTY, INK, PALETTE, write_figures  # noqa: E402
from recorder import Recorder  # noqa: E402

BLUE, ORANGE, GREEN, RED, PURPLE = PALETTE[:5]
SLATE = "#6f7682"
# Cells with numbers in them: opaque, and dark enough for white letters.
CELLS = LinearSegmentedColormap.from_list("cells", [SLATE, BLUE])
# Small cells: nothing at 0, where the page shows through, then blue, then orange.
SHADES = LinearSegmentedColormap.from_list(
    "shades", [(0, (*to_rgba(BLUE)[:3], 0)), (0.5, to_rgba(BLUE)), (1, to_rgba(ORANGE))]
)


# ---- matrices ------------------------------------------------------------------------------------


def draw_matrix(
    ax: Axes, values: np.ndarray, shades: np.ndarray, texts: Sequence[Sequence[str]] | None = None
) -> None:
    """Cells of ``shades`` (0 to 1; NaN is an empty frame), with ``texts`` in them."""
    for (row, col), shade in np.ndenumerate(shades):
        hidden = np.isnan(shade)
        box = Rectangle(
            (col + 0.05, row + 0.05),
            0.9,
            0.9,
            fc="none" if hidden else CELLS(float(shade)),
            ec=INK if hidden else "none",
            lw=0.8,
            ls=(0, (2, 1.5)),
        )
        ax.add_patch(box)
        text = texts[row][col] if texts else f"{values[row, col]:g}"
        ax.text(col + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color="white")
    ax.set(xlim=(-0.1, values.shape[1] + 0.1), ylim=(values.shape[0] + 0.1, -0.1))
    ax.set_aspect("equal")
    ax.set_xticks(np.arange(values.shape[1]) + 0.5, range(values.shape[1]))
    ax.set_yticks(np.arange(values.shape[0]) + 0.5, range(values.shape[0]))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.xaxis.tick_top()


def one_hot_weights(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """The weights that naive_attention gives the keys: q [Q, H, D], k [L, G, D] -> [H, Q, L]."""
    values = torch.eye(len(k), dtype=q.dtype)[:, None].expand(-1, k.shape[1], -1)
    return naive_attention(q, k, values, scale).transpose(0, 1)


def draw_scores() -> Figure:
    """The toy's query head 0: dot products, the causal mask, and the weights that come out."""
    q, k = toy.Q[:, 0], toy.K[:, 0]
    dots = (q @ k.T).numpy()
    mask = causal_mask(4, 4).numpy()
    weights = one_hot_weights(toy.Q, toy.K, toy.SCALE)[0].numpy()
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.9))
    draw_matrix(axes[0], dots, dots / 4)
    left = [[f"{dots[i, j]:g}" if mask[i, j] else "" for j in range(4)] for i in range(4)]
    draw_matrix(axes[1], dots, np.where(mask, dots / 4, np.nan), left)
    draw_matrix(axes[2], weights, np.where(mask, weights, np.nan), eighths(weights))
    titles = ("query · key", "what the mask leaves", "weights")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, pad=14)
        ax.set_xlabel("key", fontsize=9)
        ax.xaxis.set_label_position("top")
    axes[0].set_ylabel("query", fontsize=9)
    return figure


def eighths(weights: np.ndarray) -> list[list[str]]:
    """The toy's weights as they are said: 4/8."""
    return [["" if not w else f"{round(8 * w)}/8" for w in row] for row in weights]


def draw_masks() -> Figure:
    """causal_mask for a prefill, a chunk after a cached prefix, and a decode step."""
    cases = {"prefill: (4, 4)": (4, 4), "the last 2 of 5: (2, 5)": (2, 5), "decode: (1, 5)": (1, 5)}
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.6), width_ratios=(4, 5, 5))
    for ax, (title, (num_queries, context_len)) in zip(axes, cases.items(), strict=True):
        mask = causal_mask(num_queries, context_len).numpy()
        texts = [["yes" if seen else "" for seen in row] for row in mask]
        draw_matrix(ax, mask, np.where(mask, 1.0, np.nan), texts)
        first = context_len - num_queries
        ax.set_yticks(np.arange(num_queries) + 0.5, range(first, context_len))
        ax.set_title(title, pad=8)
        ax.set_anchor("N")
    axes[0].set_ylabel("position of the query", fontsize=8.5)
    return figure


def draw_batch() -> Figure:
    """Two sequences end to end: who sees whom, by the weights that NaiveAttention gives."""
    q, k = toy.Q[toy.BATCH], toy.K[toy.BATCH]
    values = torch.eye(6)[:, None].expand(-1, 2, -1)
    weights = NaiveAttention(toy.CU_SEQLENS, toy.SCALE)(0, q, k, values)[:, 0].numpy()
    figure, ax = plt.subplots(figsize=(3.2, 3.2))
    draw_matrix(ax, weights, np.where(weights > 0, weights, np.nan), eighths(weights))
    ax.set_title(f"cu_seqlens = {toy.CU_SEQLENS}", pad=8)
    return figure


def layer_weights(model: nn.Module, token_ids: list[int]) -> list[torch.Tensor]:
    """The attention weights of every layer of a model on one sequence: [H, T, T] each."""
    scale = model.config.head_size**-0.5
    found = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found.append(one_hot_weights(q, k, scale))
        return naive_attention(q, k, v, scale)

    with torch.inference_mode():
        model(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
    return found


def draw_heads(layers: Sequence[torch.Tensor]) -> Figure:
    """A picture for each head of each layer."""
    heads = len(layers[0])
    figure, axes = plt.subplots(
        len(layers), heads, figsize=(1.8 * heads, 1.95 * len(layers)), squeeze=False
    )
    for row, weights in enumerate(layers):
        for head in range(heads):
            ax = axes[row, head]
            ax.imshow(weights[head].sqrt(), SHADES, vmin=0, vmax=1, interpolation="none")
            ax.plot((-0.5, len(weights[head]) - 0.5), (-0.5, len(weights[head]) - 0.5), lw=0.6)
            ax.lines[-1].set_color(INK)
            ax.set_title(f"layer {row}, head {head}", fontsize=8)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
    return figure


def draw_groups(num_heads: int, num_kv_heads: int) -> Figure:
    """Which KV head each query head reads, found by changing one KV head at a time."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, num_heads, 8, generator=generator)
    k, v = torch.randn(2, 3, num_kv_heads, 8, generator=generator)
    before = naive_attention(q, k, v, 0.3)
    moved = np.zeros((num_kv_heads, num_heads))
    for kv_head in range(num_kv_heads):
        changed = v.clone()
        changed[:, kv_head] += 1
        moved[kv_head] = (naive_attention(q, k, changed, 0.3) != before).any(dim=2).any(dim=0)
    figure, ax = plt.subplots(figsize=(0.45 * num_heads + 1, 0.45 * num_kv_heads + 0.7))
    draw_matrix(ax, moved, np.where(moved > 0, 1.0, np.nan), [[""] * num_heads] * num_kv_heads)
    ax.set_xlabel("query head whose output moved")
    ax.set_ylabel("KV head\nthat changed")
    return figure


# ---- the cache -----------------------------------------------------------------------------------


def fill_cache(
    model: nn.Module, requests: Sequence[tuple[int, int]], max_len: int
) -> tuple[list[np.ndarray], ContiguousKVCache]:
    """Run requests side by side and look at the cache after every step.

    requests: (prompt, new) token counts; all begin at once, and a row whose request has ended keeps
    what it holds. Returns, for each step, which positions of which row hold a token: bool
    [rows, max_len].
    """
    config = model.config
    cache = ContiguousKVCache(
        config, len(requests), max_len, dtype=model.lm_head.weight.dtype, device="cpu"
    )
    generator = torch.Generator().manual_seed(0)
    new = [
        torch.randint(config.vocab_size, (prompt,), generator=generator).tolist()
        for prompt, _ in requests
    ]
    held = [0] * len(requests)
    pictures = []
    for step in range(max(count for _, count in requests)):
        rows = [row for row, (_, count) in enumerate(requests) if step < count]
        starts = [held[row] for row in rows]
        ends = np.cumsum([0, *(len(new[row]) for row in rows)]).tolist()
        token_ids = torch.tensor([token for row in rows for token in new[row]])
        positions = torch.cat([torch.arange(len(new[row])) + held[row] for row in rows])
        attend = CachedNaiveAttention(cache, rows, starts, ends, config.head_size**-0.5)
        with torch.inference_mode():
            hidden = model(token_ids, positions, attend)
            tokens = model.compute_logits(hidden[torch.tensor(ends[1:]) - 1]).argmax(dim=1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            held[row] += len(new[row])
            new[row] = [token]
        pictures.append((cache.k[0] != 0).flatten(2).any(dim=2).numpy())
    return pictures, cache


def draw_cache(pictures: Sequence[np.ndarray], max_len: int, steps: Sequence[int]) -> Figure:
    """The rows of the cache after some of its steps: the prompt, new tokens, and what is empty."""
    num_rows = len(pictures[0])
    figure, axes = plt.subplots(
        len(steps), 1, figsize=(8.6, len(steps) * (0.2 * num_rows + 0.42)), squeeze=False
    )
    prompt = pictures[0]
    for ax, step in zip(axes[:, 0], steps, strict=True):
        now = pictures[step]
        for row in range(num_rows):
            ax.add_patch(Rectangle((0, row + 0.08), max_len, 0.84, fc=EMPTY, ec="none"))
        for row, place in np.argwhere(now):
            colour = BLUE if prompt[row, place] else ORANGE
            ax.add_patch(Rectangle((place + 0.06, row + 0.08), 0.88, 0.84, fc=colour, ec="none"))
        ax.set(xlim=(0, max_len), ylim=(num_rows, 0))
        ax.set_yticks(np.arange(num_rows) + 0.5, [f"row {row}" for row in range(num_rows)])
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(f"after step {step}: {now.sum()} of {now.size} used, {now.mean():.0%}")
    handles = [
        Patch(fc=BLUE, label="prompt"),
        Patch(fc=ORANGE, label="new tokens"),
        Patch(fc=EMPTY, label="reserved, empty"),
    ]
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3)
    figure.tight_layout(h_pad=0.6)
    return figure


def draw_growth(rows: Sequence[tuple[int, float, float]], title: str) -> Figure:
    """rows: (tokens so far, milliseconds recomputing, milliseconds with the cache)."""
    lengths, recomputing, cached = zip(*rows, strict=True)
    figure, ax = plt.subplots(figsize=(6.4, 3.2))
    ax.plot(lengths, recomputing, "o-", color=RED, label="recomputing (chapter 2)")
    ax.plot(lengths, cached, "o-", color=BLUE, label="with the KV cache")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.set(xlabel="tokens so far", ylabel="ms for the next token")
    ax.set_title(title)
    ax.grid()
    ax.legend()
    return figure


# ---- the kernel ----------------------------------------------------------------------------------


def record_kernel(lengths: Sequence[int], num_heads: int = 4, num_kv_heads: int = 2) -> Recorder:
    """Run the real naive kernel on random sequences, and watch its tile of weights."""
    from minivllm.attention.naive_kernels import naive_attention_triton

    generator = torch.Generator().manual_seed(1)
    tokens = sum(lengths)
    q = torch.randn(tokens, num_heads, 8, generator=generator)
    k, v = torch.randn(2, tokens, num_kv_heads, 8, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}
    with Recorder(tensors, register_arguments=True, watch=("weights",)) as rec:
        naive_attention_triton(q, k, v, cu_seqlens, scale=8**-0.5, max_seqlen=max(lengths))
    return rec


def held_weights(rec: Recorder, head: int, seq: int) -> dict[int, np.ndarray]:
    """For each row block of a head and sequence: the weights its program held, [ROWS, KEYS]."""
    return {
        shot.program[0]: shot.value  # the last binding wins: the divided weights
        for shot in rec.snapshots
        if shot.name == "weights" and shot.program[1:] == (head, seq)
    }


def draw_tiles(rec: Recorder, lengths: Sequence[int], head: int = 0) -> Figure:
    """What the programs of one head held of each sequence's score matrix, lane by lane."""
    figure, axes = plt.subplots(1, len(lengths), figsize=(8.6, 4.2), squeeze=False)
    for seq, (ax, length) in enumerate(zip(axes[0], lengths, strict=True)):
        tiles = held_weights(rec, head, seq)
        for block, tile in tiles.items():
            rows, keys = tile.shape
            top = block * rows
            place = (0, keys, top + rows, top)
            ax.imshow(np.sqrt(tile), SHADES, vmin=0, vmax=1, extent=place, interpolation="none")
            frame = Rectangle((0, top), keys, rows, fc="none", ec=PALETTE[1 + block], lw=2)
            ax.add_patch(frame)
            ax.text(
                keys + 1.5,
                top + rows / 2,
                f"program\n{(block, head, seq)}",
                va="center",
                fontsize=8.5,
                color=PALETTE[1 + block],
            )
        ax.plot((0, length, length), (length, length, 0), color=INK, ls=":", lw=1.5)
        middle = (length + keys) / 2
        ax.text(middle, 8, "beyond\nthe end", ha="center", va="center", fontsize=8.5)
        if length > 16:
            ax.text(27, 8, "after the\nquery", ha="center", va="center", fontsize=8.5)
        ax.set(xlim=(-1, keys + 1), ylim=(len(tiles) * rows + 1, -1))
        ax.set_xticks([0, length, keys])
        ax.set_yticks([block * rows for block in range(len(tiles) + 1)])
        ax.set_aspect("equal")
        ax.set_anchor("NW")
        ax.spines[:].set_visible(False)
        ax.set(xlabel="key", ylabel="query row")
        ax.set_title(f"sequence {seq}: {length} tokens")
    figure.tight_layout(w_pad=5)
    return figure


def lane_counts(rec: Recorder, lengths: Sequence[int]) -> dict[str, int]:
    """Lanes of all score tiles: needed, future (computed, then masked), and beyond the sequence."""
    counts = {"needed": 0, "future": 0, "beyond": 0}
    heads = 1 + max(program[1] for program in rec.programs)
    for seq, length in enumerate(lengths):
        for head in range(heads):
            for tile in held_weights(rec, head, seq).values():
                counts["beyond"] += tile.size
            counts["needed"] += length * (length + 1) // 2
            counts["future"] += length * (length - 1) // 2
    counts["beyond"] -= counts["needed"] + counts["future"]
    return counts


def draw_reads(rec: Recorder, name: str = "k") -> Figure:
    """How often every token's share of each KV head was read."""
    times = rec.times_read(name)
    assert (times == times[..., :1]).all(), "the numbers of a head are read together"
    times = times[..., 0].T  # [G, T]
    seen = sorted({int(n) for n in times.flat})
    figure, ax = plt.subplots(figsize=(8.6, 0.35 * len(times) + 0.75))
    for (head, token), count in np.ndenumerate(times):
        colour = PALETTE[seen.index(int(count))]
        ax.add_patch(Rectangle((token + 0.05, head + 0.05), 0.9, 0.9, fc=colour, ec="none"))
    ax.set(xlim=(0, times.shape[1]), ylim=(len(times), 0), xlabel="token")
    ax.set_yticks(np.arange(len(times)) + 0.5, [f"KV head {head}" for head in range(len(times))])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    handles = [Patch(fc=PALETTE[i], label=f"{count} times") for i, count in enumerate(seen)]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set_title(f"how often {name} is read")
    return figure


def all_figures() -> dict[str, Figure]:
    """The figures of the text, by file name."""
    from minivllm.models.hub import model_folder
    from minivllm.models.loader import load_model

    model = load_model(model_folder(None), dtype=torch.float32)
    pictures, _ = fill_cache(model, [(6, 30), (20, 12), (11, 24), (3, 5)], max_len=64)
    lengths = [40, 10]
    return {
        "scores.svg": draw_scores(),
        "cache.svg": draw_cache(pictures, 64, [0, 11, 29]),
        "tiles.svg": draw_tiles(record_kernel(lengths), lengths),
    }


def main(folder: Path = FOLDER / "figures") -> None:
    write_figures(all_figures, folder)


if __name__ == "__main__":
    # Triton reads this when it is first imported; the recorder needs the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    main()
