"""Settings that will not do: a ValueError that names argument, value and remedy."""

import math
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from engine_helpers import make_checkpoint, one_thread, refuses

from minivllm import LLM, LLMEngine, SamplingParams
from minivllm.distributed import meeting
from minivllm.distributed.ranks import RankFailure
from minivllm.engine import model_runner
from minivllm.engine.config import EngineConfig
from minivllm.engine.model_runner import ModelRunner

threads = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def test_unknown_keywords(folder):
    refuses(
        r"unknown argument max_modal_len=9; did you mean 'max_model_len'\?",
        *(LLM, folder),
        max_modal_len=9,
    )
    refuses(r"unknown argument xyzzy=1; known: .*block_size", LLM, folder, xyzzy=1)
    refuses(r"max_tokens=9 .*; give SamplingParams\(max_tokens=", LLM, folder, max_tokens=9)
    refuses(
        r"unknown argument temprature=0; did you mean 'temperature'\?",
        SamplingParams,
        temprature=0,
    )
    refuses(r"unknown argument n=2; known: temperature", SamplingParams, n=2)


def test_a_config_and_keywords(folder):
    refuses(
        "config was given, and so were block_size; put them into the config",
        *(LLMEngine, EngineConfig(model=folder)),
        block_size=16,
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_size": 24}, "block_size=24 must be one of 16, 32, 64, 128, 256"),
        ({"block_size": 0}, "block_size=0 must be one of"),
        ({"block_size": 16.0}, "block_size=16.0 must be one of"),
        ({"model": 5}, "model=5 must be the path of a folder, a name on the hub, or None"),
        ({"model": ""}, "model='' must be the path"),
        ({"tokenizer": ["x"]}, r"tokenizer=\['x'\] must be the path"),
        ({"seed": "x"}, "seed='x' must be an integer"),
        ({"device": None}, "device=None must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be an integer of at least 1"),
        ({"max_num_seqs": True}, "max_num_seqs=True must be an integer"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens=1.5 must be an integer"),
        ({"max_num_batched_tokens": 8}, "=8 is less than max_num_seqs=256.*raise the first"),
        ({"max_model_len": -1}, "max_model_len=-1 must be an integer of at least 1"),
        ({"num_kv_blocks": 0}, "num_kv_blocks=0 must be an integer of at least 1"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be"),
        ({"policy": "fastest"}, "policy='fastest' must be one of prefill_first, mixed"),
        ({"dtype": "int8"}, "dtype='int8' must be one of auto, float32, float16, bfloat16"),
        ({"attention_backend": "magic"}, "attention_backend='magic' must be one of auto"),
        ({"device": "tpu"}, "device='tpu' must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0 must be above 0 and at most 1"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization=1.1 must be above 0"),
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization=nan must be above 0"),
        ({"gpu_memory_utilization": "most"}, "gpu_memory_utilization='most' must be above 0"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching='no' must be one of True, False"),
        ({"max_model_len": 129}, "max_model_len=129 is more than .*max_position_embeddings=128"),
        (
            {"max_model_len": 128, "num_kv_blocks": 6, "block_size": 16},
            "max_model_len=128 is more than the 6 KV blocks of 16 tokens hold; lower it to 96",
        ),
        (
            {"num_kv_blocks": 10**12},
            r"num_kv_blocks=10+ blocks take .* GiB.*lower it \(about \d+ would fit now\)",
        ),
        ({"num_kv_blocks": 10**400}, r"num_kv_blocks=10+ blocks take .* GiB.*lower it"),
        ({"max_num_batched_tokens": 10**30}, "=10+ is more than a step can count, .*; lower it"),
        (
            {"max_num_seqs": 2**31, "max_num_batched_tokens": 2**31},
            "max_num_seqs=2147483648 is more than a step can count, .*2147483647; lower it",
        ),
        ({"max_model_len": 10**30}, "max_model_len=10+ is more than .*; lower it"),
        ({"block_size": 10**30}, "block_size=10+ must be one of"),
        ({"tensor_parallel_size": 10**30}, "tensor_parallel_size=10+ does not divide"),
    ],
)
def test_engine_settings_that_will_not_do(folder, settings, message):
    refuses(message, LLM, **{"model": folder, **settings})


def test_a_device_of_pytorch_is_as_good_as_its_name():
    assert EngineConfig(device=torch.device("cpu"), tensor_parallel_size=2).device == "cpu"


# ---------------------------------------------------------------------------- devices and memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_no_gpu_where_one_was_asked_for(folder, device):
    refuses(
        f"device='{device}': PyTorch sees no CUDA device here; use device='cpu'",
        *(LLM, folder),
        device=device,
    )


def test_kernels_where_they_cannot_run(folder, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refuses(
        "attention_backend='triton' cannot run on cpu: .*; use 'torch'",
        *(LLM, folder),
        device="cpu",
        attention_backend="triton",
    )


@pytest.mark.gpu
def test_a_gpu_that_is_not_there(folder):
    refuses("device='cuda:99': there are only", LLM, folder, device="cuda:99")


@pytest.mark.gpu
def test_too_little_gpu_memory_for_one_block(folder):
    refuses(
        "no memory for one KV block: .*raise gpu_memory_utilization",
        *(LLM, folder),
        device="cuda",
        gpu_memory_utilization=1e-6,
    )


@pytest.mark.gpu
def test_too_little_gpu_memory_for_one_step(folder):
    refuses(
        "a step of max_num_batched_tokens=1000000000 tokens and max_num_seqs=1000000000 sequences "
        "does not fit .*; lower them",
        *(LLM, folder),
        device="cuda",
        attention_backend="torch",
        max_num_seqs=10**9,
        max_num_batched_tokens=10**9,
    )


def test_too_little_memory_for_one_block(folder, monkeypatch):
    monkeypatch.setattr(model_runner, "available_host_memory", lambda: 1000)
    refuses(
        "no memory for one KV block: it takes .* MiB .*set num_kv_blocks",
        *(LLM, folder),
        device="cpu",
    )


class StartsWith(LLMEngine):
    """Its runner does something else before anything is allocated."""

    def __init__(self, begin: Callable[[], object], **settings: object) -> None:
        self._begin = begin
        super().__init__(**settings)

    def make_runner(self, *args: object) -> ModelRunner:
        class Runner(ModelRunner):
            def _reserve(inner, *_: object) -> None:
                self._begin()

        return self._build(Runner, *args)


def test_too_little_memory_for_the_state_of_all_sequences(folder):
    refuses(
        "no memory on cpu for the state of max_num_seqs=256 .*max_num_batched_tokens=8192.*lower",
        *(StartsWith, lambda: torch.empty(2**60, dtype=torch.int8)),
        model=folder,
        device="cpu",
    )
    # Our own bugs must not look like that.
    with pytest.raises(RuntimeError, match="expand"):
        StartsWith(lambda: torch.empty(2).expand(3), model=folder, device="cpu")


# ---------------------------------------------------------------------------- torchrun


@pytest.fixture
def started(monkeypatch) -> Callable[..., None]:
    """Say in the environment that this process is one of two ranks, with these changes."""

    def start(**changes: object) -> None:
        given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        for name, value in {**given, "MASTER_PORT": 1, **changes}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    return start


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"RANK": "x"}, "RANK='x' in the environment must be a number"),
        ({"MASTER_PORT": "29500a"}, "MASTER_PORT='29500a' in the environment must be a number"),
        ({"MASTER_PORT": 0}, "MASTER_PORT=0 in the environment must be a port, from 1 to 65535"),
        ({"MASTER_PORT": 70000}, "MASTER_PORT=70000 in the environment must be a port, from 1 to"),
    ],
)
def test_variables_of_torchrun_that_will_not_do(folder, started, changes, message):
    started(**changes)
    refuses(message, LLM, folder, device="cpu", tensor_parallel_size=2)


def test_a_port_that_is_taken(folder, started):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        started(MASTER_PORT=port)
        refuses(
            rf"MASTER_PORT={port}: rank 0 cannot listen on that port \(.*in use\); give torchrun",
            *(LLM, folder),
            device="cpu",
            tensor_parallel_size=2,
        )


def test_a_rank_that_finds_another_program_does_not_wait_forever(started, monkeypatch):
    """PyTorch's store waits without a limit for what takes connections and says nothing."""
    end = threading.Event()
    started(RANK=1, LOCAL_RANK=1, MASTER_PORT=2)
    monkeypatch.setattr(meeting, "MEETING_TIMEOUT", timedelta(seconds=0.2))
    monkeypatch.setattr(meeting.dist, "TCPStore", lambda *_, **__: end.wait())
    with pytest.raises(RankFailure, match=r"rank 1 found no store at .*, MASTER_PORT=2 within"):
        meeting.find_store(meeting.Place.here(2))
    end.set()
