"""The attention backends: equal tokens from the PyTorch path and from our Triton kernels."""

import random

import pytest
import torch
from helpers import TINY, save_checkpoint, tiny_qwen3

from minivllm import LLM, SamplingParams

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def _greedy(folder, prompts, params, **settings):
    with LLM(folder, skip_tokenizer_init=True, num_kv_blocks=200, **settings) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def _workload(seed, count, longest):
    rng = random.Random(seed)
    vocab_size = TINY["vocab_size"]
    shared = [rng.randrange(vocab_size) for _ in range(longest // 2)]
    prompts = [
        shared[: rng.choice((0, len(shared)))]
        + [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest // 2))]
        for _ in range(count)
    ]
    params = [SamplingParams(temperature=0, max_tokens=rng.randint(2, 4)) for _ in prompts]
    return prompts, params


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, see below")
@pytest.mark.parametrize("policy", ["prefill_first", "mixed"])
def test_kernels_in_the_interpreter_give_the_same_tokens(tmp_path, policy):
    folder = save_checkpoint(tiny_qwen3(num_hidden_layers=1), tmp_path)
    prompts, params = _workload(0, count=3, longest=24)
    chunks = {"policy": policy, "max_num_seqs": 3, "max_num_batched_tokens": 16}
    ours = _greedy(folder, prompts, params, attention_backend="triton", **chunks)
    assert ours == _greedy(folder, prompts, params, attention_backend="torch")


def test_triton_on_a_cpu_without_the_interpreter_is_refused(tmp_path, monkeypatch):
    folder = save_checkpoint(tiny_qwen3(num_hidden_layers=1), tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"attention_backend='triton' .*TRITON_INTERPRET"):
        LLM(folder, skip_tokenizer_init=True, device="cpu", attention_backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("policy", ["prefill_first", "mixed"])
def test_kernels_on_a_gpu_give_the_same_tokens(tmp_path, policy, block_size):
    folder = save_checkpoint(tiny_qwen3(), tmp_path)
    prompts, params = _workload(1, count=40, longest=100)
    settings = {"policy": policy, "block_size": block_size, "dtype": "float32"}
    chunks = {"max_num_seqs": 16, "max_num_batched_tokens": 64}
    ours = _greedy(folder, prompts, params, attention_backend="triton", **settings, **chunks)
    assert ours == _greedy(folder, prompts, params, attention_backend="torch", **settings)
