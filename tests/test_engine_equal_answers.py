"""Requests that generate the same text hold its full blocks once between them."""

from pathlib import Path

import pytest
from engine_helpers import OverlappingEngine, assert_idle, drain, one_thread
from helpers import random_prompt, save_checkpoint, tiny_qwen3

from minivllm import LLMEngine, SamplingParams
from minivllm.models.generate import generate_by_recomputing
from minivllm.models.loader import load_model

threads = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_qwen3(seed=1), tmp_path_factory.mktemp("model"))


def build(folder: Path, overlap: bool, **settings: object) -> LLMEngine:
    kind = OverlappingEngine if overlap else LLMEngine
    return kind(
        model=folder,
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        block_size=16,
        num_kv_blocks=64,
        **settings,
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_equal_answers_hold_their_blocks_once(folder, overlap):
    prompt, count, requests = random_prompt(20, seed=3), 60, 5
    alone = list(generate_by_recomputing(load_model(folder), prompt, count))
    engine = build(folder, overlap)
    for place in range(requests):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        engine.add_request(str(place), prompt, params)
    for _ in range(count - 5):
        engine.step()
    running = engine.scheduler.running
    full = min(seq.num_computed for seq in running) // 16
    tables = {tuple(seq.block_table[: full - 1]) for seq in running}
    # One list of full blocks for all; each has at most its newest two for itself.
    assert full >= 4 and len(tables) == 1
    assert engine.block_manager.num_held <= full - 1 + 2 * requests
    engine.block_manager.check(running)
    for output in drain(engine).values():
        assert output.outputs[0].token_ids == alone
    assert_idle(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_answers_that_part_keep_what_is_theirs(folder, overlap):
    """Sampled answers differ after a while, and each is what it is alone."""
    prompt = random_prompt(20, seed=4)
    params = [
        SamplingParams(temperature=0.3, seed=seed, max_tokens=50, ignore_eos=True)
        for seed in (1, 1, 2, 2, 3)
    ]
    engine = build(folder, overlap)
    for place, each in enumerate(params):
        engine.add_request(str(place), prompt, each)
    together = drain(engine)
    for place, each in enumerate(params):
        engine = build(folder, overlap, enable_prefix_caching=False)
        engine.add_request("alone", prompt, each)
        alone = drain(engine)["alone"].outputs[0].token_ids
        assert together[str(place)].outputs[0].token_ids == alone


def test_without_prefix_caching_nothing_is_exchanged(folder):
    engine = build(folder, False, enable_prefix_caching=False)
    for place in range(3):
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        engine.add_request(str(place), random_prompt(20, seed=3), params)
    for _ in range(35):
        engine.step()
    tables = [set(seq.block_table) for seq in engine.scheduler.running]
    assert not tables[0] & tables[1] and not tables[1] & tables[2]
