"""What goes on inside a model while it runs, and cells to show it in; for notebook and figures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minivllm.models.generate import borrowed_attention


@torch.inference_mode()
def watch(
    model: nn.Module, token_ids: Sequence[int], positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run one sequence of T tokens; positions are 0 to T - 1 if none are given.

    Returns the logits [T, V], and what each part paid into the residual stream, [T, E] each, in
    this order: "embedding", "attention 1", "MLP 1", "attention 2", ...
    """
    parts = {"embedding": model.model.embed_tokens}
    for number, layer in enumerate(model.model.layers, start=1):
        parts[f"attention {number}"] = layer.self_attn
        parts[f"MLP {number}"] = layer.mlp
    paid: dict[str, torch.Tensor] = {}
    hooks = [
        part.register_forward_hook(lambda _module, _args, out, name=name: paid.update({name: out}))
        for name, part in parts.items()
    ]
    try:
        where = torch.arange(len(token_ids)) if positions is None else positions
        attend = borrowed_attention(model.config.head_size**-0.5)
        hidden = model(torch.tensor(list(token_ids)), where, attend)
    finally:
        for hook in hooks:
            hook.remove()
    return model.compute_logits(hidden), paid


def draw_cells(
    ax: Any,
    cells: Sequence[Sequence[tuple[str, str, bool]]],
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    faint: float = 0.18,
) -> None:
    """A table of coloured cells on matplotlib's ``ax``.

    cells: rows of (text, colour, full); a cell that is not full is faint, with text in the colour
    of all text. columns, rows: what stands above and to the left.
    """
    from drawing import INK
    from matplotlib.patches import Rectangle

    for row, line in enumerate(cells):
        for column, (text, colour, full) in enumerate(line):
            box = Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, lw=0)
            box.set(color=colour, alpha=1.0 if full else faint)
            ax.add_patch(box)
            place, look = (column + 0.5, row + 0.54), "white" if full else INK
            ax.text(*place, text, color=look, ha="center", va="center", fontsize=8)
    ax.set(xlim=(0, max(map(len, cells))), ylim=(len(cells), 0))
    ax.set_xticks([column + 0.5 for column in range(len(columns))], columns)
    ax.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
