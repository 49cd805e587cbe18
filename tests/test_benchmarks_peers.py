"""Other engines on our workload: transformers really runs; what is absent says so."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
from benchmark_helpers import small_model

from minivllm.benchmarks import peers
from minivllm.benchmarks.peer_process import ADAPTERS, BATCH, Job, run_job
from minivllm.benchmarks.shapes import shape_folder
from minivllm.benchmarks.workload import Workload, usual_workload
from minivllm.models.hub import EMBEDDED_MODEL


def job_of(folder, workload, *, dummy=False):
    return Job(
        folder=str(folder),
        dummy=dummy,
        dtype="float32",
        device="cpu",
        prompts=workload.prompts,
        max_tokens=workload.max_tokens,
        rounds=2,
        max_len=64,
    )


def test_transformers_runs_in_its_own_process_and_the_others_say_that_they_are_not_there(
    monkeypatch, capsys
):
    # On whatever machine this runs: only what comes with this package.
    real = peers.find_spec
    monkeypatch.setattr(
        peers, "find_spec", lambda name: real(name) if name == "transformers" else None
    )
    results = peers.run_peers(
        usual_workload(5, 12, vocab_size=2048),
        folder=EMBEDDED_MODEL,
        dummy=False,
        dtype="float32",
        device="cpu",
        rounds=1,
    )
    assert results["vllm"] == {"skipped": "vllm is not installed"}
    assert results["nano-vllm"] == {"skipped": "nano-vllm is not installed"}
    result = results["transformers"]
    assert result["requests"] == 5 and result["output_tokens"] == 60
    assert result["output_tokens_per_s"] == pytest.approx(60 / result["seconds"][0])
    lines = capsys.readouterr().out
    assert "vllm: skipped, vllm is not installed" in lines and "transformers 5" in lines


def test_transformers_makes_exactly_the_tokens_that_were_asked_for(tmp_path):
    folder = small_model(tmp_path / "model")
    # More than a batch, of unequal lengths.
    workload = Workload(
        [[1 + place] * (1 + place % 7) for place in range(BATCH + 3)],
        [1 + place % 5 for place in range(BATCH + 3)],
    )
    for dummy in (False, True):
        found = run_job("transformers", job_of(folder, workload, dummy=dummy))
        assert len(found["seconds"]) == 2 and found["ready_seconds"] > 0


def test_a_peer_that_makes_too_few_tokens_is_refused(monkeypatch):
    workload = Workload([[1, 2]], [5])
    monkeypatch.setitem(ADAPTERS, "vllm", _adapter_that_makes(4))
    with pytest.raises(RuntimeError, match="made 4 tokens, not 5"):
        run_job("vllm", job_of("nowhere", workload))
    monkeypatch.setitem(ADAPTERS, "vllm", _adapter_that_makes(5))
    assert len(run_job("vllm", job_of("nowhere", workload))["seconds"]) == 2


def test_a_peer_that_breaks_is_reported_and_not_fatal(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    peer = dataclasses.replace(peers.PEERS["transformers"], name="no-such-adapter")
    result = peers._run_peer(
        peer,
        Workload([[1, 2]], [3]),
        folder=tmp_path,
        dummy=True,
        dtype="float32",
        device="cpu",
        rounds=1,
    )
    assert "no-such-adapter" in result["failed"]
    assert "FAILED" in peers.describe(peer.name, result)


@pytest.mark.parametrize(("name", "module"), [("vllm", "vllm"), ("nano-vllm", "nanovllm")])
def test_adapters_ask_for_the_same_work(monkeypatch, name, module):
    """Against a stand-in with the calls that the real package documents."""
    asked = []

    class LLM:
        def __init__(self, model=None, *args, **settings):
            asked.append((model, settings))

        def generate(self, prompts, params, use_tqdm):
            asked.append((prompts, params))
            made = [[7] * each.max_tokens for each in params]
            if module == "nanovllm":
                return [{"text": "", "token_ids": tokens} for tokens in made]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=t)]) for t in made]

    stand_in = ModuleType(module)
    stand_in.LLM, stand_in.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, module, stand_in)
    workload = Workload([[1, 2], [3]], [4, 9])
    run_job(name, job_of("folder", workload, dummy=True))
    (folder, settings), warm_up, *rounds = asked
    assert folder == "folder" and settings["max_model_len"] > 64
    assert len(warm_up[0]) == 1 and len(rounds) == 2
    prompts, params = rounds[0]
    ids = [each["prompt_token_ids"] if module == "vllm" else each for each in prompts]
    assert ids == workload.prompts
    assert [each.max_tokens for each in params] == [4, 9]
    assert all(each.ignore_eos and each.temperature == 0.6 for each in params)


def test_a_folder_without_a_tokenizer_is_lent_one(tmp_path):
    folder = shape_folder("Qwen3-0.6B")
    lent = peers._with_tokenizer(folder, tmp_path / "model")
    assert (lent / "tokenizer.json").exists() and not (folder / "tokenizer.json").exists()
    assert (lent / "config.json").read_text() == (folder / "config.json").read_text()
    assert peers._with_tokenizer(EMBEDDED_MODEL, tmp_path / "other") == EMBEDDED_MODEL


def _adapter_that_makes(count):
    import contextlib

    @contextlib.contextmanager
    def adapter(job):
        yield lambda prompts, counts: count

    return adapter
