"""Run many variants of the package in one warm process; only the gates use it.

Starting Python with torch costs seconds, and the gates ask for dozens of runs. So this process
imports what all of them need once, and forks a child for each run; the child puts its package first
on the path and calls pytest.

    python -m chapters.machine.gate_runner JOBS.json RESULTS.json

A job is {"package": folder, "tests": [ids], "first": bool}; ``first`` stops at the first failure.
"""

import ast
import contextlib
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from chapters.machine.runner import TRACEBACK

PARALLEL = min(os.cpu_count() or 2, 8)
SECONDS = 300


def third_party(files: Iterable[Path], local: Iterable[str]) -> dict[str, set[str]]:
    """What these files import from elsewhere: module -> names, to be imported beforehand.

    local: top-level modules that must stay out, for they belong to the package under test.
    """
    wanted: dict[str, set[str]] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    wanted.setdefault(alias.name, set())
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                wanted.setdefault(node.module, set()).update(a.name for a in node.names)
    kept_out = set(local)
    return {
        module: names for module, names in wanted.items() if module.split(".")[0] not in kept_out
    }


def preload(modules: Mapping[str, Iterable[str]]) -> None:
    """Import all of it. Triton stays out unless its interpreter is chosen already."""
    for module, names in sorted(modules.items()):
        if module.split(".")[0] == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            continue
        # What is missing here is for the tests themselves to notice.
        with contextlib.suppress(ImportError, AttributeError):
            loaded = importlib.import_module(module)
            for name in names:
                getattr(loaded, name, None)


class Recorder:
    """A pytest plugin that notes the outcome of every test."""

    def __init__(self) -> None:
        self.tests: list[dict[str, Any]] = []
        self.errors: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests.append(
                {
                    "test": report.nodeid,
                    "outcome": report.outcome,
                    "when": report.when,
                    "text": report.longreprtext,
                }
            )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(report.longreprtext)


def run_child(job: Mapping[str, Any], result: Path) -> None:
    """Run one job in this process, write what came out, and end the process."""
    began = time.perf_counter()
    os.environ["MINIVLLM_WORKSPACE"] = job["package"]
    with open(result.with_suffix(".log"), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    recorder = Recorder()
    arguments = ["-p", "course_plugin", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    arguments += [*TRACEBACK, f"--rootdir={os.getcwd()}"]
    if job.get("first"):
        arguments.append("-x")
    code = pytest.main([*arguments, *job["tests"]], plugins=[recorder])
    outcome = {
        "code": int(code),
        "tests": recorder.tests,
        "errors": recorder.errors,
        "seconds": time.perf_counter() - began,
    }
    result.write_text(json.dumps(outcome), encoding="utf-8")


def run_all(jobs: Mapping[str, Mapping[str, Any]], scratch: Path) -> dict[str, Any]:
    """Run the jobs, ``PARALLEL`` at a time. A job that died or hung says so in ``errors``."""
    waiting = list(enumerate(jobs))
    running: dict[int, tuple[str, Path, float]] = {}
    results: dict[str, Any] = {}
    while waiting or running:
        while waiting and len(running) < PARALLEL:
            index, name = waiting.pop(0)
            result = scratch / f"{index}.json"
            pid = os.fork()
            if pid == 0:
                try:
                    run_child(jobs[name], result)
                finally:
                    os._exit(0)
            running[pid] = (name, result, time.monotonic() + SECONDS)
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            name, result, _ = running.pop(pid)
            results[name] = _read(result)
            continue
        for late in [pid for pid, job in running.items() if time.monotonic() > job[2]]:
            os.kill(late, 9)
        time.sleep(0.01)
    return results


def _read(result: Path) -> dict[str, Any]:
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    log = result.with_suffix(".log")
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
    return {"code": -1, "tests": [], "errors": [f"the run died or hung:\n{tail}"], "seconds": 0.0}


def main(argv: Sequence[str]) -> None:
    jobs = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    tests = Path("tests")
    # A forked child could not use CUDA if this process had initialised it: ask without doing so.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    files = [*tests.glob("*.py"), *Path("minivllm").rglob("*.py")]
    local = ["minivllm", "chapters", "recorder", *(file.stem for file in tests.glob("*.py"))]
    preload(third_party(files, local))
    assert "minivllm" not in sys.modules, "the children could not choose their package"
    # What is loaded by now need not be searched for garbage by every child.
    gc.freeze()
    results = run_all(jobs, Path(argv[1]).parent)
    Path(argv[1]).write_text(json.dumps(results), encoding="utf-8")
    # Some extension modules complain at length when they are torn down.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
