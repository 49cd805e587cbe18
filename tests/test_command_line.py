"""The command line: what is told in one line, with which exit code, and what costs no time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engine_helpers import make_checkpoint, one_thread

from minivllm import cli
from minivllm.cli import main

threads = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("flag", ["--output", "--plot"])
@pytest.mark.parametrize(
    "place, message",
    [
        (".", "is a folder; name a file in it"),
        ("nowhere/report.json", "there is no folder .*nowhere'?; make it first"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_at_once(
    tmp_path, monkeypatch, capsys, flag, place, message
):
    monkeypatch.setattr("minivllm.benchmarks.commands._run_serve_sim", pytest.fail)
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve-sim", flag, str(tmp_path / place)])
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"argument {flag}: " in line
    assert re.search(message, line), line


def test_a_disk_that_is_full_is_told_in_one_line(monkeypatch, capsys):
    def run(options: object) -> None:
        raise OSError(28, "No space left on device", "report.json")

    monkeypatch.setattr(cli, "_demo", run)
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error == "minivllm: error: [Errno 28] No space left on device: 'report.json'\n"


@pytest.mark.parametrize("words", [[], ["bench", "check"]])
def test_a_reader_that_has_gone_is_no_error(words):
    """As of "minivllm | head", whose pipe is closed while there is more to print."""
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from minivllm import cli\n"
    code += "cli._demo = cli.run_with_own_flags = lambda options: print('text') or 0\n"
    code += f"sys.exit(cli.main({words}))"
    # Text waits in a buffer until the end, unless that is set.
    environment = {key: text for key, text in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=environment,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), TimeoutError()])
def test_an_error_that_is_no_file_s_is_not_hidden(monkeypatch, error):
    def run(options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_demo", run)
    with pytest.raises(type(error)):
        main([])


def test_a_question_that_is_no_text(folder, capsys):
    """Bytes of the command line that are no UTF-8 reach Python as lone surrogates."""
    assert main(["chat", "--model", str(folder), "--num-kv-blocks", "6", "\udcff"]) == 2
    assert "surrogates not allowed" in capsys.readouterr().err


def test_a_talk_survives_a_question_that_is_too_long(folder, monkeypatch, capsys):
    lines = iter(["hi", "word " * 200, "hi"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or _end())
    arguments = ["--model", str(folder), "--max-tokens", "4", "--num-kv-blocks", "6"]
    assert main(["chat", *arguments]) == 0
    shown = capsys.readouterr()
    first, last = shown.out.splitlines()
    assert first == last, "the conversation began anew"
    assert "tokens, and max_model_len" in shown.err
    assert "what was said before is forgotten" in shown.err


def _end() -> str:
    raise EOFError
