"""Chapter 7: the model runner, which turns a scheduled step into tensors and these into tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import TINY, random_prompt, save_checkpoint, tiny_qwen3

from minivllm.attention.paged import PagedKVCache
from minivllm.engine import model_runner
from minivllm.engine.batches import make_batch, make_sampling_tensors
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.config import EngineConfig
from minivllm.engine.model_runner import ModelRunner
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import Sequence
from minivllm.models.generate import generate_by_recomputing
from minivllm.models.loader import load_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster without a second thread to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load_model(save_checkpoint(tiny_qwen3(), tmp_path_factory.mktemp("tiny")))


def make_runner(model: torch.nn.Module, **settings: object) -> ModelRunner:
    config = EngineConfig(**{"block_size": 16, **settings})
    return ModelRunner(
        model, config, model.config, max_model_len=128, dtype=torch.float32, device=CPU
    )


def make_scheduler(runner: ModelRunner, **settings: int) -> Scheduler:
    blocks = BlockManager(runner.cache.num_blocks, runner.cache.block_size)
    return Scheduler(blocks, **{"max_num_seqs": 4, "max_num_batched_tokens": 64, **settings})


def make_sequence(prompt: list[int], arrival: int = 0, **params: object) -> Sequence:
    params = SamplingParams(**{"temperature": 0, **params})
    return Sequence(f"r{arrival}", prompt, params, arrival=arrival, seed=5 + arrival, max_len=128)


def run_all(runner: ModelRunner, scheduler: Scheduler) -> None:
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        scheduler.commit(step, runner.run(step).token_ids)


# ---------------------------------------------------------------------------- batches


def test_make_batch():
    """A decode at position 17, a chunk of 3 from position 14, and a whole prompt of 2."""
    scheduler = Scheduler(BlockManager(8, 16), max_num_seqs=4, max_num_batched_tokens=64)
    decode, chunk, prompt = (make_sequence([7], arrival) for arrival in range(3))
    decode.token_ids = list(range(18))
    decode.num_computed, decode.block_table = 17, [5, 2]
    chunk.token_ids = list(range(100, 140))
    chunk.num_computed, chunk.block_table = 14, [0, 3, 6]
    prompt.token_ids = [50, 51]
    prompt.block_table = [7]
    step = scheduler.schedule()
    for seq, count in ((decode, 1), (chunk, 3), (prompt, 2)):
        scheduler._schedule(seq, count, step)
    batch = make_batch(step.scheduled, 16, CPU)
    assert batch.input_ids.tolist() == [17, 114, 115, 116, 50, 51]
    assert batch.positions.tolist() == [17, 14, 15, 16, 0, 1]
    assert batch.slot_mapping.tolist() == [2 * 16 + 1, 14, 15, 3 * 16, 7 * 16, 7 * 16 + 1]
    assert batch.cu_query_lens.tolist() == [0, 1, 4, 6]
    assert batch.context.tolist() == list(batch.context_lens) == [18, 17, 2]
    assert batch.query_lens == (1, 3, 2)
    assert batch.block_tables.tolist() == [[5, 2, -1], [0, 3, 6], [7, -1, -1]]
    for tensor in (batch.input_ids, batch.positions, batch.slot_mapping):
        assert tensor.dtype == torch.int64
    for tensor in (batch.cu_query_lens, batch.context, batch.block_tables):
        assert tensor.dtype == torch.int32


def test_sampling_tensors_of_greedy_requests_are_empty():
    tensors = make_sampling_tensors([make_sequence([1]), make_sequence([2])], 160, CPU)
    assert tensors.temperature is tensors.top_k is tensors.top_p is tensors.min_p is None


def test_sampling_tensors():
    plain = make_sequence([1], 0, temperature=0.5)
    greedy = make_sequence([1], 1, temperature=0, top_k=5)
    picky = make_sequence([1], 2, temperature=2, top_k=3, top_p=0.9, min_p=0.1)
    picky.append(9)
    tensors = make_sampling_tensors([plain, greedy, picky], 160, CPU)
    assert tensors.temperature.tolist() == [0.5, 0.0, 2.0]
    assert tensors.seed.tolist() == [5, 6, 7]
    assert tensors.step.tolist() == [0, 0, 1]
    assert tensors.top_k.tolist() == [160, 5, 3]
    assert tensors.top_p.tolist() == [float("inf"), float("inf"), pytest.approx(0.9)]
    assert tensors.min_p.tolist() == [0, 0, pytest.approx(0.1)]


def test_what_nobody_restricts_costs_nothing():
    for params in ({}, {"top_k": -1}, {"top_k": 160}, {"top_k": 10**6}):
        tensors = make_sampling_tensors([make_sequence([1], temperature=1, **params)], 160, CPU)
        assert tensors.top_k is tensors.top_p is tensors.min_p is None


# ---------------------------------------------------------------------------- running


def test_a_batch_gives_what_each_prompt_gives_alone(model):
    runner = make_runner(model, num_kv_blocks=24, block_size=16)
    scheduler = make_scheduler(runner, max_num_batched_tokens=20)
    prompts = [random_prompt(length, length) for length in (1, 16, 33, 50, 7)]
    sequences = [make_sequence(prompt, i, max_tokens=10) for i, prompt in enumerate(prompts)]
    for seq in sequences:
        scheduler.add(seq)
    run_all(runner, scheduler)
    for prompt, seq in zip(prompts, sequences, strict=True):
        assert seq.output_token_ids == list(generate_by_recomputing(model, prompt, 10))


def test_only_those_that_reach_their_last_token_sample(model):
    runner = make_runner(model, num_kv_blocks=24, block_size=16)
    scheduler = make_scheduler(runner, max_num_batched_tokens=20)
    short, long = make_sequence([1] * 8, 0), make_sequence([2] * 40, 1)
    scheduler.add(short)
    scheduler.add(long)
    step = scheduler.schedule()
    assert [item.num_tokens for item in step.scheduled] == [8, 12]
    result = runner.run(step)
    assert len(result.token_ids) == len(result.logprobs) == 1
    scheduler.commit(step, result.token_ids)
    assert (short.num_output_tokens, long.num_output_tokens) == (1, 0)
    # A step of nothing but a chunk samples nothing at all.
    step = scheduler.schedule()
    assert [item.seq for item in step.scheduled] == [long]
    assert runner.run(step).token_ids == []


def test_logprobs_of_those_who_ask(model):
    runner = make_runner(model, num_kv_blocks=24, block_size=16)
    scheduler = make_scheduler(runner)
    prompt = random_prompt(9, 1)
    for arrival, count in enumerate((None, 0, 3)):
        scheduler.add(make_sequence(prompt, arrival, logprobs=count))
    result = runner.run(scheduler.schedule())
    none, chosen, three = result.logprobs
    assert none is None
    assert chosen.token_ids == [result.token_ids[1]] and len(chosen.logprobs) == 1
    # Greedy: the chosen token is the likeliest, and so stands first among the three as well.
    assert three.token_ids[0] == three.token_ids[1] == result.token_ids[2]
    assert len(three.token_ids) == len(three.logprobs) == 4
    assert three.rank == chosen.rank == 1
    assert sorted(three.logprobs[1:], reverse=True) == three.logprobs[1:]


# ---------------------------------------------------------------------------- memory


def test_the_pool_is_as_large_as_asked(model):
    runner = make_runner(model, num_kv_blocks=5, block_size=32)
    assert runner.cache.num_blocks == 5
    layers, groups, size = (
        TINY[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim")
    )
    assert runner.cache.k.shape == (layers, 5, 32, groups, size)


def test_the_pool_is_a_part_of_the_free_memory(model, monkeypatch):
    block_bytes = PagedKVCache.bytes_per_block(model.config, 16, torch.float32)
    monkeypatch.setattr(model_runner, "available_host_memory", lambda: 80 * block_bytes)
    runner = make_runner(model, block_size=16, gpu_memory_utilization=0.5)
    assert runner.cache.num_blocks == 10


def test_the_pool_is_no_larger_than_all_sequences_can_fill(model):
    runner = make_runner(model, block_size=16, max_num_seqs=3, max_num_batched_tokens=64)
    assert runner.cache.num_blocks == 3 * 128 // 16


def test_too_little_memory_for_one_block(model, monkeypatch):
    monkeypatch.setattr(model_runner, "available_host_memory", lambda: 1000)
    with pytest.raises(
        ValueError, match=r"no memory for one KV block: it takes .*set num_kv_blocks"
    ):
        make_runner(model)


def test_available_memory_without_sysconf(monkeypatch):
    assert model_runner.available_host_memory() > 2**20
    monkeypatch.delattr("os.sysconf")
    assert model_runner.available_host_memory() == 8 << 30


@pytest.mark.gpu
def test_the_pool_leaves_room_for_the_largest_step(tmp_path: Path):
    """The memory that the runner measured for itself is enough when that step really comes."""
    device = torch.device("cuda")
    folder = save_checkpoint(tiny_qwen3(vocab_size=4096, max_position_embeddings=4096), tmp_path)
    model = load_model(folder, device=device)
    total = torch.cuda.mem_get_info()[1]
    config = EngineConfig(
        block_size=64, gpu_memory_utilization=0.3, max_num_batched_tokens=4096, max_num_seqs=16
    )
    runner = ModelRunner(
        model, config, model.config, max_model_len=4096, dtype=torch.float32, device=device
    )
    assert runner.cache.k.nbytes * 2 < 0.3 * total
    scheduler = make_scheduler(runner, max_num_batched_tokens=4096)
    seq = Sequence("r", [1] * 4095, SamplingParams(max_tokens=1), arrival=0, seed=0, max_len=4096)
    scheduler.add(seq)
    run_all(runner, scheduler)
    assert seq.finished
    assert torch.cuda.max_memory_reserved() < 0.32 * total
