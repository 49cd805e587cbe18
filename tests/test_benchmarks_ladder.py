"""The ladder: every chapter's way gives the same tokens, and one that does not is found out."""

import pytest
from benchmark_helpers import read_report, small_model, texts_of

from minivllm.benchmarks import ladder, ladder_rungs
from minivllm.benchmarks.ladder import RUNGS, draw
from minivllm.benchmarks.ladder_workload import ladder_workload, pick, subset_of
from minivllm.benchmarks.workload import Margins, Workload, verdict_of
from minivllm.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("ladder") / "model")


@pytest.fixture(scope="module", autouse=True)
def short_requests():
    """The real workload, but less of it: what is tested here does not depend on lengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "ladder_workload", _short_workload)
        yield


def _short_workload(num_requests, *, scale, vocab_size):
    whole = ladder_workload(num_requests, scale=scale, vocab_size=vocab_size)
    return Workload(
        # 40 tokens of a shared prefix and up to 20 of their own.
        [prompt[:40] + prompt[192:212] for prompt in whole.prompts],
        [2 + count % 9 for count in whole.max_tokens],
    )


def climb(model, folder, *more):
    files = ["--output", str(folder / "ladder.json"), "--plot", str(folder / "ladder.svg")]
    sizes = ["--requests", "7", "--batch", "3", "--subset", "2", "--rounds", "1"]
    where = ["--model", model, "--device", "cpu", "--dtype", "float32"]
    return main(["bench", "ladder", *where, *sizes, *files, *more])


@pytest.fixture(scope="module")
def climbed(model, tmp_path_factory):
    """A folder with the report and the picture of all rungs."""
    folder = tmp_path_factory.mktemp("climbed")
    assert climb(model, folder) == 0
    return folder


def test_all_rungs_choose_the_same_tokens(climbed):
    report = read_report(climbed / "ladder.json")
    assert [rung["key"] for rung in report["rungs"]] == [rung.key for rung in RUNGS]
    *measured, last = report["rungs"]
    # A CPU has no graphs, and the report says so.
    assert last["chapter"] == 8 and "GPU" in last["skipped"]
    for rung in measured:
        assert rung["equal_answers"] == rung["requests"]
        assert rung["check"]["agrees"] and rung["output_tokens_per_s"] > 0
    assert [rung["requests"] for rung in measured] == [2, 2, 3, 2, 7, 7, 7]
    assert measured[0]["times_chapter_2"] == 1
    assert report["workload"]["requests"] == 7 and report["workload"]["batch"] == 3
    assert report["all_agree"]


def test_the_picture_shows_every_rung_the_device_and_the_date(climbed):
    report = read_report(climbed / "ladder.json")
    texts = texts_of((climbed / "ladder.svg").read_text(encoding="utf-8"))
    for rung in RUNGS:
        assert rung.name in texts
    assert report["device"] in texts and report["date"] in texts and "skipped" in texts
    assert texts_of(draw(report)) == texts


@pytest.mark.parametrize("rung", ["contiguous_batches", "OnPages"])
def test_a_wrong_token_is_found_out(model, tmp_path, monkeypatch, capsys, rung):
    short = tuple(each for each in RUNGS if each.key in ("3", "3b", "5"))
    monkeypatch.setattr(ladder, "RUNGS", short)
    if rung == "OnPages":
        step = ladder_rungs.OnPages._step
        monkeypatch.setattr(
            ladder_rungs.OnPages,
            "_step",
            lambda self, sequences: [(token + 1) % 160 for token in step(self, sequences)],
        )
    else:
        right = ladder_rungs.contiguous_batches

        def wrong(bench, workload):
            answers = right(bench, workload)
            answers[-1][0] = (answers[-1][0] + 1) % 160
            return answers

        monkeypatch.setattr(ladder_rungs, rung, wrong)
    with pytest.raises(SystemExit, match="DIFFER"):
        climb(model, tmp_path)
    assert "DIFFERS" in capsys.readouterr().out
    # Written all the same: it shows which rung it was.
    report = read_report(tmp_path / "ladder.json")
    assert not report["all_agree"]
    wrong_keys = {r["key"] for r in report["rungs"] if "check" in r and not r["check"]["agrees"]}
    assert wrong_keys == ({"5"} if rung == "OnPages" else {"3b"})


def test_the_workload_has_something_for_every_rung():
    workload = ladder_workload(64, vocab_size=160)
    prefixes = {}
    for prompt in workload.prompts:
        prefixes.setdefault(tuple(prompt[:192]), []).append(prompt)
    shared = [group for group in prefixes.values() if len(group) > 1]
    assert len(shared) == 4 and sum(map(len, shared)) == 48
    lengths = [len(prompt) for prompt in workload.prompts]
    assert max(lengths) == 512 and min(lengths) < 160
    assert max(workload.max_tokens) > 3 * sorted(workload.max_tokens)[32]
    assert max(token for prompt in workload.prompts for token in prompt) < 160
    assert ladder_workload(64, vocab_size=160) == workload
    double = ladder_workload(64, vocab_size=160, scale=2)
    assert double.num_output_tokens == 2 * workload.num_output_tokens


def test_a_subset_stands_for_all():
    workload = ladder_workload(64)
    few = pick(workload, subset_of(workload, 8))
    mean = workload.num_output_tokens / 64
    assert abs(few.num_output_tokens / 8 - mean) < 0.25 * mean
    assert subset_of(workload, 99) == list(range(64))


def test_a_shortfall_within_rounding_agrees_and_a_larger_one_does_not():
    within = verdict_of([Margins(4, 4, 0.0, 0.01), Margins(4, 3, 0.02, 0.01)])
    assert within["agrees"] and within["likeliest_share"] == 7 / 8 and within["tokens"] == 8
    assert not verdict_of([Margins(4, 3, 0.04, 0.01)])["agrees"]


def test_a_model_and_shapes_are_not_both_named(model, tmp_path, capsys):
    assert climb(model, tmp_path, "--shapes", "Qwen3-0.6B") == 2
    assert "exclude each other" in capsys.readouterr().err
