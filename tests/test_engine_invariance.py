"""Greedy tokens do not depend on how the engine came to them.

Batch composition, block size, chunk size, policy, prefix cache, preemption, aborts of others, a
step that fails: whatever a workload draws, every request gets the tokens that it gets alone, from a
loop that recomputes everything (chapter 2) and that knows no cache, page or batch.
"""

from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from engine_helpers import OverlappingEngine, assert_idle, drain, fail_once, one_thread
from helpers import TINY, oracle_greedy, random_prompt, save_checkpoint, tiny_qwen3
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import LLM, LLMEngine, SamplingParams
from minivllm.engine.scheduler import POLICIES
from minivllm.models.generate import generate_by_recomputing
from minivllm.models.loader import load_model

VOCAB_SIZE = TINY["vocab_size"]
MAX_TOKENS = 18
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

threads = pytest.fixture(autouse=True)(one_thread)


@dataclass
class Lab:
    """A checkpoint, and what each prompt gets alone."""

    folder: Path

    def __post_init__(self) -> None:
        model = load_model(self.folder)

        @cache
        def alone(prompt: tuple[int, ...]) -> list[int]:
            return list(generate_by_recomputing(model, list(prompt), MAX_TOKENS))

        self._alone = alone

    def alone(self, prompt: list[int], max_tokens: int = MAX_TOKENS) -> list[int]:
        return self._alone(tuple(prompt))[:max_tokens]

    def engine(self, *, overlap: bool = False, **changes: Any) -> LLMEngine:
        roomy = {"num_kv_blocks": 64, "block_size": 16, "max_num_seqs": 8}
        roomy |= {"max_num_batched_tokens": 64, "device": "cpu", "dtype": "float32"}
        build = OverlappingEngine if overlap else LLMEngine
        return build(model=self.folder, skip_tokenizer_init=True, **{**roomy, **changes})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(save_checkpoint(tiny_qwen3(seed=1), tmp_path_factory.mktemp("model")))


def make_prompts() -> list[list[int]]:
    """Prompts of many lengths; most share a beginning with others, whole or in part."""
    trunk = random_prompt(70, seed=100)
    prompts = [random_prompt(length, seed=length) for length in (1, 2, 15, 16, 17, 31, 47, 48)]
    prompts += [trunk[:length] for length in (15, 16, 32, 33, 64, 70)]
    prompts += [trunk[:cut] + random_prompt(8, seed=cut) for cut in (8, 16, 24, 48, 60)]
    prompts += [[7] * 40, [7] * 48]
    return prompts


PROMPTS = make_prompts()


def greedy(max_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **settings)


# ---------------------------------------------------------------------------- the oracles agree


def test_the_prompts_are_worth_a_test(lab):
    """Different prompts say different things, and say more than one token over and over."""
    answers = [lab.alone(prompt) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) >= 0.9 * len(PROMPTS)
    assert sum(len(set(answer)) for answer in answers) / len(answers) > 5


def test_recomputing_equals_transformers(lab):
    model = tiny_qwen3(seed=1)
    assert [lab.alone(prompt) for prompt in PROMPTS] == oracle_greedy(model, PROMPTS, MAX_TOKENS)


# ---------------------------------------------------------------------------- any workload


@dataclass
class Workload:
    """settings: of the engine. requests: (prompt, max_tokens, arrives at step). aborts: (step,
    place). fails: the step that breaks off, if any."""

    settings: dict[str, Any]
    requests: list[tuple[list[int], int, int]]
    aborts: list[tuple[int, int]]
    fails: int | None


def make_workload(seed: int) -> Workload:
    """From a random seed, not from hypothesis' own draws, which vary one workload many times."""
    pick = Random(seed)
    # Every third is crowded: all come at once, and what they generate outgrows the pool.
    crowded = seed % 3 == 0
    block_size = 16 if crowded else pick.choice([16, 32, 64])
    requests = [
        (
            pick.choice(PROMPTS),
            MAX_TOKENS if crowded else pick.choice([1, 4, 8]),
            0 if crowded else pick.choice([0, 0, 1, 3, 7]),
        )
        for _ in range(pick.randint(4, 5) if crowded else pick.randint(2, 6))
    ]
    largest = max(-(-(len(prompt) + count) // block_size) for prompt, count, _ in requests)
    prompts = sum(-(-len(prompt) // block_size) for prompt, _, _ in requests)
    max_num_seqs = 6 if crowded else pick.choice([1, 3, 6])
    return Workload(
        settings={
            "block_size": block_size,
            "num_kv_blocks": max(largest, prompts + 1) if crowded else largest + pick.randint(0, 9),
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_seqs + pick.choice([3, 15, 60, 500]),
            "policy": pick.choice(POLICIES),
            "enable_prefix_caching": pick.random() < 0.6,
        },
        requests=requests,
        aborts=[(pick.randint(0, 12), pick.randint(0, 5)) for _ in range(pick.choice([0, 0, 1]))],
        fails=None if crowded else pick.choice([None, None, 2, 6]),
    )


WORKLOADS = st.integers(0, 2**32 - 1).map(make_workload)


def run(engine: LLMEngine, workload: Workload) -> tuple[dict[int, list[int]], set[int]]:
    """Serve a workload; the tokens of each request, and which were aborted."""
    if workload.fails is not None:
        fail_once(engine, workload.fails)
    coming = deque(sorted(enumerate(workload.requests), key=lambda pair: pair[1][2]))
    tokens: dict[int, list[int]] = {}
    aborted: set[int] = set()
    now = 0
    while coming or engine.has_unfinished_requests:
        assert now < 3000, "a livelock"
        while coming and (coming[0][1][2] <= now or not engine.has_unfinished_requests):
            place, (prompt, max_tokens, _) = coming.popleft()
            engine.add_request(str(place), prompt, greedy(max_tokens), stream=place % 2 == 0)
        for step, place in workload.aborts:
            if step == now and (output := engine.abort_request(str(place))) is not None:
                tokens[place] = output.outputs[0].token_ids
                aborted.add(place)
        try:
            outputs = engine.step()
        except RuntimeError:
            outputs = []
        for output in outputs:
            tokens[int(output.request_id)] = output.outputs[0].token_ids
        now += 1
    assert_idle(engine)
    return tokens, aborted


def check(lab: Lab, workload: Workload, device: str, **changes: Any) -> LLMEngine:
    engine = lab.engine(device=device, **workload.settings, **changes)
    tokens, aborted = run(engine, workload)
    for place, (prompt, max_tokens, _) in enumerate(workload.requests):
        alone = lab.alone(prompt, max_tokens)
        if place in aborted:
            assert tokens[place] == alone[: len(tokens[place])]
        else:
            assert tokens[place] == alone
    return engine


@pytest.mark.parametrize("most, overlap", [(210, False), (40, True)])
def test_any_workload(lab, most, overlap):
    """At least 200 random workloads, the same ones every time."""
    count = preempted = cached = failed = 0

    @settings(derandomize=True, deadline=None, max_examples=most)
    @given(WORKLOADS)
    def every(workload: Workload) -> None:
        nonlocal count, preempted, cached, failed
        engine = check(lab, workload, "cpu", overlap=overlap)
        count += 1
        failed += workload.fails is not None
        preempted += workload.fails is None and engine.stats.num_preemptions > 0
        cached += engine.stats.cached_tokens > 0

    every()
    assert count >= 0.95 * most
    # The draw must go on reaching what it is there for.
    counts = (preempted, cached, failed)
    assert min(preempted * 2, cached, failed) >= 0.14 * most, counts


@pytest.mark.gpu
def test_any_workload_on_a_gpu(lab):
    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(WORKLOADS)
    def every(workload: Workload) -> None:
        check(lab, workload, "cuda")

    every()


# ---------------------------------------------------------------------------- one thing at a time


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_seqs": 1},
        {"block_size": 32},
        {"block_size": 256, "num_kv_blocks": 20},
        {"max_num_batched_tokens": 8},
        {"policy": "mixed"},
        {"policy": "mixed", "max_num_batched_tokens": 9},
        {"enable_prefix_caching": False},
        {"num_kv_blocks": 6},
        {"num_kv_blocks": 6, "policy": "mixed"},
        {"attention_backend": "torch"},
        {"async_scheduling": False},
        {"enforce_eager": True},
        {"overlap": True},
        {"overlap": True, "async_scheduling": False},
        {"overlap": True, "policy": "mixed", "max_num_batched_tokens": 9},
        {"overlap": True, "num_kv_blocks": 6},
        {"overlap": True, "num_kv_blocks": 6, "policy": "mixed"},
    ],
    ids=str,
)
def test_each_setting_alone(lab, changes, device):
    engine = lab.engine(device=device, **changes)
    for place, prompt in enumerate(PROMPTS):
        engine.add_request(str(place), prompt, greedy(MAX_TOKENS))
    finished = drain(engine)
    for place, prompt in enumerate(PROMPTS):
        assert finished[str(place)].outputs[0].token_ids == lab.alone(prompt)
    assert_idle(engine)
    if changes.get("num_kv_blocks") == 6:
        assert engine.stats.num_preemptions > 0
    if changes.get("enable_prefix_caching") is False:
        assert engine.stats.cached_tokens == 0
    elif changes == {}:
        assert engine.stats.cached_tokens > 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_our_kernels_in_the_interpreter(lab):
    """The engine on its Triton kernels, as far as a CPU can show it: a prefill and a mixed step."""
    pytest.importorskip("triton")
    engine = lab.engine(attention_backend="triton", policy="mixed", max_num_batched_tokens=40)
    for place in (0, 4, 5):
        engine.add_request(str(place), PROMPTS[place], greedy(3))
    finished = drain(engine)
    for place in (0, 4, 5):
        assert finished[str(place)].outputs[0].token_ids == lab.alone(PROMPTS[place], 3)


@pytest.mark.parametrize("device", DEVICES)
def test_llm_equals_transformers_for_100_prompts(lab, device):
    # Few lengths, so that transformers can take them in few batches without padding.
    lengths = (1, 16, 29, 50, 97)
    prompts = [random_prompt(lengths[seed % 5], seed=1000 + seed) for seed in range(100)]
    llm = LLM(
        lab.folder,
        skip_tokenizer_init=True,
        device=device,
        dtype="float32",
        block_size=16,
        num_kv_blocks=80,
        max_num_seqs=24,
    )
    outputs = llm.generate(prompts, greedy(20), use_tqdm=False)
    theirs = oracle_greedy(tiny_qwen3(seed=1), prompts, 20)
    assert [output.outputs[0].token_ids for output in outputs] == theirs
    assert_idle(llm.engine)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_asked_again_is_cached_and_says_the_same(lab, device):
    engine = lab.engine(device=device)
    for again in range(3):
        for place, prompt in enumerate(PROMPTS):
            engine.add_request(f"{again} {place}", prompt, greedy(MAX_TOKENS))
        for key, output in drain(engine).items():
            prompt = PROMPTS[int(key.split()[1])]
            assert output.outputs[0].token_ids == lab.alone(prompt)
            if again:
                assert output.num_cached_tokens == (len(prompt) - 1) // 16 * 16


def test_generated_text_is_cached_too(lab):
    """The next turn of a talk begins with the last turn's answer."""
    engine = lab.engine()
    prompt = PROMPTS[5]
    engine.add_request("first", prompt, greedy(MAX_TOKENS))
    answer = drain(engine)["first"].outputs[0].token_ids
    talk = prompt + answer
    assert len(prompt) // 16 < (len(talk) - 1) // 16
    engine.add_request("second", [*talk, 1, 2, 3], greedy(4))
    # The newest token's K and V were never computed; it was nobody's input.
    assert drain(engine)["second"].num_cached_tokens == (len(talk) - 1) // 16 * 16


@pytest.mark.gpu
def test_bfloat16_on_a_gpu(lab):
    """Half precision may choose otherwise at a near tie, but the engine must serve."""
    llm = LLM(lab.folder, skip_tokenizer_init=True, device="cuda", dtype="bfloat16")
    outputs = llm.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=False)
    first = [output.outputs[0].token_ids[0] for output in outputs]
    alone = [lab.alone(prompt)[0] for prompt in PROMPTS]
    agree = sum(a == b for a, b in zip(first, alone, strict=True))
    assert agree >= 0.8 * len(PROMPTS)


# ---------------------------------------------------------------------------- seeded sampling

SAMPLED = [
    SamplingParams(temperature=0.9, seed=1, max_tokens=MAX_TOKENS),
    SamplingParams(temperature=1.3, seed=2, top_k=20, max_tokens=MAX_TOKENS),
    SamplingParams(temperature=0.7, seed=3, top_p=0.9, max_tokens=MAX_TOKENS),
    SamplingParams(temperature=1.0, seed=2**40 + 4, min_p=0.05, max_tokens=MAX_TOKENS),
    SamplingParams(temperature=5.0, seed=-5, top_k=50, top_p=0.95, max_tokens=MAX_TOKENS),
]


def sampled_alone(lab: Lab, prompt: list[int], params: SamplingParams, **changes: Any) -> list[int]:
    engine = lab.engine(**changes)
    engine.add_request("alone", prompt, params)
    return drain(engine)["alone"].outputs[0].token_ids


@pytest.fixture(scope="module")
def sampled(lab: Lab) -> list[list[int]]:
    """What each of ``SAMPLED`` says after one and the same prompt, alone."""
    return [sampled_alone(lab, PROMPTS[4], params) for params in SAMPLED]


def test_seeds_make_a_difference(lab, sampled):
    assert len({tuple(answer) for answer in sampled}) == len(SAMPLED)
    other = SamplingParams(temperature=0.9, seed=7, max_tokens=MAX_TOKENS)
    assert sampled_alone(lab, PROMPTS[4], other) != sampled[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy": "mixed", "max_num_batched_tokens": 9},
        {"block_size": 32, "enable_prefix_caching": False},
        {"num_kv_blocks": 6},
        {"seed": 99},
        {"overlap": True},
        {"overlap": True, "num_kv_blocks": 6, "policy": "mixed"},
    ],
    ids=str,
)
def test_the_same_seed_says_the_same_in_any_company(lab, sampled, changes):
    engine = lab.engine(**changes)
    for place, params in enumerate(SAMPLED):
        engine.add_request(f"sampled {place}", PROMPTS[4], params)
        engine.add_request(f"noise {place}", PROMPTS[place], SamplingParams(max_tokens=5))
        engine.add_request(f"greedy {place}", PROMPTS[place + 6], greedy(MAX_TOKENS))
        engine.step()
    finished = drain(engine)
    for place, answer in enumerate(sampled):
        assert finished[f"sampled {place}"].outputs[0].token_ids == answer
        assert finished[f"greedy {place}"].outputs[0].token_ids == lab.alone(PROMPTS[place + 6])
    if "num_kv_blocks" in changes:
        assert engine.stats.num_preemptions > 0


def test_without_a_seed_requests_differ_and_the_engine_seed_repeats_them(lab):
    params = SamplingParams(temperature=1.5, max_tokens=MAX_TOKENS)

    def answers(seed: int) -> list[list[int]]:
        engine = lab.engine(seed=seed)
        for place in range(6):
            engine.add_request(str(place), PROMPTS[4], params)
        finished = drain(engine)
        return [finished[str(place)].outputs[0].token_ids for place in range(6)]

    first = answers(0)
    assert len({tuple(answer) for answer in first}) == 6
    assert answers(0) == first
    assert answers(1) != first


def test_sampling_follows_the_distribution(lab):
    """A thousand seeds: the first token's frequencies are the softmax of the model's logits."""
    prompt = PROMPTS[3]
    engine = lab.engine(max_num_seqs=50, num_kv_blocks=200, max_num_batched_tokens=400)
    engine.add_request("logprobs", prompt, greedy(1, logprobs=5))
    (place,) = drain(engine)["logprobs"].outputs[0].logprobs
    count = 1000
    for seed in range(count):
        params = SamplingParams(temperature=1, seed=seed, max_tokens=1)
        engine.add_request(str(seed), prompt, params)
    drawn = [output.outputs[0].token_ids[0] for output in drain(engine).values()]
    for token, entry in place.items():
        probability = float(torch.tensor(entry.logprob).exp())
        spread = (probability * (1 - probability) / count) ** 0.5
        assert abs(drawn.count(token) / count - probability) < 4 * spread + 1 / count
