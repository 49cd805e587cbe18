"""What a measurement is kept with, and how it is shown: for ``compare_forms``."""

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def environment(device: str) -> dict[str, str]:
    """What a measured number has to be read with."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(content: dict[str, Any]) -> str:
    """The Markdown table of a file that ``--json`` wrote: microseconds of each form.

    On a GPU a cell says ``call / alone``: called from Python, and in a CUDA graph.
    """
    rows = content["rows"]
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = [f"| us | tokens | {' | '.join(forms)} |", "|---|---|" + "---|" * len(forms)]
    for function, tokens in dict.fromkeys((row["function"], row["tokens"]) for row in rows):
        cells = []
        for form in forms:
            for row in rows:
                if (row["function"], row["tokens"], row["form"]) == (function, tokens, form):
                    times = [row["call_us"], row["device_us"]]
                    cells.append(" / ".join(_short(time) for time in times if time is not None))
        lines.append(f"| {function} | {tokens:,} | {' | '.join(cells)} |")
    settings = [f"{content['device']}, {content['dtype']}, rows of {content['size']:,} numbers"]
    settings.append(f"torch {content['torch']}, triton {content['triton']}")
    settings.append(f"{content['date']}, commit {content['commit']}")
    return "\n".join([*lines, "", "; ".join(settings) + "."])


def _short(time: float) -> str:
    return f"{time:,.0f}" if time >= 99.5 else f"{time:.1f}"
