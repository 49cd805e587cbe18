"""Measurements as processes of their own, on the GPUs that are free.

One after the other, or beside one another where there are GPUs enough. One that fails is reported,
one that takes too long is ended with all that it started, and the others run all the same.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Stage:
    """A process to run on ``gpus`` GPUs, and what to do with its result (None if it failed)."""

    name: str
    command: list[str]
    gpus: int
    take: Callable[[dict[str, Any] | None], None]
    output: Path
    held: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0


def run_stages(stages: list[Stage], *, beside: bool, limit: float, save: Callable[[], None]) -> int:
    """Run them in their order; with ``beside`` a later one may begin on GPUs that are free.

    Returns how many failed. Interrupted or terminated, it ends those that run.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    free = visible.split(",") if visible else [str(number) for number in range(count)]
    waiting, running, failed = list(stages), [], 0
    # Stages have sessions of their own, and would run on. Only a main thread is told of signals.
    told = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if told:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or running:
            for stage in list(waiting):
                fits = stage.gpus <= len(free) or not count
                if fits and (beside or not running):
                    waiting.remove(stage)
                    stage.held = [free.pop(0) for _ in range(min(stage.gpus, len(free)))]
                    running.append(stage)
                    _begin(stage)
            if not running and waiting:
                # More GPUs than there are: the stage itself says so.
                running.append(waiting.pop(0))
                _begin(running[-1])
            time.sleep(0.1)
            for stage in list(running):
                assert stage.process is not None
                code, took = stage.process.poll(), time.monotonic() - stage.began
                if code is None and took > limit:
                    code = _end(stage)
                if code is None:
                    continue
                running.remove(stage)
                free += stage.held
                found = None
                # One that was killed may have written half of it.
                with suppress(OSError, json.JSONDecodeError):
                    found = json.loads(stage.output.read_text(encoding="utf-8"))
                stage.take(found)
                save()
                failed += code != 0
                how = "done" if code == 0 else f"FAILED (exit code {code})"
                print(f"{stage.name}: {how} after {took:.0f} s", flush=True)
    finally:
        for stage in running:
            _end(stage)
        if told and before is not None:
            signal.signal(signal.SIGTERM, before)
    return failed


def _end(stage: Stage) -> int | None:
    """Kill it, with the processes that it started itself; returns its exit code."""
    if stage.process is None:
        return None
    with suppress(ProcessLookupError):
        os.killpg(stage.process.pid, signal.SIGKILL)
    return stage.process.wait()


def _begin(stage: Stage) -> None:
    environment = dict(os.environ)
    if stage.held:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(stage.held)
    stage.process = subprocess.Popen(
        [sys.executable, "-m", *stage.command], env=environment, start_new_session=True
    )
    stage.began = time.monotonic()
