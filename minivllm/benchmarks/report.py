"""What every benchmark's result carries: the machine, the versions, the date and the command."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def machine_facts() -> dict[str, Any]:
    """Device, versions, date (UTC) and command line of this run."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        named = "1 thread" if threads == 1 else f"{threads} threads"
        device = f"{_processor()}, {os.cpu_count()} cores, {named}"
    return {
        "device": device,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "transformers", "minivllm")},
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join([Path(sys.argv[0]).name, *_without_files(sys.argv[1:])]),
    }


def write_report(file: str | None, result: dict[str, Any]) -> None:
    """Write ``result`` with the machine's facts as JSON, if a file is named."""
    if file is not None:
        report = {**machine_facts(), **result}
        Path(file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _without_files(arguments: list[str]) -> list[str]:
    """The command line but for where its results go, which is a matter of one machine."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith(("--output", "--plot")):
            kept.append(argument)
        skip = not skip and argument in ("--output", "--plot")
    return kept


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
