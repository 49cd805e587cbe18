"""Run a chapter's tests on a package, in a process of their own, and read what came out."""

import ast
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chapters.machine.manifest import Chapter, Course, CourseError

PLUGIN = "course_plugin"
# pytest's own tracebacks parse every file on the way, a second for each kernel that fails.
TRACEBACK = ["--tb=native"]


@dataclass(frozen=True)
class Outcome:
    """One test that ran. name: the test function; status: passed, failed or skipped.

    message: the first line or lines of the failure; text: all of it.
    """

    name: str
    status: str
    message: str = ""
    text: str = ""


@dataclass(frozen=True)
class Report:
    """What the tests of a chapter said. broken: why they could not even be collected."""

    outcomes: tuple[Outcome, ...] = ()
    broken: str = ""
    output: str = field(default="", repr=False)

    def of(self, names: Iterable[str]) -> list[Outcome]:
        """The outcomes of these test functions, every parameter of them."""
        wanted = set(names)
        return [outcome for outcome in self.outcomes if outcome.name in wanted]

    @property
    def green(self) -> bool:
        """Whether something ran, and nothing failed."""
        return (
            not self.broken
            and bool(self.outcomes)
            and all(outcome.status != "failed" for outcome in self.outcomes)
        )


def functions_in(file: Path) -> dict[str, str]:
    """The test functions in a file: name -> pytest's id below the file (``Class::name``)."""
    found: dict[str, str] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            found[node.name] = node.name
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name.startswith("test"):
                    found[item.name] = f"{node.name}::{item.name}"
    return found


def node_ids(course: Course, chapter: Chapter, names: Iterable[str]) -> list[str]:
    """pytest's ids of these test functions; CourseError names one that the chapter lacks."""
    known: dict[str, str] = {}
    for file in chapter.tests:
        for name, below in functions_in(course.root / file).items():
            known[name] = f"{file}::{below}"
    missing = [name for name in names if name not in known]
    if missing:
        raise CourseError(f"chapter {chapter.number}: no test is called {', '.join(missing)}")
    return [known[name] for name in dict.fromkeys(names)]


def run_tests(course: Course, parent: Path, tests: Sequence[str]) -> Report:
    """Run ``tests`` (files or node ids) on the package in ``parent``."""
    missing = [test for test in tests if not (course.root / test.split("::")[0]).exists()]
    if missing:
        raise CourseError(f"the tests are not there: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.xml"
        command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider"]
        command += [f"--junitxml={result}", f"--rootdir={course.root}", *TRACEBACK, *tests]
        done = subprocess.run(
            command,
            cwd=course.root,
            env=environment(course, parent, Path(scratch)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if not result.exists():
            return Report(broken=_tail(done.stdout, done.returncode), output=done.stdout)
        report = read_junit(result, done.stdout)
    if not report.outcomes and not report.broken:
        return Report(broken=_tail(done.stdout, done.returncode), output=done.stdout)
    return report


def environment(course: Course, parent: Path, scratch: Path) -> dict[str, str]:
    """The environment in which pytest tests the package in ``parent``."""
    paths = [str(course.root / "tests"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "MINIVLLM_WORKSPACE": str(parent.resolve()),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # The plugins that happen to be installed cost seconds a run, and no test needs one.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        # Failing examples of a half-written package are of no use to later runs.
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
    }


def read_junit(file: Path, output: str = "") -> Report:
    """The report in a JUnit file of pytest's."""
    outcomes, broken = [], ""
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        name = case.get("name", "").split("[")[0]
        bad = next((part for part in case if part.tag in ("failure", "error")), None)
        if bad is not None and bad.get("message") == "collection failure":
            broken = broken or f"{name}: {_last_error(bad.text or '')}"
        elif bad is not None:
            outcomes.append(Outcome(name, "failed", bad.get("message", ""), bad.text or ""))
        elif case.find("skipped") is not None:
            reason = case.find("skipped").get("message", "")  # type: ignore[union-attr]
            outcomes.append(Outcome(name, "skipped", reason))
        else:
            outcomes.append(Outcome(name, "passed"))
    return Report(tuple(outcomes), broken, output)


def _last_error(text: str) -> str:
    """The last line of a traceback that pytest marked as the error."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return marked[-1] if marked else text.strip().splitlines()[-1]


def _tail(output: str, code: int) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return "\n".join([f"pytest ended with code {code}", *lines[-5:]])
