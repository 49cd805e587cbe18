"""The front page and the map: their commands, figures, code and names are real.

Links, pictures and quotes of every text are checked in ``test_course_gates``.
"""

import ast
import json
import re
from pathlib import Path

import pytest

from chapters import ROOT, front_page
from chapters.machine.text_checks import anchors, shell_lines
from minivllm.benchmarks.commands import OWN_FLAGS
from minivllm.cli import _parser

README, MAP = ROOT / "README.md", ROOT / "HowToApproachvLLM.md"
PAGES = pytest.mark.parametrize("page", [README, MAP], ids=lambda page: page.name)


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _without_blocks(page: Path) -> str:
    return re.sub(r"^(`{3,}).*?^\1", "", _text(page), flags=re.DOTALL | re.MULTILINE)


def _links(page: Path) -> dict[str, Path]:
    """What the labels at the end of a page stand for."""
    found = re.findall(r"^\[([^\]]+)\]: (\S+)$", _text(page), flags=re.MULTILINE)
    return {label: ROOT / path for label, path in found}


@pytest.mark.parametrize("mark", front_page.BLOCKS)
def test_measured_blocks_are_those_of_their_files(mark):
    block = f"<!-- {mark} -->\n{front_page.BLOCKS[mark]()}\n<!-- end of {mark} -->"
    assert block in _text(README), "run `python -m chapters.front_page --write`"


def test_engines_follow_their_files(monkeypatch):
    before = front_page.engines()

    def slower(run: dict) -> None:
        run["rounds"] = [{**run["rounds"][0], "output_tokens_per_s": rate} for rate in (9e3, 1e4)]

    changed = _changed(monkeypatch, "throughput_h200.json", slower)
    row = next(line for line in changed.split("\n") if "**minivllm**" in line)
    assert changed != before and "| 9,000 to 10,000 |" in row
    changed = _changed(monkeypatch, "throughput_h200.json", lambda run: run["rounds"].pop())
    row = next(line for line in changed.split("\n") if "**minivllm**" in line)
    assert " to " not in row.split("|")[2], "one round is one figure"


def test_engines_of_a_wrong_run_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="wrong"):
        _changed(monkeypatch, "latency_h200.json", lambda run: run["check"].update(agrees=0.0))
    with pytest.raises(ValueError, match="output_tokens"):
        _changed(monkeypatch, "throughput_h200.json", lambda run: run.update(output_tokens=7))


def test_engines_of_the_same_run_are_shown(monkeypatch):
    peer = {
        "version": "9.9",
        "how": "all requests at once",
        "requests": 256,
        "output_tokens": 133966,
        "ready_seconds": 40.0,
        "seconds": [10.0, 5.0],
    }
    peers = {"vllm": peer, "absent": {"skipped": "absent is not installed"}}
    shown = _changed(monkeypatch, "throughput_h200.json", lambda run: run.update(peers=peers))
    (row,) = (line for line in shown.split("\n") if "9.9" in line)
    assert "13,400 to 26,800" in row and "40 s" in row
    assert "absent" not in shown


def _changed(monkeypatch, name, change):
    """The table of engines if a file held something else."""
    original = front_page.read

    def read(file):
        content = original(file)
        if file.name == name:
            change(content)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(front_page, "read", read)
        return front_page.engines()


def test_a_ladder_is_shown_where_there_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(front_page, "ROOT", tmp_path)
    monkeypatch.setattr(front_page, "FOLDER", tmp_path)
    assert front_page.ladders() == ""
    result = {
        "device": "A CPU",
        "versions": {"torch": "2.11"},
        "date": "2026-11-21 01:02 UTC",
        "command": "__main__.py bench ladder --output /elsewhere/a.json --plot /elsewhere/a.svg",
        "model": "the embedded tiny Qwen3",
        "dtype": "float32",
        "workload": {"requests": 32, "input_tokens": 6400, "output_tokens": 1024},
        "rungs": [
            {"name": "recompute everything", "output_tokens_per_s": 12.34},
            {"name": "continuous batching", "output_tokens_per_s": 1234.5},
            {"name": "CUDA graphs", "skipped": "CUDA graphs need a GPU"},
        ],
        "all_agree": True,
    }
    (tmp_path / "ladder_cpu.svg").write_text("<svg/>", encoding="utf-8")
    (tmp_path / "ladder_cpu.json").write_text(json.dumps(result), encoding="utf-8")
    shown = front_page.ladders()
    assert "recompute everything 12.3, continuous batching 1,234](ladder_cpu.svg)" in shown
    assert "`minivllm bench ladder`" in shown and "elsewhere" not in shown
    (tmp_path / "ladder_cpu.json").write_text(json.dumps({**result, "all_agree": False}))
    with pytest.raises(ValueError, match="differ"):
        front_page.ladders()


def test_every_chapter_on_the_ladder_quotes_its_rungs():
    for number, text in front_page.climbing_texts().items():
        block = front_page.rungs(number)
        assert f"<!-- rung -->\n{block}\n<!-- end of rung -->" in _text(text), (
            f"{text.parent.name}: run python -m chapters.front_page --write"
        )
        marked = [line for line in block.split("\n") if line.startswith("> ")]
        assert marked and all(line[2:].startswith(str(number)) for line in marked)
    assert "continuous batching" not in front_page.rungs(6)


@PAGES
def test_commands_are_understood(page):
    """As the program itself reads them: every subcommand, option and value."""
    inline = re.findall(r"`(uv run [^`]+)`", _text(page))
    commands = [line for _, line in shell_lines(_text(page))] + inline
    assert commands
    for command in commands:
        words = re.split(r" (?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", command)
        if words[:3] != ["uv", "run", "minivllm"] or "--help" in words:
            continue
        words = words[3:]
        if not words or words[0].startswith("-"):
            words.insert(0, "demo")
        try:
            options = _parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{command}: not understood")
        assert hasattr(options, "run"), command


def test_named_benchmarks_exist():
    named = set(re.findall(r"`bench ([\w-]+)`", _text(README)))
    assert named == set(OWN_FLAGS)


def test_the_library_example_runs(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", _text(README), flags=re.DOTALL | re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    whole, primes, streamed = lines[0], lines[1], lines[2:]
    assert "A block table lists the KV blocks" in whole and whole.endswith("stop")
    assert "2, 3, 5, 7, 11, 13, 17, 19, 23, 29" in primes
    assert len(streamed) > 10 and streamed[-1] + " stop" == whole


def test_folders_of_the_layout_exist():
    (layout,) = re.findall(r"^```text\n(.*?)^```", _text(README), flags=re.DOTALL | re.MULTILINE)
    folders = re.findall(r"^(\w+)/ ", layout, flags=re.MULTILINE)
    assert len(folders) == 4 and all((ROOT / folder).is_dir() for folder in folders)


def test_contents_are_the_headings():
    contents = re.findall(r"^- \[.*?\]\(#(.+?)\)$", _text(MAP), flags=re.MULTILINE)
    headings = re.findall(r"^## (.+)$", _text(MAP), flags=re.MULTILINE)
    assert len(contents) == len(headings) - 1, "every section but the contents"
    assert set(contents) <= anchors(MAP)


def test_the_picture_names_files():
    (picture,) = re.findall(r"^```text\n(.*?)^```", _text(MAP), flags=re.DOTALL | re.MULTILINE)
    files = re.findall(r"[\w/]+\.py", picture)
    assert len(files) > 10
    missing = [file for file in files if not (ROOT / "minivllm" / file).is_file()]
    assert not missing
    _is_there(re.findall(r"(\w+)\.(\w+)", re.sub(r"[\w/]+\.py", "", picture)))


def _is_there(pairs):
    """Classes of the package that have a method of this name, at one place or by inheritance."""
    methods = {}
    for file in (ROOT / "minivllm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                methods.setdefault(node.name, set()).update(names)
    missing = [f"{cls}.{method}" for cls, method in pairs if method not in methods.get(cls, ())]
    assert pairs and not missing


def test_names_stand_where_the_map_says():
    """Of `name` in [file.py], the file defines or uses the name."""
    links = _links(MAP)
    text = re.sub(r"\s+", " ", _text(MAP))
    mentions = re.findall(r"((?:`\w+`(?:, | and )?)+) in \[(\w+\.py)\]", text)
    mentions += re.findall(r"\((`\w+`) in \[(\w+\.py)\]\)", text)
    assert len(mentions) > 25
    missing = [
        f"{name} in {label}"
        for names, label in mentions
        for name in re.findall(r"`(\w+)`", names)
        if not re.search(rf"\b{name}\b", links[label].read_text(encoding="utf-8"))
    ]
    assert not missing


# What the map says about other people's programs.
ELSEWHERE = {"torch.compile", "tl.arange", "mode", "non_blocking"}


def test_code_in_the_map_is_our_code():
    """Whatever looks like code has names that our code has."""
    text = _without_blocks(MAP)
    sources = [
        file for folder in ("minivllm", "chapters") for file in (ROOT / folder).rglob("*.py")
    ]
    known = set(re.findall(r"\w+", "\n".join(file.read_text("utf-8") for file in sources)))
    names = [re.split(r"[(=\s]", code)[0] for code in re.findall(r"`([^`\n]+)`", text)]
    names = [name for name in names if re.fullmatch(r"[\w.]+", name) and name not in ELSEWHERE]
    assert len(names) > 40
    missing = [name for name in names if not set(name.split(".")) <= known]
    assert not missing


@PAGES
def test_labels_are_defined_and_used(page):
    text = re.sub(r"`[^`\n]*`", "", _without_blocks(page))
    used = set(re.findall(r"\[([\w .]+)\](?![(:])", text))
    labels = set(_links(page))
    assert used == labels, "a label without a link, or the other way round"
