"""``bench tensor-parallel`` without its engines: stages, what is taken over, and notes."""

import json
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.benchmarks import tensor_parallel
from minivllm.benchmarks.shapes import shape_folder
from minivllm.benchmarks.stages import Stage, run_stages
from minivllm.benchmarks.tensor_parallel_report import least_ms, notes_of
from minivllm.models.config import ModelConfig


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that writes its first argument to the file of its second, and can take its time."""
    (tmp_path / "stage_of_a_test.py").write_text(
        "import sys, time\n"
        "time.sleep(float(sys.argv[3]))\n"
        "open(sys.argv[2], 'w').write(sys.argv[1])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stage_of_a_test"


def test_stages_are_saved_one_by_one_and_stopped_at_their_limit(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Any] = []
    saved: list[int] = []
    stages = []
    for place, seconds in enumerate((0.0, 60.0, 0.0)):
        output = tmp_path / f"{place}.json"
        command = [module, json.dumps({"place": place}), str(output), str(seconds)]
        stages.append(Stage(f"stage {place}", command, 1, taken.append, output))
    run_stages(stages, beside=False, limit=3.0, save=lambda: saved.append(len(taken)))
    assert taken == [{"place": 0}, None, {"place": 2}]
    assert saved == [1, 2, 3]
    assert "stage 1: FAILED" in capsys.readouterr().out


def test_an_interrupt_ends_the_stages_that_run(module: str, tmp_path: Path) -> None:
    stages = []
    for place, seconds in enumerate((0.0, 60.0)):
        output = tmp_path / f"{place}.json"
        command = [module, "{}", str(output), str(seconds)]
        stages.append(Stage(f"stage {place}", command, 0, lambda facts: None, output))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, beside=True, limit=50.0, save=interrupted)
    assert stages[1].process is not None and stages[1].process.poll() is not None


def test_sigterm_ends_the_stages_that_run(module: str, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    output = tmp_path / "out.json"
    stage = Stage("long", [module, "{}", str(output), "60"], 0, lambda facts: None, output)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as ended:
        run_stages([stage], beside=False, limit=50.0, save=lambda: None)
    assert ended.value.code == 143
    assert stage.process is not None and stage.process.poll() is not None
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stage_that_failed_is_counted(module: str, tmp_path: Path) -> None:
    """In a thread, too, which cannot be told of signals; and its half of a file is not read."""
    output = tmp_path / "out.json"
    output.write_text('{"half')
    stage = Stage("bad", [module], 0, lambda facts: None, output)
    failed = []
    call = partial(run_stages, [stage], beside=False, limit=50.0, save=lambda: None)
    thread = threading.Thread(target=lambda: failed.append(call()))
    thread.start()
    thread.join()
    assert failed == [1]


def facts(**ms: float) -> dict[str, Any]:
    return {
        "ready_seconds": 1.0,
        "stats_of_ranks": [],
        "greedy": [[1, 2]],
        "throughput": {"requests": 2, "output_tokens_per_s": 10.0},
        **{
            batch.removeprefix("b"): {
                "ms_per_token": value,
                "tokens_per_s": 1.0,
                "limit_ms": 1.0,
            }
            for batch, value in ms.items()
        },
    }


def test_few_sequences_that_take_longer_than_many_are_noted() -> None:
    assert notes_of({"1": facts(b1=4.0, b32=5.0), "2": facts(b1=2.0, b32=1.9)}) == []
    (note,) = notes_of({"1": facts(b1=45.0, b32=18.6), "2": facts(b1=10.0, b32=11.0)})
    assert note.startswith("1 ranks: a token of batch 1 takes 45.00 ms, of batch 32 18.60")


def test_a_report_that_was_cut_short_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a further stage, the machine and the date stay those of the run that measured."""
    file, output = tmp_path / "cut.json", tmp_path / "whole.json"
    part = {"model": "Qwen3-8B", "ranks": {"2": facts(b1=2.0), "1": facts(b1=4.0)}, "checks": {}}
    cut = {
        **{"device": "a GPU", "versions": {}, "date": "then", "command": "that"},
        **{"beside": True, "copy_bytes_per_s": 4e12, **part, "others": {}, "exchange": {"2": {}}},
        "float32": {"answers": {"1": {"8": [[1]]}, "2": {"8": [[2]]}}},
    }
    file.write_text(json.dumps(cut))
    arguments = ["--ranks", "1", "2", "--resume", str(file), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ValueError, match="name it with --resume"):
        tensor_parallel.main(["--finish"])
    tensor_parallel.main([*arguments, "--finish"])
    whole = json.loads(output.read_text())
    assert (whole["device"], whole["date"], whole["command"]) == ("a GPU", "then", "that")
    assert list(whole["ranks"]) == ["1", "2"]
    assert whole["ranks"]["2"]["same_tokens_as_first"] == 1.0
    assert whole["float32"]["equal"] == {"1": {"8": True}, "2": {"8": False}}
    assert whole["runs"] == [{"date": "then", "command": "that", "device": "a GPU"}]


def test_what_failed_is_measured_when_the_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest first, and the checks when all answers are there."""
    ran: list[str] = []
    failing = ["Qwen3-8B on 1"]

    def run_stages(stages: list[Stage], *, save: Any, **_: Any) -> int:
        for stage in stages:
            ran.append(stage.name)
            words = json.loads(stage.command[1])
            measured = {f"b{batch}": 4.0 / words["ranks"] for batch in words.get("batches", ())}
            results = {"engine": facts(**measured), "exact": {"8": [[1]]}, "check": {}}
            stage.take(None if stage.name in failing else results[words["stage"]])
            save()
        return sum(stage.name in failing for stage in stages)

    monkeypatch.setattr(tensor_parallel, "run_stages", run_stages)
    monkeypatch.setattr(tensor_parallel, "ceilings", lambda _: {"copy_bytes_per_s": 1e12})
    monkeypatch.setattr(sys, "argv", ["x"])
    output = tmp_path / "report.json"
    arguments = ["--device", "cpu", "--batch", "1", "--output", str(output)]
    with pytest.raises(ValueError, match="without a GPU, say which shapes"):
        tensor_parallel.main(arguments)
    arguments += ["--shapes", "Qwen3-8B"]
    assert tensor_parallel.main(arguments) == 1
    stages = ["Qwen3-8B on 2", "float32 on 2", "Qwen3-8B on 1", "float32 on 1"]
    assert ran == [*stages, "check of Qwen3-8B"]
    assert list(json.loads(output.read_text())["ranks"]) == ["2"]
    ran.clear()
    failing.clear()
    assert tensor_parallel.main([*arguments, "--resume", str(output)]) == 0
    assert ran == ["Qwen3-8B on 1", "check of Qwen3-8B"]
    whole = json.loads(output.read_text())
    assert list(whole["ranks"]) == ["1", "2"] and len(whole["runs"]) == 2
    assert whole["ranks"]["2"]["same_tokens_as_first"] == 1.0
    one, two = (whole["ranks"][ranks]["1"] for ranks in ("1", "2"))
    assert one["limit_ms"] == pytest.approx(2 * two["limit_ms"])


def test_the_limit_halves_with_twice_the_ranks() -> None:
    config = ModelConfig.from_folder(shape_folder("Qwen3-8B"))
    device = torch.device("cuda")
    one, two = (least_ms(config, 1, 96, ranks, 4.28e12, device) for ranks in (1, 2))
    assert one == pytest.approx(2 * two, rel=1e-6)
    # 7.57 thousand million weights of 2 bytes, and a little cache, at that rate.
    assert one == pytest.approx(3.54, rel=0.01)
