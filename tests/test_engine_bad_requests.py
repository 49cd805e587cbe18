"""Requests that will not do: a ValueError that names argument, value and remedy; nothing is lost.

The engine must serve as well after each of them as before.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_helpers import VOCAB_SIZE, assert_idle, drain, make_checkpoint, one_thread, refuses

from minivllm import LLM, SamplingParams

# 6 blocks of 16 tokens; the model could do 128.
CAPACITY = 96

threads = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLM:
    return LLM(folder, num_kv_blocks=6, block_size=16, max_num_seqs=4, max_num_batched_tokens=64)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """An engine that must serve as well after the test as before."""
    yield shared
    assert_idle(shared.engine)
    before = shared.stats.finished_requests
    params = SamplingParams(temperature=0, max_tokens=3)
    assert len(shared.generate([5, 6, 7], params, use_tqdm=False)[0].outputs[0].token_ids) == 3
    assert shared.stats.finished_requests == before + 1


# ---------------------------------------------------------------------------- sampling params


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -0.1}, r"temperature=-0.1 must be at least 0 \(0 is greedy\)"),
        ({"temperature": math.nan}, "temperature=nan must be a finite number"),
        ({"temperature": math.inf}, "temperature=inf must be a finite number"),
        ({"temperature": 10**400}, "temperature=10+ must be a finite number"),
        ({"temperature": "hot"}, "temperature='hot' must be a finite number"),
        ({"temperature": None}, "temperature=None must be a finite number"),
        ({"top_p": 0}, r"top_p=0 must be above 0 and at most 1 \(1 keeps every token\)"),
        ({"top_p": 1.01}, "top_p=1.01 must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p=nan must be a finite number"),
        ({"top_p": -math.inf}, "top_p=-inf must be a finite number"),
        ({"min_p": -0.1}, "min_p=-0.1 must be at least 0 and at most 1"),
        ({"min_p": 2}, "min_p=2 must be at least 0 and at most 1"),
        ({"min_p": math.inf}, "min_p=inf must be a finite number"),
        ({"top_k": -2}, "top_k=-2 must be at least -1"),
        ({"top_k": 2.0}, "top_k=2.0 must be an integer"),
        ({"max_tokens": 0}, r"max_tokens=0 must be at least 1 \(None has no limit\)"),
        ({"max_tokens": 1.5}, "max_tokens=1.5 must be an integer"),
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
        ({"logprobs": -1}, "logprobs=-1 must be at least 0 and at most 100"),
        ({"logprobs": 101}, "logprobs=101 must be at least 0 and at most 100"),
        ({"logprobs": True}, "logprobs=True must be an integer"),
        ({"stop": ""}, "stop='' must hold non-empty strings"),
        ({"stop": ["a", ""]}, r"stop=\['a', ''\] must hold non-empty strings"),
        ({"stop": [5]}, r"stop=\[5\] must hold non-empty strings"),
        ({"stop": 5}, "stop=5 must be a list"),
        ({"stop": {"a": 1}}, "stop={'a': 1} must be a list"),
        ({"stop_token_ids": iter([5])}, "stop_token_ids=<list_iterator .* must be a list"),
        ({"ignore_eos": "no"}, "ignore_eos='no' must be True or False"),
        ({"stop_token_ids": 5}, "stop_token_ids=5 must be a list"),
        ({"stop_token_ids": [-1]}, "stop_token_ids=-1 must be at least 0"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids='a' must be an integer"),
    ],
)
def test_sampling_params_that_will_not_do(settings, message):
    refuses(message, SamplingParams, **settings)


# ---------------------------------------------------------------------------- prompts

PROMPTS = [
    ("", "prompt='' is empty; give at least one token"),
    ([], r"prompt=\[\] is empty; give at least one token"),
    ({"prompt_token_ids": []}, r"prompt=.* is empty"),
    ({"prompt": ""}, "prompt=.* is empty"),
    ({}, r"prompt=\{\} must have the key 'prompt' or 'prompt_token_ids'"),
    ({"text": "hello"}, "prompt=.*text.* must have the key 'prompt' or 'prompt_token_ids'"),
    ({"prompt": None}, "prompt=None must be text or a list of integer token ids"),
    ({"prompt_token_ids": "hello"}, "prompt=.* text belongs under the key 'prompt'"),
    ([1, VOCAB_SIZE], f"prompt_token_ids holds {VOCAB_SIZE}, outside .* {VOCAB_SIZE} tokens"),
    ([1, -1], "prompt_token_ids holds -1, outside the vocabulary"),
    ([1, 2**70], "prompt_token_ids holds 1180591620717411303424, outside the vocabulary"),
    ([1.5], r"prompt=\[1.5\] must be text or a list of integer token ids"),
    ([True], r"prompt=\[True\] must be text or a list of integer"),
    (b"hello", "prompt=b'hello' must be text or a list of integer token ids"),
    (None, "prompt=None must be text or a list"),
    (7.5, "prompt=7.5 must be text or a list"),
    ([1] * CAPACITY, f"prompt has {CAPACITY} tokens.*{CAPACITY}.*6 KV blocks.*shorten the prompt"),
    ([1] * 1000, "the prompt has 1000 tokens, and max_model_len=96.*raise .*num_kv_blocks"),
]


@pytest.mark.parametrize("prompt, message", PROMPTS, ids=range(len(PROMPTS)))
def test_one_bad_prompt_in_a_list(llm, prompt, message):
    """It is refused before any of the list runs."""
    steps, arrivals = llm.stats.num_steps, llm.engine._num_arrivals
    refuses(message, llm.generate, [[1, 2], prompt, "good"], use_tqdm=False)
    assert llm.stats.num_steps == steps
    assert llm.engine._num_arrivals == arrivals, "not even queued"


@pytest.mark.parametrize("prompt, message", PROMPTS, ids=range(len(PROMPTS)))
def test_one_bad_prompt_for_the_engine(llm, prompt, message):
    """It is refused, and those that are being served do not notice."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=4)
    engine.add_request("good", [3, 4, 5], params)
    engine.step()
    refuses(message, engine.add_request, "bad", prompt, params)
    assert not engine.is_serving("bad")
    assert set(drain(engine)) == {"good"}


def test_bad_prompts_alone(llm):
    for prompt in ("", None, 7, b"x", [], [[]], {}):
        if prompt == []:
            assert llm.generate(prompt, use_tqdm=False) == [], "no prompts, no outputs"
        else:
            refuses("prompt=", llm.generate, prompt, use_tqdm=False)
    refuses(r"prompt=\[\] is empty", llm.stream, [])
    refuses(r"prompt=1 must be text", llm.generate, [1, "a"], use_tqdm=False)


def test_a_bad_prompt_is_refused_when_the_stream_is_asked_for(llm):
    refuses("outside the vocabulary", llm.stream, [VOCAB_SIZE])


def test_a_prompt_that_is_no_text(llm):
    refuses(r"prompt='\\ud800' is no text that UTF-8 can hold; decode", llm.generate, "\ud800")


def test_sampling_params_do_not_fit_the_prompts(llm):
    one = SamplingParams()
    refuses(
        "sampling_params has 1 entries for 2 prompts; give one for all, or one for each",
        *(llm.generate, [[1], [2]], [one]),
    )
    refuses("sampling_params=5 must be a SamplingParams", llm.generate, [[1], [2]], 5)
    refuses("sampling_params=.* must be a SamplingParams", llm.generate, [[1]], [{"top_k": 1}])
    refuses("sampling_params=.* must be a SamplingParams", llm.stream, [1], {"top_k": 1})
    refuses("sampling_params={} must be a SamplingParams", llm.stream, [1], {})
    refuses("sampling_params={'top_k': 1} must be", llm.generate, [[1]], {"top_k": 1})


def test_stop_tokens_outside_the_vocabulary(llm):
    params = SamplingParams(stop_token_ids=[VOCAB_SIZE])
    refuses(f"stop_token_ids holds {VOCAB_SIZE}, outside", llm.generate, [[1]], params)


def test_a_request_id_that_is_taken(llm):
    engine = llm.engine
    engine.add_request("a", [1], SamplingParams(max_tokens=2))
    refuses("request_id='a' is still being served", engine.add_request, "a", [2])
    assert len(drain(engine)["a"].outputs[0].token_ids) == 2
    engine.add_request("a", [2], SamplingParams(max_tokens=1))
    assert drain(engine)["a"].prompt_token_ids == [2], "an id may be used again later"


@pytest.mark.parametrize("params", [{}, 0])
def test_params_that_are_none(llm, params):
    refuses("must be a SamplingParams, not", llm.engine.add_request, "a", [1], params)


# ---------------------------------------------------------------------------- conversations


@pytest.mark.parametrize(
    "messages, message",
    [
        ("hello", "message 'h' must be a dict with the keys 'role' and 'content'"),
        ([["hello"]], "message 'hello' must be a dict"),
        ([{"role": "user"}], "message .*'user'.* must be a dict with the keys"),
        ([[]], "message None must be a dict"),
        ([5], "message 5 must be a dict"),
        (None, "messages=None must be a list of dicts"),
        ({"role": "user", "content": "hi"}, "messages={.*} must be a list of dicts"),
        ([{"role": "user", "content": "\udcff"}], "template cannot use .*surrogates not allowed"),
    ],
)
def test_conversations_that_will_not_do(llm, messages, message):
    refuses(message, llm.chat, messages, use_tqdm=False)


def test_a_template_that_fails(llm, monkeypatch):
    monkeypatch.setattr(llm.engine.tokenizer, "chat_template", "{{ 'x' + messages[0].content }}")
    refuses(
        "template cannot use messages=.*TypeError.*each content as text",
        *(llm.chat, [{"role": "user", "content": 5}]),
    )


def test_arguments_that_a_template_cannot_take(llm):
    refuses(
        "template cannot use messages=.*, tokenize=True .*only arguments that it takes",
        *(llm.chat, [{"role": "user", "content": "hi"}]),
        tokenize=True,
    )


def test_unknown_keywords_of_a_chat(llm):
    messages = [{"role": "user", "content": "hello"}]
    refuses(
        r"temperature=0.5 is no argument of a chat template; give SamplingParams\(temperature",
        *(llm.chat, messages),
        temperature=0.5,
    )


# ---------------------------------------------------------------------------- without a tokenizer


def test_text_without_a_tokenizer(folder):
    llm = LLM(folder, skip_tokenizer_init=True, num_kv_blocks=4, block_size=16)
    refuses("prompt='hi' is text, but skip_tokenizer_init=True", llm.generate, "hi")
    refuses("stop='x' needs text.*use stop_token_ids", llm.generate, [1], SamplingParams(stop="x"))
    refuses("chat needs a tokenizer", llm.chat, [{"role": "user", "content": "hi"}])
    assert_idle(llm.engine)


def test_a_tokenizer_without_a_chat_template(folder, tmp_path):
    llm = LLM(folder, num_kv_blocks=4, block_size=16)
    llm.engine.tokenizer.chat_template = None
    refuses("no chat template; use generate", llm.chat, [{"role": "user", "content": "hi"}])


# ---------------------------------------------------------------------------- no error at all


def test_the_largest_values_that_are_allowed_run_beside_others(llm):
    """What is accepted must not break a step, which would take everybody along."""
    params = [
        SamplingParams(temperature=1e300, top_k=10**30, seed=10**30, max_tokens=3),
        SamplingParams(temperature=2e-5, top_k=3, top_p=1e-300, min_p=1.0, max_tokens=3),
        SamplingParams(temperature=0, logprobs=100, max_tokens=3),
        SamplingParams(min_p=1e-300, seed=-(10**30), top_k=VOCAB_SIZE, max_tokens=3),
    ]
    outputs = llm.generate([[1]] * 4, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3] * 4
    greedy = [output.outputs[0].token_ids for output in outputs[1:3]]
    assert greedy[0] == greedy[1], "hardly any temperature, and the likeliest only"


def test_max_tokens_beyond_the_context_just_ends_there(llm):
    for prompt in ([1], [1] * 50, [1] * (CAPACITY - 1)):
        params = SamplingParams(temperature=0, max_tokens=10_000)
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        assert output.outputs[0].finish_reason == "length"
        assert len(prompt) + len(output.outputs[0].token_ids) == CAPACITY
