"""The course's gates: what the chapters promise, proven for each of them.

The cheap ones compare texts. The expensive ones run tests on variants of the package (cut off after
a chapter, with exercises blank, with a bug planted); all variants that this session selected run in
one warm process, see chapters/machine/gate_runner.py.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from background import Background

from chapters import ROOT
from chapters.machine import imports, package, texts
from chapters.machine.manifest import Bug, Chapter, Course, Task
from chapters.machine.runner import environment, functions_in, node_ids
from chapters.machine.source import find
from chapters.machine.text_checks import (
    link_problems,
    notebook_problems,
    shell_lines,
    shell_problem,
)

COURSE = Course.load(ROOT)
CHAPTERS = list(COURSE.chapters.values())
TASKS = [(chapter, task) for chapter in CHAPTERS for task in chapter.tasks]
BUGS = [(chapter, bug) for chapter in CHAPTERS for bug in chapter.bugs]
TEXTS = texts.course_texts(ROOT)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def each(things: list[Any], name: Callable[[Any], str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("thing", things, ids=[name(thing) for thing in things])


def chapter_name(chapter: Chapter) -> str:
    return chapter.folder.name


def task_name(pair: tuple[Chapter, Task | Bug]) -> str:
    return f"{pair[0].folder.name}-{pair[1].id}"


def text_name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


# What the manifests say.


def test_chapters_are_numbered_without_a_gap() -> None:
    assert list(COURSE.chapters) == list(range(1, len(COURSE.chapters) + 1))


def test_every_file_of_the_package_belongs_to_one_chapter() -> None:
    owners = {file: COURSE.owners(file) for file in COURSE.package_files}
    wrong = {file: found for file, found in owners.items() if len(found) != 1}
    assert not wrong, f"files with no chapter, or with several: {wrong}"


@each(CHAPTERS, chapter_name)
def test_manifest_names_what_exists(thing: Chapter) -> None:
    if not thing.tasks:
        pytest.skip("the chapter has no tasks yet")
    assert COURSE.files(thing.number), "the chapter adds no file"
    missing = [test for test in thing.tests if not (ROOT / test).is_file()]
    assert not missing, f"no such tests: {missing}"
    assert thing.text.is_file(), "the chapter has no README.md"
    assert thing.notebook is None or (ROOT / thing.notebook).is_file(), thing.notebook
    for task in thing.tasks:
        node_ids(COURSE, thing, task.tests)
        for target in task.targets:
            assert target.file in COURSE.files(thing.number), (
                f"{task.label}: {target.file} is not a file of this chapter"
            )
            find(COURSE.read(target.file), target.name)
    for bug in thing.bugs:
        node_ids(COURSE, thing, [bug.test])
        assert COURSE.read(bug.file).count(bug.find) == 1, (
            f"bug {bug.id}: its text must occur once in {bug.file}"
        )


@each(CHAPTERS, chapter_name)
def test_every_test_of_a_chapter_is_in_its_manifest(thing: Chapter) -> None:
    there = (ROOT / "tests").glob(f"test_chapter{thing.number:02d}_*.py")
    missing = {text_name(file) for file in there} - set(thing.tests)
    assert not missing, f"{text_name(thing.folder)}/chapter.toml does not name {missing}"
    # Tasks name test functions without their file.
    files = [ROOT / file for file in thing.tests if (ROOT / file).is_file()]
    names = [name for file in files for name in functions_in(file)]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"two tests of the chapter are called {twice}"


# Packages made from the reference.


@each(CHAPTERS, chapter_name)
def test_cut_off_package_imports_nothing_later(thing: Chapter) -> None:
    files = package.cut_off(COURSE, thing.number)
    problems = [
        f"{name}:{problem}"
        for name in files
        if name.endswith(".py")
        for problem in imports.unresolved(files, name)
    ]
    assert not problems, f"the package after chapter {thing.number} imports what it has not"


@each([chapter for chapter in CHAPTERS if chapter.tasks], chapter_name)
def test_starter_with_its_solutions_put_back_is_the_reference(thing: Chapter) -> None:
    reference = package.cut_off(COURSE, thing.number)
    starter = package.starter(COURSE, thing.number)
    assert starter != reference
    assert package.with_solutions(COURSE, starter, thing.tasks) == reference
    # Each blank is right Python, and blanking it again changes nothing.
    for name, text in starter.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
    assert package.with_blanks(starter, thing.tasks) == starter


# Runs on variants of the package.


@dataclass(frozen=True)
class Job:
    """A run: how to make the package, the tests to run, whether the first failure is enough."""

    files: Callable[[], dict[str, str]]
    tests: Callable[[], list[str]]
    first: bool = False


def planted(bug: Bug, number: int) -> dict[str, str]:
    files = package.cut_off(COURSE, number)
    files[bug.file] = files[bug.file].replace(bug.find, bug.replace)
    return files


def one_blank(chapter: Chapter, task: Task, index: int) -> dict[str, str]:
    only = Task(**{**vars(task), "targets": (task.targets[index],)})
    return package.with_blanks(package.cut_off(COURSE, chapter.number), [only])


def all_jobs() -> Iterator[tuple[str, Job]]:
    for chapter in CHAPTERS:
        number = chapter.number
        # Earlier chapters' tests need no second run: their files are the same, byte for byte, and
        # import nothing that the longer package could change. MINIVLLM_ALL_GATES=1 runs them.
        everything = os.environ.get("MINIVLLM_ALL_GATES") == "1"
        tested = [found for found in CHAPTERS if everything or found is chapter]
        tests = [test for found in tested if found.number <= number for test in found.tests]
        yield (
            f"{chapter.folder.name}-cut-off",
            Job(lambda n=number: package.cut_off(COURSE, n), lambda tests=tests: tests),
        )
        if not chapter.tasks:
            continue
        names = [name for task in chapter.tasks for name in task.tests]
        yield (
            f"{chapter.folder.name}-starter",
            Job(
                lambda n=number: package.starter(COURSE, n),
                lambda c=chapter, names=names: node_ids(COURSE, c, names),
            ),
        )
        for task in chapter.tasks:
            for index, target in enumerate(task.targets):
                yield (
                    f"{chapter.folder.name}-{task.id}-{target.name}",
                    Job(
                        lambda c=chapter, t=task, i=index: one_blank(c, t, i),
                        lambda c=chapter, t=task: node_ids(COURSE, c, t.tests),
                        first=True,
                    ),
                )
        for bug in chapter.bugs:
            yield (
                f"{chapter.folder.name}-{bug.id}",
                Job(
                    lambda b=bug, n=number: planted(b, n),
                    lambda c=chapter, b=bug: node_ids(COURSE, c, [b.test]),
                ),
            )


JOBS = dict(all_jobs())


class Outcomes(dict[str, Any]):
    """Job -> what it came to. Too long to be shown in a failure."""

    def __repr__(self) -> str:
        return f"<outcomes of {len(self)} runs>"


RUNS = pytest.StashKey["Future[Outcomes]"]()


def selected_jobs(session: pytest.Session) -> list[str]:
    names = []
    for item in session.items:
        if item.path == Path(__file__) and hasattr(item, "callspec"):
            names.append(item.callspec.params.get("job"))
    return [name for name in JOBS if name in names]


def begin(session: pytest.Session, background: Background) -> None:
    """The runs take a minute or two of other processes: they begin before the first test."""
    names = selected_jobs(session)
    if names and hasattr(os, "fork"):
        session.config.stash[RUNS] = background.submit(run_jobs, names, background)


def run_jobs(names: list[str], background: Background) -> Outcomes:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        return run_jobs_in(Path(scratch), names, background)


def run_jobs_in(scratch: Path, names: list[str], background: Background) -> Outcomes:
    jobs = {}
    for index, name in enumerate(names):
        job = JOBS[name]
        folder = scratch / f"package{index}"
        tests = job.tests()
        if any(not (ROOT / test.split("::")[0]).is_file() for test in tests):
            continue
        package.write(COURSE, job.files(), folder, link=True)
        jobs[name] = {"package": str(folder), "tests": tests, "first": job.first}
    wanted, results = scratch / "jobs.json", scratch / "results.json"
    wanted.write_text(json.dumps(jobs), encoding="utf-8")
    # Runs go side by side: one thread each.
    env = {**environment(COURSE, ROOT, scratch), "OMP_NUM_THREADS": "1"}
    done = background.run(
        [sys.executable, "-m", "chapters.machine.gate_runner", str(wanted), str(results)],
        cwd=ROOT,
        env=env,
    )
    assert results.exists(), f"the runs ended with code {done.returncode}:\n{done.stderr[-3000:]}"
    return Outcomes(json.loads(results.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """What every job that this session selected came to."""
    if RUNS not in request.config.stash:
        pytest.skip("the gates fork their runs, which this system cannot")
    return request.config.stash[RUNS].result()


def ran(outcomes: Outcomes, job: str) -> list[dict[str, str]]:
    """The tests that a job ran; fails if it could not run them."""
    if job not in outcomes:
        pytest.skip("the chapter or its tests are not written yet")
    result = outcomes[job]
    assert not result["errors"], "\n".join(result["errors"])
    assert result["tests"], f"no test ran (pytest's code is {result['code']})"
    return [test for test in result["tests"] if test["outcome"] != "skipped"]


@pytest.mark.parametrize("job", [name for name in JOBS if name.endswith("-cut-off")])
def test_cut_off_package_passes_the_tests_of_its_chapter(outcomes: Outcomes, job: str) -> None:
    failed = [test for test in ran(outcomes, job) if test["outcome"] == "failed"]
    shown = "\n".join(f"{test['test']}\n{test['text'][-1000:]}" for test in failed[:3])
    assert not failed, f"{len(failed)} tests are red, beginning with\n{shown}"


@pytest.mark.parametrize(
    ("job", "task"),
    [(f"{chapter.folder.name}-starter", task) for chapter, task in TASKS],
    ids=[task_name(pair) for pair in TASKS],
)
def test_starter_is_red_in_every_exercise(outcomes: Outcomes, job: str, task: Task) -> None:
    results = ran(outcomes, job)
    for name in task.tests:
        ours = [test for test in results if function_of(test) == name]
        assert ours, f"{name} did not run on the starter (is it skipped here?)"
        # A test that several tasks share may meet another one's blank first.
        labels = [other.label for _, other in TASKS if name in other.tests]
        for test in ours:
            assert test["outcome"] == "failed", f"{test['test']} passes on the starter"
            assert any(f"{label}: not written yet" in test["text"] for label in labels), (
                f"{test['test']} does not name {' or '.join(labels)}:\n{test['text'][-1000:]}"
            )


@pytest.mark.parametrize("job", [name for name in JOBS if re.search(r"-\d+\.\d+-", name)])
def test_deleting_one_solution_turns_a_test_red(outcomes: Outcomes, job: str) -> None:
    failed = [test for test in ran(outcomes, job) if test["outcome"] == "failed"]
    assert failed, f"without the solution of {job} every test still passes"


@pytest.mark.parametrize(
    ("job", "bug"),
    [(f"{chapter.folder.name}-{bug.id}", bug) for chapter, bug in BUGS],
    ids=[task_name(pair) for pair in BUGS],
)
def test_planted_bug_is_killed(outcomes: Outcomes, job: str, bug: Bug) -> None:
    ours = [test for test in ran(outcomes, job) if function_of(test) == bug.test]
    assert any(test["outcome"] == "failed" for test in ours), f"{bug.test} lets {bug.id} live"


def function_of(test: dict[str, str]) -> str:
    return test["test"].split("[")[0].split("::")[-1]


# The texts.


def test_quotes_and_tables_in_the_texts_are_in_sync() -> None:
    stale = [text_name(file) for file in texts.sync(COURSE, write=False)]
    assert not stale, f"run `python -m chapters sync`; out of date: {stale}"


@each(TEXTS, text_name)
def test_links_and_figures_exist(thing: Path) -> None:
    assert not list(link_problems(COURSE, thing))


@each(TEXTS, text_name)
def test_shell_lines_name_what_exists(thing: Path) -> None:
    problems = []
    for number, line in shell_lines(thing.read_text(encoding="utf-8")):
        problem = shell_problem(COURSE, line)
        if problem:
            problems.append(f"line {number}: {line}: {problem}")
    assert not problems


@each(NOTEBOOKS, text_name)
def test_notebooks_quote_what_exists(thing: Path) -> None:
    assert not list(notebook_problems(COURSE, thing))
