"""The whole engine on several ranks: processes on this machine, with gloo, or NCCL where GPUs are.

Most of the time of a test here is two processes importing PyTorch, so each checks several things.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_prompt, save_checkpoint, tiny_qwen3

import minivllm
from minivllm import LLM
from minivllm.distributed.ranks import RankFailure
from minivllm.engine.sampling_params import SamplingParams
from minivllm.models.loader import load_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen3 with 8 and with 2 KV heads."""
    base = tmp_path_factory.mktemp("models")
    return {
        f"{count} KV heads": save_checkpoint(
            tiny_qwen3(num_attention_heads=8, num_key_value_heads=count), base / str(count)
        )
        for count in (8, 2)
    }


SETTINGS = {"skip_tokenizer_init": True, "num_kv_blocks": 40, "device": "cpu"}
PROMPTS = [[1, 2, 3], random_prompt(40, seed=2), random_prompt(17, seed=3), [9] * 20]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PARAMS = [
    GREEDY,
    GREEDY,
    SamplingParams(temperature=0.8, seed=1, max_tokens=24, ignore_eos=True),
    SamplingParams(
        temperature=0.9, seed=2, top_k=100, top_p=0.9, logprobs=2, max_tokens=24, ignore_eos=True
    ),
]


def answers(llm: Any) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """No thread, child or descriptor of an engine outlives it."""
    threads = {thread.name for thread in threading.enumerate()}
    count = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    yield
    left = {t.name for t in threading.enumerate()} - threads
    assert not {name for name in left if "minivllm" in name}
    if count is not None:
        assert len(os.listdir("/proc/self/fd")) <= count + 3, "sockets were left open"


def test_two_processes_answer_as_one_and_end_as_one(
    folders: dict[str, Path], nothing_left_behind: None
) -> None:
    with LLM(folders["8 KV heads"], **SETTINGS) as llm:
        expected = answers(llm)
    with LLM(folders["8 KV heads"], tensor_parallel_size=2, **SETTINGS) as llm:
        assert answers(llm) == expected
        ranks = llm.engine.stats.ranks
        assert [rank.rank for rank in ranks] == [0, 1]
        # Both halves of the matrices, and the norms on either side.
        whole = sum(p.nbytes for p in load_model(folders["8 KV heads"]).parameters())
        assert whole < sum(rank.weight_bytes for rank in ranks) < 1.2 * whole
        assert all(rank.load_seconds > 0 and rank.peak_host_bytes > 2**20 for rank in ranks)
        assert {rank.sums_by for rank in ranks} == {"collectives"}
        process = llm.engine._ranks._processes[1]
        # An interrupt of the user's ends what is running, and nothing else.
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert answers(llm) == expected
        began = time.monotonic()
    assert process.poll() == 0
    assert time.monotonic() - began < 5


def test_a_dead_rank_ends_the_engine_with_its_name(
    folders: dict[str, Path], nothing_left_behind: None
) -> None:
    with LLM(folders["2 KV heads"], **SETTINGS) as llm:
        expected = answers(llm)
    with LLM(folders["2 KV heads"], tensor_parallel_size=2, **SETTINGS) as llm:
        assert answers(llm) == expected
        process = llm.engine._ranks._processes[1]
        process.kill()
        began = time.monotonic()
        with pytest.raises(RankFailure, match=r"rank 1 of 2 died: .*killed by SIGKILL"):
            while True:
                llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert time.monotonic() - began < 5
        with pytest.raises(RankFailure, match="build a new one"):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert process.poll() == -signal.SIGKILL


SCRIPT = """
import sys, torch
from minivllm import LLM, SamplingParams
torch.set_num_threads(1)
if __name__ == "__main__":
    with LLM(sys.argv[1], tensor_parallel_size=2, skip_tokenizer_init=True, num_kv_blocks=40,
             device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        print("ANSWER", llm.generate([1, 2, 3], params, use_tqdm=False)[0].outputs[0].token_ids)
"""


def test_torchrun_starts_the_same_engine(folders: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    package = str(Path(minivllm.__file__).resolve().parents[1])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), str(folders["2 KV heads"])),
        ],
        env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with LLM(folders["2 KV heads"], **SETTINGS) as llm:
        expected = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    # Only rank 0 gets as far as printing.
    assert done.stdout.count("ANSWER") == 1
    assert f"ANSWER {expected}" in done.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide"),
        ({"tensor_parallel_size": 2, "device": "cuda:0"}, "device='cuda:0' names one device"),
    ],
)
def test_bad_settings_start_no_process(
    folders: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(folders["2 KV heads"], **{**SETTINGS, **settings})


@pytest.mark.gpu
def test_two_gpus_answer_as_one(folders: dict[str, Path]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    settings = {**SETTINGS, "device": "cuda", "dtype": "float32", "max_num_seqs": 8}
    for name in ("8 KV heads", "2 KV heads"):
        with LLM(folders[name], **settings) as llm:
            expected = answers(llm)
        with LLM(folders[name], tensor_parallel_size=2, **settings) as llm:
            assert answers(llm) == expected


@pytest.mark.gpu
def test_more_ranks_than_gpus_are_refused(folders: dict[str, Path]) -> None:
    if torch.cuda.device_count() >= 8:
        pytest.skip("needs fewer than 8 GPUs")
    with pytest.raises(ValueError, match="needs 8 GPUs on this host, which has"):
        LLM(folders["8 KV heads"], tensor_parallel_size=8, **{**SETTINGS, "device": "cuda"})
