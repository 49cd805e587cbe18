"""The course machine, on a tiny course of its own: two chapters of arithmetic."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chapters import quote
from chapters.machine import imports, package, texts
from chapters.machine.check_report import print_check, short
from chapters.machine.cli import main
from chapters.machine.manifest import Course, CourseError
from chapters.machine.progress import Progress
from chapters.machine.runner import Outcome, Report
from chapters.machine.screen import Screen
from chapters.machine.source import (
    SourceError,
    blanked,
    find,
    is_blank,
    quoted_part,
    replaced,
    text_of,
)
from chapters.machine.standing import standing
from chapters.machine.text_checks import anchors, link_problems, shell_lines, shell_problem

SUMS = '''"""Adding (Peano 1889): the first storey."""

from functools import cache


def add(a: int, b: int) -> int:
    """The sum of a and b."""
    # Numbers know how.
    return a + b


class Counter:
    """Counts."""

    def __init__(self) -> None:
        self.value = 0

    def count(
        self,
        step: int = 1,  # how far
    ) -> int:
        self.value = add(self.value, step)
        # The new value is the answer.
        return self.value
        # Nothing comes after it.

    @cache
    def twice(self, x: int) -> int: return add(x, x)


LIMIT = 10
'''
PRODUCTS = '''"""Multiplying."""

from minivllm.sums.adding import add


def multiply(a: int, b: int) -> int:
    """The product of a and b, both at least 0."""
    total = 0
    for _ in range(b):
        total = add(total, a)
    return total
'''
SUMS_TEST = """
import subprocess, sys
from minivllm.sums.adding import Counter, add

def test_add():
    assert add(2, 3) == 5, "2 and 3 make 5"

def test_counter():
    counter = Counter()
    assert counter.count() == 1
    assert counter.count(4) == 5

def test_subprocess_sees_the_same_package():
    code = "import minivllm; print(minivllm.__file__)"
    run = [sys.executable, "-c", code]
    there = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    import minivllm
    assert there == minivllm.__file__
"""
PRODUCTS_TEST = """
from minivllm.products import multiply

def test_multiply():
    assert multiply(3, 4) == 12
"""
SUMS_TOML = """
[chapter]
number = 1
title = "Sums"
brings = "add"
adds = ["minivllm/sums/"]
tests = ["tests/test_chapter01_sums.py"]

[[task]]
id = "1.1"
title = "Adding"
targets = ["minivllm/sums/adding.py:add"]
task = "Add the two numbers."
tests = ["test_add"]
hints = ["Think.", "Think of a sign.", "Think of the plus sign."]
why = "Because numbers add."

[[task]]
id = "1.2"
title = "Counting"
targets = ["minivllm/sums/adding.py:Counter.count"]
task = "Add the step and return the new value."
tests = ["test_counter"]
hints = ["a", "b", "c"]
why = "Counting is adding."
"""
PRODUCTS_TOML = """
[chapter]
number = 2
title = "Products"
brings = "multiply"
adds = ["minivllm/products.py"]
tests = ["tests/test_chapter02_*.py"]

[[task]]
id = "2.1"
title = "Multiplying"
targets = ["minivllm/products.py:multiply"]
task = "Add a, b times."
tests = ["test_multiply"]
hints = ["a", "b", "c"]
why = "A product is a repeated sum."
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of two written chapters and a third that is still to come."""
    files = {
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "-q"\ntestpaths = ["tests"]\n',
        "minivllm/__init__.py": '"""A package."""\n',
        "minivllm/sums/__init__.py": "",
        "minivllm/sums/adding.py": SUMS,
        "minivllm/products.py": PRODUCTS,
        "minivllm/assets/data.txt": "ten\n",
        "chapters/chapter01_sums/chapter.toml": SUMS_TOML,
        "chapters/chapter02_products/chapter.toml": PRODUCTS_TOML,
        "chapters/chapter03_powers/chapter.toml": """[chapter]
number = 3
title = "Powers"
brings = "raise"
adds = ["minivllm/powers.py"]
tests = ["tests/test_chapter03_powers.py"]
""",
        "tests/conftest.py": 'pytest_plugins = ["course_plugin"]\n',
        "tests/test_chapter01_sums.py": SUMS_TEST,
        "tests/test_chapter02_products.py": PRODUCTS_TEST,
    }
    for name, text in files.items():
        package.write_file(tmp_path / name, text)
    shutil.copy(Path(__file__).with_name("course_plugin.py"), tmp_path / "tests")
    # Plugins that happen to be installed would cost a second a run.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("MINIVLLM_WORKSPACE", raising=False)
    return tmp_path


@pytest.fixture
def say(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command on the tiny course: its exit code, and all that it printed."""

    def run(*words: str) -> tuple[int, str]:
        code = main(words, root)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a workspace but the notes."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.name != ".progress.json"
    }


def learn(root: Path, *names: str, file: str = "minivllm/sums/adding.py") -> None:
    """Write the reference's solution of these functions into the workspace, as a learner would."""
    mine = root / "workspace" / file
    text = mine.read_text()
    for name in names:
        text = replaced(text, name, text_of((root / file).read_text(), name))
    mine.write_text(text + "\n# my own note\n")


# Blanks.


@pytest.mark.parametrize("name", ["add", "Counter.count", "Counter.twice", "Counter.__init__"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_and_solution_are_a_round_trip(name: str, newline: str) -> None:
    source = SUMS.replace("\n", newline)
    blank = blanked(source, name, "Task 1.1 (Adding): add.", "Task 1.1 (Adding): not written yet")
    assert blank != source
    assert is_blank(blank, name, "1.1") and not is_blank(source, name, "1.1")
    assert not is_blank(blank, name, "1.10")
    assert replaced(blank, name, text_of(source, name)) == source
    assert (newline == "\r\n") == ("\r" in blank) and "\n" in blank
    assert "\r\r" not in blank


def test_blank_keeps_the_head_and_nothing_of_the_body() -> None:
    blank = blanked(SUMS, "Counter.count", "Task 1.2 (Counting): count.", "Task 1.2 (Counting)")
    kept = text_of(blank, "Counter.count")
    assert kept == (
        "    def count(\n"
        "        self,\n"
        "        step: int = 1,  # how far\n"
        "    ) -> int:\n"
        "        # Task 1.2 (Counting): count.\n"
        '        raise NotImplementedError("Task 1.2 (Counting)")'
    )
    blank = blanked(SUMS, "add", "note", "message")
    assert '"""The sum of a and b."""' in blank and "Numbers know how" not in blank
    blank = blanked(SUMS, "Counter.twice", "note", "message")
    assert "    @cache\n    def twice(self, x: int) -> int:\n        # note\n" in blank


def test_long_blanks_are_wrapped() -> None:
    blank = blanked(SUMS, "add", "word " * 60, "Task 1.1 (Adding): " + "x" * 80)
    assert max(len(line) for line in blank.split("\n")) <= 110
    with pytest.raises(NotImplementedError, match=r"Task 1\.1 \(Adding\): x+"):
        namespace: dict = {}
        exec(blank, namespace)
        namespace["add"](1, 2)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (SUMS, "subtract", "no definition of subtract"),
        (SUMS, "Counter.reset", "no definition of Counter.reset"),
        (SUMS + "\ndef add(): return 1\n", "add", "2 definitions of add"),
        (SUMS, "LIMIT", "no function"),
        ("def f(:\n", "f", "line 1"),
        ('def f():\n    """Doc."""; return 1\n', "f", "share a line"),
        ('def f():\n    """Doc."""\n', "f", "no body"),
        ("@triton.jit\ndef f(x):\n    return x\n", "f", "triton.language"),
    ],
)
def test_blank_says_what_it_cannot_do(source: str, name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        blanked(source, name, "note", "message")


def test_kernel_blank_fails_with_the_name_of_its_task(tmp_path: Path) -> None:
    """In the interpreter on a CPU, in the compiler on a GPU: wherever this test runs."""
    pytest.importorskip("triton")
    source = '''
import triton
import triton.language as tl

@triton.jit
def helper(x):
    """Doubles."""
    return x + x

@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    """Doubles a block."""
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, helper(tl.load(x_ptr + offsets)))
'''
    message = "Task 1.4 (Doubling): not written yet"
    x = torch.ones(4, device="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("kernel", "helper"):
        blank = blanked(source, name, "note", message)
        assert f'tl.static_assert(False, "{message}")' in blank
        assert is_blank(blank, name, "1.4")
        file = tmp_path / f"blank_{name}.py"
        file.write_text(blank)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.raises(Exception) as caught:
            module.kernel[(1,)](x, BLOCK=4)
        chain, error = [], caught.value
        while error is not None:
            chain, error = [*chain, str(error)], error.__cause__ or error.__context__
        assert any(message in text for text in chain), chain
    assert x.tolist() == [1, 1, 1, 1]


def test_quoted_parts() -> None:
    assert quoted_part(SUMS, "Counter.count", "signature").startswith("def count(\n    self,")
    assert quoted_part(SUMS, "add", "body") == "# Numbers know how.\nreturn a + b"
    assert quoted_part(SUMS, "LIMIT", "all") == "LIMIT = 10"
    assert find(SUMS, "Counter.twice").first == find(SUMS, "Counter.twice").node.lineno - 1
    assert quote("chapters/__init__.py:quote").startswith("def quote(")
    with pytest.raises(ValueError, match="no definition of nothing"):
        quote("chapters/__init__.py:nothing")
    with pytest.raises(ValueError, match="no file"):
        quote("chapters/nothing.py")
    with pytest.raises(ValueError, match="part='head'"):
        quote("chapters/__init__.py:quote", "head")


# Manifests and packages.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('why = "Because numbers add."', "", "no 'why'"),
        ('title = "Adding"', 'title = "Adding"\nhint = "x"', "unknown entries: hint"),
        ('"Think.", ', "", "2 hints"),
        ('id = "1.2"', 'id = "1.3"', "must be 1.2"),
        ("number = 1", "number = 4", "chapter01_sums"),
        ("adding.py:add", "adding.py", "must be written like"),
        ('brings = "add"', "brings = 3", "must be a str"),
        ("[chapter]", "[chapter", "not valid TOML"),
    ],
)
def test_manifest_mistakes_are_named(root: Path, old: str, new: str, message: str) -> None:
    file = root / "chapters/chapter01_sums/chapter.toml"
    file.write_text(SUMS_TOML.replace(old, new, 1))
    with pytest.raises(CourseError, match=message) as caught:
        Course.load(root)
    assert "chapter01_sums/chapter.toml" in str(caught.value)


def test_every_file_has_the_owner_that_claims_it_most_closely(root: Path) -> None:
    file = root / "chapters/chapter02_products/chapter.toml"
    adds = '["minivllm/products.py", "minivllm/sums/late*.py", "minivllm/sums/last.py"]'
    file.write_text(PRODUCTS_TOML.replace('["minivllm/products.py"]', adds))
    for name in ("late_one.py", "last.py"):
        (root / "minivllm/sums" / name).touch()
    (root / "minivllm/stray.py").touch()
    course = Course.load(root)
    owners = {name.removeprefix("minivllm/"): course.owners(name) for name in course.package_files}
    assert owners == {
        "__init__.py": [0],
        "assets/data.txt": [0],
        "products.py": [2],
        "stray.py": [],
        "sums/__init__.py": [1],
        "sums/adding.py": [1],
        "sums/last.py": [2],
        "sums/late_one.py": [2],
    }


def test_cut_off_and_starter(root: Path) -> None:
    course = Course.load(root)
    reference = package.cut_off(course, 2)
    assert "minivllm/products.py" not in package.cut_off(course, 1)
    starter = package.starter(course, 2)
    assert starter["minivllm/sums/adding.py"] == SUMS
    assert is_blank(starter["minivllm/products.py"], "multiply", "2.1")
    assert package.with_solutions(course, starter, course.chapter(2).tasks) == reference


def test_imports_of_what_is_not_there_are_found() -> None:
    files = {
        "minivllm/__init__.py": "import json\ndef late():\n    import minivllm.llm\n",
        "minivllm/a/__init__.py": "",
        "minivllm/a/one.py": "from minivllm.a.two import x\nimport torch, minivllm.a.three\n",
        "minivllm/a/two.py": "from . import one\nfrom ..b import y\nx = 'minivllm.c.d'\n",
        "minivllm/a/good.py": "from .two import x\nfrom minivllm.a import two, x\nimport minivllm",
    }
    assert imports.unresolved(files, "minivllm/__init__.py") == []
    assert imports.unresolved(files, "minivllm/a/one.py") == ["2: minivllm.a.three"]
    assert imports.unresolved(files, "minivllm/a/two.py") == ["2: minivllm.b.y", "3: minivllm.c.d"]
    assert imports.unresolved(files, "minivllm/a/good.py") == []
    late = {**files, "minivllm/a/roof.py": "def f():\n    from minivllm import LLM\n"}
    assert imports.unresolved(late, "minivllm/a/roof.py") == ["2: minivllm.LLM"]


def outcome(name: str, status: str, text: str = "") -> Outcome:
    return Outcome(name, status, text.split("\n")[0], text)


@pytest.mark.parametrize(
    ("outcomes", "status", "message"),
    [
        ([outcome("test_add", "passed"), outcome("test_other", "failed")], "green", ""),
        ([outcome("test_add", "passed"), outcome("test_add", "failed", "no")], "red", "no"),
        ([outcome("test_add", "skipped", "no GPU")], "skipped", "no GPU"),
        ([outcome("test_add", "skipped"), outcome("test_add", "passed")], "green", ""),
        ([outcome("test_other", "passed")], "red", "its tests did not run"),
        # The failure that names the task is the one to show.
        (
            [outcome("test_add", "failed", "first"), outcome("test_add", "failed", "Task 1.1 (A)")],
            "red",
            "Task 1.1 (A)",
        ),
    ],
)
def test_a_task_stands_as_its_tests_say(
    root: Path, outcomes: list[Outcome], status: str, message: str
) -> None:
    _, task = Course.load(root).task("1.1")
    found = standing({"minivllm/sums/adding.py": SUMS}, task, Report(tuple(outcomes)))
    assert (found.status, found.message, found.blank) == (status, message, ())
    # A blank is red whatever the tests say.
    blank = package.with_blanks({"minivllm/sums/adding.py": SUMS}, [task])
    found = standing(blank, task, Report(tuple(outcomes)))
    assert found.status == "red" and found.blank == task.targets


@pytest.mark.parametrize(
    ("explained", "following", "says", "says_not"),
    [
        ((), 2, ["Because numbers add.", "Next:  python -m chapters start 2"], []),
        (("1.1",), None, ["Chapter 1 is done"], ["Because", "Next"]),
    ],
)
def test_check_explains_a_task_when_it_turns_green(
    root: Path,
    explained: tuple[str, ...],
    following: int | None,
    says: list[str],
    says_not: list[str],
) -> None:
    chapter, task = Course.load(root).task("1.1")
    printed = io.StringIO()
    report = Report((outcome("test_add", "passed"),))
    found = [standing({"minivllm/sums/adding.py": SUMS}, task, report)]
    print_check(Screen(printed), chapter, found, report, explained, following)
    text = printed.getvalue()
    assert all(part in text for part in says) and not any(part in text for part in says_not)
    assert "\x1b" not in text, "colours are for terminals"


# The way through the course.


def test_a_learner_goes_through_a_chapter(root: Path, say: Callable[..., tuple[int, str]]) -> None:
    code, text = say("list")
    assert code == 0 and "2 tasks" in text and "not written yet" in text and "start 1" in text

    code, text = say("start", "1")
    assert code == 0 and "wrote    workspace/minivllm/sums/adding.py" in text
    assert (root / "workspace/minivllm/assets/data.txt").read_text() == "ten\n"
    assert not (root / "workspace/minivllm/products.py").exists()

    code, text = say("check")
    assert code == 1
    assert "1.1  Adding    red\n       test_add\n         Task 1.1 (Adding): not written" in text
    assert "python -m chapters hint 1.2" in text and "0 of 2 tasks green" in text

    # One right answer, and one wrong: the assertion that failed, in short.
    mine = root / "workspace/minivllm/sums/adding.py"
    learn(root, "add", "Counter.count")
    right = mine.read_text()
    mine.write_text(right.replace("self.value = add(self.value, step)", "self.value = step"))
    code, text = say("check", "1")
    assert code == 1 and "1.1  Adding    green\n       Because numbers add." in text
    assert "1.2  Counting  red\n       test_counter\n         assert 4 == 5" in text
    assert "1 of 2 tasks green, 2 of 3 tests pass" in text
    assert "1 of 2 tasks" in say("list")[1]

    mine.write_text(right)
    code, text = say("check")
    assert code == 0 and "Chapter 1 is done: 2 of 2 tasks green, 3 of 3 tests pass." in text
    assert "Counting is adding." in text and "start 2" in text
    assert "Because numbers add." not in text, "it was explained when it turned green"

    # On to chapter 2: the learner's own code is kept to the byte.
    before = mine.read_bytes()
    code, text = say("start", "2")
    assert code == 0 and mine.read_bytes() == before
    assert "wrote    workspace/minivllm/products.py" in text and "sums" not in text
    assert is_blank((root / "workspace/minivllm/products.py").read_text(), "multiply", "2.1")
    assert say("start", "2")[1].count("nothing was changed") == 1


def test_hints_say_more_each_time(say: Callable[..., tuple[int, str]]) -> None:
    assert "hint 1.1 --step 2" in say("hint", "1.1")[1], "without a workspace nothing is kept"
    say("start", "1")
    shown = [say("hint", "1.1")[1] for _ in range(4)]
    assert [text.count("hint ") - text.count("chapters hint ") for text in shown] == [1, 2, 3, 3]
    assert "Think of the plus sign." in shown[2] and "solution 1.1" in shown[2]
    assert say("hint", "1.1", "--step", "2")[1].count("Think") == 1


def test_solution_and_diff_show_the_reference(say: Callable[..., tuple[int, str]]) -> None:
    code, text = say("solution", "1.1")
    assert code == 0 and text_of(SUMS, "add") in text and "adding.py, line 6" in text
    code, text = say("diff", "1")
    assert code == 0 and "+ minivllm/sums/adding.py" in text
    assert any("count()" in line and "task 1.2" in line for line in text.split("\n"))
    assert "+def multiply(a: int, b: int) -> int:" in say("diff", "2", "--patch")[1]


def test_start_in_the_middle_takes_the_chapters_below(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    code, text = say("start", "2")
    assert code == 0 and "Filled in from the reference: 1.1, 1.2" in text
    assert (root / "workspace/minivllm/sums/adding.py").read_text() == SUMS
    assert "2 of 2 tasks (2 given)" in say("list")[1]


def test_start_refuses_to_leave_a_red_chapter(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    say("start", "1")
    learn(root, "add")
    workspace = root / "workspace"
    before = snapshot(workspace)
    code, text = say("start", "2")
    assert code == 2 and "chapter 1 is not green yet (1.2 to write)" in text
    assert "start 2 --solved" in text and snapshot(workspace) == before

    code, text = say("start", "2", "--solved")
    assert code == 0 and "Filled in from the reference: 1.2." in text
    after = (workspace / "minivllm/sums/adding.py").read_text()
    assert after == SUMS + "\n# my own note\n"
    assert (workspace / "minivllm/products.py").exists()


def test_start_says_which_tests_are_red(root: Path, say: Callable[..., tuple[int, str]]) -> None:
    say("start", "1")
    learn(root, "add", "Counter.count")
    mine = root / "workspace/minivllm/sums/adding.py"
    mine.write_text(mine.read_text().replace("return a + b", "return a * b"))
    code, text = say("start", "2")
    assert code == 2 and "red: test_add (1.1), test_counter (1.2). `check 1` says why" in text
    assert "`reset 1.K`" in text and "start 2 --force" in text
    assert text.count("\n") == 1


def change_course(root: Path) -> None:
    """The course mends what it gives: another limit, another docstring."""
    file = root / "minivllm/sums/adding.py"
    file.write_text(SUMS.replace("LIMIT = 10", "LIMIT = 20").replace('"""Counts."""', '"""Up."""'))


def test_start_brings_given_code_up_to_date(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    say("start", "1")
    mine = root / "workspace/minivllm/sums/adding.py"
    learnt = "def add(a: int, b: int) -> int:\n    # I thought of this.\n    return b + a"
    mine.write_text(replaced(mine.read_text(), "add", learnt))
    before = mine.read_text()
    assert "changed some of the code" not in say("check")[1]
    change_course(root)
    assert "`python -m chapters start 1` brings it up to date" in " ".join(say("check")[1].split())
    assert mine.read_text() == before, "check changes nothing"
    (root / "minivllm/sums/fresh.py").write_text("new = 1\n")
    code, text = say("check")
    assert code == 2 and "fresh.py is missing; `python -m chapters start 1` puts it" in text

    code, text = say("start", "1")
    assert code == 0 and "up to date with the course  workspace/minivllm/sums/adding.py" in text
    after = mine.read_text()
    assert "LIMIT = 20" in after and '"""Up."""' in after
    assert text_of(after, "add") == learnt, "an exercise stays word for word"
    assert is_blank(after, "Counter.count", "1.2")
    assert (mine.parent / "fresh.py").read_text() == "new = 1\n"
    (backup,) = (root / "workspace/.backups").iterdir()
    assert (backup / "minivllm/sums/adding.py").read_text() == before
    code, text = say("start", "1")
    assert code == 0 and "nothing was changed" in text

    # On the way to the next chapter as well, and also if that is refused.
    (root / "minivllm/sums/adding.py").write_text(SUMS)
    code, text = say("start", "2")
    assert code == 2 and "(1.2 to write)" in text
    assert "(Brought up to date with the course: minivllm/sums/adding.py)" in text
    assert "LIMIT = 10" in mine.read_text()


def test_start_leaves_alone_what_the_learner_changed(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    say("start", "1")
    learn(root, "add", "Counter.count")  # and a note at the file's end
    mine = root / "workspace/minivllm/sums/adding.py"
    before = mine.read_text()
    change_course(root)
    test = root / "tests/test_chapter01_sums.py"
    test.write_text(
        f"{SUMS_TEST}\n\ndef test_limit():\n    import minivllm.sums.adding as adding\n"
        "    assert adding.LIMIT == 20\n"
    )
    code, text = say("start", "2")
    assert code == 2 and "red: test_limit." in text and mine.read_text() == before
    assert "apart from its exercises: workspace/minivllm/sums/adding.py" in text
    assert "delete it and say `start 1`" in text

    # Notes from before frames were noted: nobody can tell, so nothing is touched.
    notes = root / "workspace/.progress.json"
    kept = json.loads(notes.read_text())
    del kept["frames"]
    notes.write_text(json.dumps(kept))
    code, text = say("start", "2")
    assert code == 2 and mine.read_text() == before


def test_check_of_one_task(root: Path, say: Callable[..., tuple[int, str]]) -> None:
    say("start", "1")
    learn(root, "add")
    code, text = say("check", "1.1")
    assert code == 0 and "1.1  Adding  green" in text and "Counting" not in text
    assert "1 of 1 tests of this task pass." in text and "is done" not in text
    code, text = say("check", "1.2")
    assert code == 1 and "test_counter" in text and "1.1" not in text
    progress = Progress.load(root / "workspace")
    assert progress is not None and list(progress.green) == ["1.1"] and not progress.finished
    code, text = say("check", "1.7")
    assert code == 2 and "there is no task 1.7; chapter 1 has 1.1, 1.2" in text
    code, text = say("check", "one")
    assert code == 2 and "'one' is no chapter" in text


def test_start_never_overwrites_wrong_code_without_force(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    say("start", "1")
    learn(root, "add")
    workspace = root / "workspace"
    mine = workspace / "minivllm/sums/adding.py"
    mine.write_text(mine.read_text().replace("return a + b", "return a * b"))
    before = snapshot(workspace)
    code, text = say("start", "2", "--solved")
    assert code == 2 and "still red (1.1, 1.2), and that code is yours" in text
    assert "start 2 --force" in text and snapshot(workspace) == before

    wrong = mine.read_bytes()
    code, text = say("start", "2", "--force")
    assert code == 0 and mine.read_text() == SUMS
    (backup,) = (workspace / ".backups").iterdir()
    assert backup.name in text
    assert (backup / "minivllm/sums/adding.py").read_bytes() == wrong
    assert Progress.load(backup) is not None and Progress.load(workspace).chapter == 2


def test_start_again_puts_back_what_is_missing(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    say("start", "2")
    mine = root / "workspace/minivllm"
    (mine / "products.py").write_text("mine = 1\n")
    (mine / "sums/adding.py").unlink()
    code, text = say("check", "2")
    assert code == 2 and "adding.py is missing" in text and "start 2" in text
    code, text = say("start", "2")
    assert code == 0 and "wrote    workspace/minivllm/sums/adding.py" in text
    assert is_blank((mine / "sums/adding.py").read_text(), "add", "1.1"), "as its chapter gives it"
    assert (mine / "products.py").read_text() == "mine = 1\n"

    # Forced, the chapter begins anew; going back takes the later files away. Both keep a backup.
    say("start", "2", "--force")
    assert is_blank((mine / "products.py").read_text(), "multiply", "2.1")
    assert is_blank((mine / "sums/adding.py").read_text(), "add", "1.1"), "not of this chapter"
    code, text = say("start", "1")
    assert code == 2 and "already stands at chapter 2" in text and (mine / "products.py").exists()
    code, text = say("start", "1", "--force")
    assert code == 0 and "removed  workspace/minivllm/products.py" in text
    assert not (mine / "products.py").exists()
    backups = sorted((root / "workspace/.backups").iterdir())
    assert len(backups) == 2
    assert (backups[0] / "minivllm/products.py").read_text() == "mine = 1\n"


def test_start_does_not_replace_a_stray_file(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    say("start", "1")
    (root / "workspace/minivllm/sums/adding.py").write_text(SUMS)
    stray = root / "workspace/minivllm/products.py"
    stray.write_text("my_own = 1\n")
    code, text = say("start", "2")
    assert code == 2 and "products.py is already there" in text
    assert stray.read_text() == "my_own = 1\n"


def test_reset_makes_one_task_blank(root: Path, say: Callable[..., tuple[int, str]]) -> None:
    say("start", "1")
    learn(root, "add", "Counter.count")
    Progress(1, green={"1.1": "today", "1.2": "today"}, finished={"1": "x"}).save(
        root / "workspace"
    )
    mine = root / "workspace/minivllm/sums/adding.py"
    solved = mine.read_bytes()
    code, text = say("reset", "1.1")
    assert code == 0 and "1.1 Adding is blank again." in text
    assert is_blank(mine.read_text(), "add", "1.1")
    assert not is_blank(mine.read_text(), "Counter.count", "1.2")
    assert mine.read_text().endswith("# my own note\n")
    (backup,) = (root / "workspace/.backups").iterdir()
    assert (backup / "minivllm/sums/adding.py").read_bytes() == solved
    progress = Progress.load(root / "workspace")
    assert progress is not None and list(progress.green) == ["1.2"] and not progress.finished

    # A lost definition: refused, unless the whole file may be given anew.
    mine.write_text("# all gone\n")
    code, text = say("reset", "1.1")
    assert code == 2 and "no definition of add" in text and mine.read_text() == "# all gone\n"
    assert say("reset", "1.1", "--force")[0] == 0
    assert mine.read_text() == package.starter(Course.load(root), 1)["minivllm/sums/adding.py"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check",), "there is no workspace yet"),
        (("check", "1"), "there is no workspace yet"),
        (("reset", "1.1"), "there is no workspace yet"),
        (("start", "7"), "there is no chapter 7; chapters 1 to 2 are written"),
        (("start", "0"), "there is no chapter 0"),
        (("start", "3"), "chapter 3 (Powers) is not written yet"),
        (("start", "one"), "'one' is no chapter; a chapter is written like 4"),
        (("start", "1.1"), "1.1 is a task; start 1 begins its chapter"),
        (("diff", "1.2"), "1.2 is a task; diff 1 shows what its chapter adds"),
        (("check", "1.x"), "there is no workspace yet"),
        (("start",), "required: N"),
        (("hint", "1.9"), "there is no task 1.9; chapter 1 has 1.1, 1.2"),
        (("solution", "one"), "'one' is no task"),
        (("hint", "1"), "1 is a chapter; name one of its tasks: 1.1, 1.2"),
        (("solution", "1"), "1 is a chapter; name one of its tasks: 1.1, 1.2"),
        (("reset", "2"), "2 is a chapter; name one of its tasks: 2.1"),
        (("reset", "7"), "'7' is no task"),
        (("diff", "3"), "not written yet"),
        (("dance",), "invalid choice: 'dance'"),
    ],
)
def test_mistakes_get_one_clear_line(
    root: Path, say: Callable[..., tuple[int, str]], words: tuple[str, ...], message: str
) -> None:
    code, text = say(*words)
    assert code == 2 and message in text and text.count("\n") == 1
    assert not (root / "workspace").exists()


def test_half_written_and_damaged_workspaces(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    say("start", "1")
    workspace = root / "workspace"
    mine = workspace / "minivllm/sums/adding.py"
    mine.write_text(SUMS + "\ndef half(\n")
    before = snapshot(workspace)
    for words in (("check",), ("start", "2"), ("start", "2", "--solved"), ("reset", "1.1")):
        code, text = say(*words)
        assert code == 2 and "adding.py, line 33: '(' was never closed; mend it" in text, text
        assert "reset 1.1 --force" in text and text.count("\n") == 1
    code, text = say("check", "2")
    assert code == 2 and "stands at chapter 1; `python -m chapters start 2` comes first" in text
    assert snapshot(workspace) == before
    mine.write_bytes(b"\xff\xfe")
    code, text = say("check")
    assert code == 2 and "is not UTF-8" in text

    mine.write_text(SUMS)
    notes = workspace / ".progress.json"
    for damage in ("{", '{"chapter": "one"}', '{"chapter": 1, "stars": 5}', "[]"):
        notes.write_text(damage)
        code, text = say("check")
        assert code == 2 and ".progress.json is damaged" in text and text.count("\n") == 1
    notes.unlink()
    code, text = say("check")
    assert code == 2 and ".progress.json is missing" in text
    assert say("start", "1")[0] == 0 and mine.read_text() == SUMS
    noted = Progress.load(workspace)
    assert noted is not None and noted == Progress(1, frames=noted.frames)


def test_tests_that_cannot_be_collected_are_reported_once(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    say("start", "1")
    mine = root / "workspace/minivllm/sums/adding.py"
    mine.write_text(mine.read_text().replace("def add(", "def plus("))
    code, text = say("check")
    assert code == 1 and text.count("cannot import name 'add'") == 1


# Which package is tested.


@pytest.mark.parametrize(
    ("variable", "option", "header"),
    [
        (None, [], "package under test: reference (minivllm)"),
        ("1", [], "package under test: workspace/minivllm (chapter 1)"),
        (None, ["--workspace"], "package under test: workspace/minivllm (chapter 1)"),
    ],
)
def test_pytest_says_which_package_it_tests(
    root: Path,
    say: Callable[..., tuple[int, str]],
    variable: str | None,
    option: list[str],
    header: str,
) -> None:
    say("start", "1")
    (root / "workspace/minivllm/sums/adding.py").write_text(SUMS)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    if variable is not None:
        env["MINIVLLM_WORKSPACE"] = variable
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *option]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert header in done.stdout, done.stdout + done.stderr
    # The workspace stands at chapter 1: chapter 2's tests are left out, not red.
    expected = "4 passed" if "reference" in header else "3 passed"
    assert done.returncode == 0 and expected in done.stdout, done.stdout


def test_pytest_without_a_workspace_says_so(root: Path) -> None:
    env = {**os.environ, "MINIVLLM_WORKSPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest"], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 4 and "begin with `python -m chapters start 1`" in done.stderr


# The texts.

TEXT = """# A title: with `code`

See [the map](other.md#the-map), [gone](gone.md), ![figure](figure.png) and [web](https://a.b).
`[no link](nowhere.md)`

<!-- quote minivllm/sums/adding.py:add body -->

And:

<!-- quote minivllm/sums/adding.py:Counter.twice -->
```python
stale
```
after

<!-- map 2 -->
<!-- table of chapters -->
| stale |
end

````text
<!-- quote minivllm/nothing.py -->
```
````
"""


def test_sync_fills_every_marker_and_nothing_else(
    root: Path, say: Callable[..., tuple[int, str]]
) -> None:
    file = root / "README.md"
    file.write_text(TEXT)
    assert say("sync", "--check") == (1, "out of date: README.md\n")
    assert file.read_text() == TEXT
    assert say("sync") == (0, "filled: README.md\n")
    filled = file.read_text()
    assert "<!-- quote minivllm/sums/adding.py:add body -->\n```python\n# Numbers know how.\n" in (
        filled
    )
    assert "```python\n@cache\ndef twice(self, x: int) -> int: return add(x, x)\n```\nafter" in (
        filled
    )
    tree = ["  minivllm/", "    sums/", "      adding.py  Adding", "+   products.py  Multiplying"]
    assert "\n".join(tree) + "\n" in filled
    assert "| 2 | Products | `products.py` | multiply | 1 |\n| 3 |" in filled
    assert "stale" not in filled and filled.endswith(TEXT[TEXT.index("end\n") :])
    assert say("sync", "--check")[0] == 0


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("<!-- quote minivllm/sums/adding.py:gone -->", "no definition of gone"),
        ("<!-- quote minivllm/gone.py -->", "no file minivllm/gone.py"),
        ("<!-- quote minivllm/sums/adding.py:add head -->", "part='head'"),
        ("  <!-- quote minivllm/sums/adding.py:add -->", "at the margin"),
        ("text <!-- quote minivllm/sums/adding.py:add -->", "a line of its own"),
        ("<!-- quote minivllm/sums/adding.py:add -->\n```python", "never closed"),
        ("<!-- map 9 -->", "must name a chapter"),
        ("<!-- hints 1.9 -->", "there is no task 1.9"),
        ("<!-- bug 1.a -->", "there is no bug '1.a'"),
    ],
)
def test_wrong_markers_are_named(root: Path, marker: str, message: str) -> None:
    (root / "README.md").write_text(f"text\n\n{marker}\n")
    with pytest.raises(CourseError, match=message) as caught:
        texts.sync(Course.load(root))
    assert str(caught.value).startswith("README.md, line 3: ")


def test_links_are_followed(root: Path) -> None:
    file = root / "README.md"
    file.write_text(TEXT)
    (root / "other.md").write_text("# Other\n\n## The map\n\n## The `map`\n")
    assert anchors(root / "other.md") == {"other", "the-map", "the-map-1"}
    problems = list(link_problems(Course.load(root), file))
    assert problems == [
        "link to gone.md: there is no gone.md",
        "link to figure.png: there is no figure.png",
    ]
    file.write_text('[a](other.md#gone) <img src="nowhere.svg"> [b](../up.md)\n')
    assert len(list(link_problems(Course.load(root), file))) == 3


@pytest.mark.parametrize(
    ("line", "works"),
    [
        ("uv run python -m chapters start 1", True),
        ("uv run python -m chapters start 2 --solved && python -m chapters check", True),
        ("python -m chapters hint 1.2", True),
        ("MINIVLLM_WORKSPACE=1 uv run pytest -k chapter01", True),
        ("pytest --workspace -x tests/test_chapter01_sums.py", True),
        ("git clone https://a.b/c.git && cd c", True),
        ("python -m chapters strat 1", False),
        ("python -m chapters start 9", False),
        ("python -m chapters hint 1.9", False),
        ("python -m chapters check --loud", False),
        ("pytest -k chapter04", False),
        ("pytest tests/test_gone.py", False),
        ("pytest --wrkspace", False),
        ("python -m minivllm.sums.adding", True),
        ("python -m minivllm.sums.subtracting", False),
        ("python -m minivllm.sums.adding --fast", False),
        ("minivllm demo", False),
        ("jupyter lab notebooks/gone.ipynb", False),
        ("uv rnu pytest", False),
        ("make all", False),
        ("uv run 'pytest", False),
    ],
)
def test_shell_lines_are_checked(root: Path, line: str, works: bool) -> None:
    assert (shell_problem(Course.load(root), line) is None) == works


def test_shell_lines_are_found_in_console_blocks_alone() -> None:
    text = "$ no\n```console\n$ one \\\n  more\noutput\n$ two\n```\n```bash\n$ three\n```\n"
    assert list(shell_lines(text)) == [(4, "one   more"), (6, "two")]


def test_progress_is_plain_json(root: Path, say: Callable[..., tuple[int, str]]) -> None:
    say("start", "1")
    notes = json.loads((root / "workspace/.progress.json").read_text())
    names = ("__init__", "sums/__init__", "sums/adding")
    assert set(notes.pop("frames")) == {f"minivllm/{name}.py" for name in names}
    assert notes == {"chapter": 1, "green": {}, "given": [], "hints": {}, "finished": {}}


BUG_TOML = """
[[bug]]
id = "1.a"
title = "Two too few"
file = "minivllm/sums/adding.py"
find = "return a + b"
replace = "return a - b"
symptom = "2 and 3 make -1."
answer = "The sign."
test = "test_add"
"""


def test_hints_and_bugs_of_a_text_are_those_of_the_manifest(root: Path) -> None:
    manifest = root / "chapters/chapter01_sums/chapter.toml"
    manifest.write_text(manifest.read_text() + BUG_TOML)
    file = root / "README.md"
    stale = "<!-- hints 1.1 -->\n\nstale\n\n<!-- end of hints -->\nbetween\n"
    file.write_text(f"{stale}<!-- bug 1.a -->\nafter\n")
    texts.sync(Course.load(root))
    text = file.read_text()
    hint = "<details><summary>Hint 3</summary>\n\nThink of the plus sign.\n\n</details>\n"
    assert (
        f"{hint}<!-- end of hints -->\nbetween\n<!-- bug 1.a -->\n**1.a Two too few.** 2 and"
        in text
    )
    assert (
        "In `workspace/minivllm/sums/adding.py`:\n\n```diff\n-return a + b\n+return a - b\n" in text
    )
    assert "Diagnosis</summary>\n\nThe sign.\n\n</details>\n<!-- end of bug -->\nafter\n" in text
    assert "stale" not in text
    assert not texts.sync(Course.load(root), write=False)


def test_a_measured_block_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("a\n<!-- times x.json -->\nold\n<!-- end of times -->\nb\n")
    texts.replace_block(file, "times x.json", "new\nrows")
    assert file.read_text() == "a\n<!-- times x.json -->\nnew\nrows\n<!-- end of times -->\nb\n"
    with pytest.raises(ValueError, match="has no block from <!-- times y"):
        texts.replace_block(file, "times y.json", "new")


def test_a_failure_is_shown_whole_and_with_its_place() -> None:
    """What the test says is wrapped, not cut; an error that is no assertion names the line."""
    says = (
        "AssertionError: out is [1.0, 2.0], expected [3.0, 4.0]\nassert 1 <= 0\n +  where 1 = f()"
    )
    assert short(says, 80) == ["out is [1.0, 2.0], expected [3.0, 4.0]"]
    assert short("AssertionError: one two three four\n  five six", 14) == [
        "one two three",
        "  four",
        "  five six",
    ]
    long = "\n".join(f"row {number}" for number in range(20))
    assert short(long, 80)[-2:] == ["row 4", "..."]
    assert short("assert 1\n[+2 more lines; full report in element text]", 80) == ["assert 1"]
    trace = 'File "/home/x/workspace/minivllm/a.py", line 7, in f\nFile "/lib/torch.py", line 9'
    assert short("IndexError: too many", 80, trace) == [
        "IndexError: too many",
        "at workspace/minivllm/a.py:7",
    ]
    error = "OutOfBoundsError: load in f, /home/x/workspace/minivllm/a.py:7, program (0, 0)"
    assert short(error, 80, trace) == [
        "OutOfBoundsError: load in f, workspace/minivllm/a.py:7, program (0, 0)"
    ]
    assert short("assert 1 == 2", 80, trace) == ["assert 1 == 2"]


def test_no_command_lists_the_chapters(say: Callable[..., tuple[int, str]]) -> None:
    assert say() == say("list")
