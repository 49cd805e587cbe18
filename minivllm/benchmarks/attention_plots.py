"""The attention benchmarks' figures as pictures. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MARKERS = "osv^D*PX<>"


def plot_prefill(result: dict[str, Any], file: Path) -> None:
    """Rate by length, with the ceiling, and memory by length beside it."""
    panels = 2 if result["memory"] else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4), squeeze=False)
    rate = axes[0, 0]
    _lines(rate, result["records"], "length", "tflop_per_s", 1.0)
    rate.axhline(
        result["ceilings"]["matmul_flop_per_s"] / 1e12, color="gray", ls=":", label="matmul"
    )
    rate.set(xscale="log", xlabel="tokens a sequence", ylabel="TFLOP/s", title="Causal prefill")
    if panels == 2:
        memory = axes[0, 1]
        _lines(memory, result["memory"], "length", "peak_bytes", 2.0**-20)
        memory.set(
            xscale="log",
            yscale="log",
            xlabel="tokens of one sequence",
            ylabel="MiB beyond the inputs",
            title="Memory",
        )
    _finish(figure, file)


def plot_decode(result: dict[str, Any], file: Path) -> None:
    """Rate by batch size, a panel for each context, with the ceiling; of the first shape only."""
    shape = result["shape"]
    records = [
        record
        for record in result["records"]
        if record["context"] is not None
        and all(record[key] == shape[key] for key in ("num_heads", "num_kv_heads"))
    ]
    contexts = sorted({record["context"] for record in records})
    figure, axes = plt.subplots(
        1, len(contexts), figsize=(4 * len(contexts), 4), sharey=True, squeeze=False
    )
    for axis, context in zip(axes[0], contexts, strict=True):
        chosen = [record for record in records if record["context"] == context]
        _lines(axis, chosen, "sequences", "gb_per_s", 1.0)
        axis.axhline(
            result["ceilings"]["copy_bytes_per_s"] / 1e9, color="gray", ls=":", label="copy"
        )
        axis.set(xscale="log", xlabel="sequences", title=f"context {context}")
    axes[0, 0].set_ylabel("GB/s of K and V")
    _finish(figure, file)


def _lines(axis: Any, records: list[dict[str, Any]], x: str, y: str, factor: float) -> None:
    forms = list(dict.fromkeys(record["form"] for record in records))
    for form, marker in zip(forms, MARKERS, strict=False):
        chosen = [record for record in records if record["form"] == form]
        values = [record[y] * factor for record in chosen]
        axis.plot([record[x] for record in chosen], values, marker=marker, label=form)


def _finish(figure: Any, file: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150, facecolor="white")
    plt.close(figure)


PLOTS = {"prefill": plot_prefill, "decode": plot_decode}
