"""Work of other processes that begins when the tests are collected, and goes on beside them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest


class Background:
    """Runs what it is given, first come, first served; the tests run in the meantime.

    Two at a time: where there are two cores, both have work until the end, though the tests by then
    only wait.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._processes: list[subprocess.Popen[str]] = []
        self._cancelled = False

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Do this when its turn comes."""
        return self._pool.submit(work, *arguments)

    def run(
        self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """For submitted work: run a command, which does not outlive the tests."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        group = {"start_new_session": True} if os.name == "posix" else {}
        with subprocess.Popen(command, cwd=cwd, env=env, errors="replace", **pipes, **group) as run:
            self._processes.append(run)
            if self._cancelled:
                self._stop(run)
            output, errors = run.communicate()
        return subprocess.CompletedProcess(command, run.returncode, output, errors)

    def cancel(self) -> None:
        """Drop what has not begun, and end commands that are still running."""
        self._cancelled = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            self._stop(process)

    @staticmethod
    def _stop(process: subprocess.Popen[str]) -> None:
        if process.poll() is None:
            if os.name == "posix":
                # Its own children, too: it was started as the head of a group.
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()


BACKGROUND = pytest.StashKey[Background]()
