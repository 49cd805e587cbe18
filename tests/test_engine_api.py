"""The engine as its users see it: LLM, LLMEngine, SamplingParams and what they give back."""

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import (
    END,
    MULTIBYTE,
    VOCAB_SIZE,
    OverlappingEngine,
    assert_idle,
    byte_tokenizer,
    drain,
    fail_once,
    follow_script,
    make_checkpoint,
    one_thread,
    word_tokenizer,
)
from helpers import edit_json, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st

import minivllm
from minivllm import LLM, LLMEngine, RequestOutput, SamplingParams
from minivllm.engine.detokenizer import REPLACEMENT, IncrementalDetokenizer
from minivllm.engine.events import EventLog
from minivllm.models.generate import borrowed_attention, generate_by_recomputing
from minivllm.models.hub import EMBEDDED_MODEL
from minivllm.models.loader import load_model

SETTINGS = {"block_size": 16, "num_kv_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=8)

threads = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return load_model(folder)


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLM:
    return LLM(folder, **SETTINGS)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """One engine for many tests, each of which must leave it idle."""
    right = shared.engine.runner.run
    yield shared
    shared.engine.runner.run = right
    assert_idle(shared.engine)
    assert shared._mail == {}


@pytest.fixture
def engine(llm: LLM) -> LLMEngine:
    return llm.engine


def alone(model: torch.nn.Module, prompt: list[int], max_tokens: int = 8) -> list[int]:
    return list(generate_by_recomputing(model, prompt, max_tokens))


def run(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# ---------------------------------------------------------------------------- the package


def test_public_names():
    for name in minivllm.__all__:
        assert getattr(minivllm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Sampling'"):
        _ = minivllm.Sampling


def test_sampling_params_are_a_value():
    params = SamplingParams(temperature=0.5, stop=["a"], seed=3)
    assert params == copy.deepcopy(params) == pickle.loads(pickle.dumps(params))
    assert params.stop_strings == ("a",)
    assert replace(params, stop="b").stop_strings == ("b",)
    with pytest.raises(FrozenInstanceError):
        params.temperature = 1.0
    assert SamplingParams() == SamplingParams(temperature=1.0, top_p=1.0, max_tokens=16)
    assert SamplingParams(temperature=0).greedy and not SamplingParams(temperature=0.1).greedy


# ---------------------------------------------------------------------------- generate


def test_every_form_of_a_prompt(llm, model):
    text = "the block table"
    token_ids = llm.engine.tokenizer.encode(text)
    assert len(token_ids) > 1
    wanted = alone(model, token_ids)
    forms = [
        (text, text),
        (token_ids, None),
        ({"prompt": text}, text),
        ({"prompt_token_ids": token_ids}, None),
        ({"prompt": "shown", "prompt_token_ids": token_ids}, "shown"),
    ]
    for prompt, shown in forms:
        for prompts in (prompt, [prompt]):
            (output,) = run(llm, prompts)
            assert output.prompt == shown
            assert output.prompt_token_ids == token_ids
            assert output.outputs[0].token_ids == wanted
    outputs = run(llm, [prompt for prompt, _ in forms])
    assert [output.prompt for output in outputs] == [shown for _, shown in forms]
    assert tokens_of(outputs) == [wanted] * 5
    assert tokens_of(run(llm, tuple(prompt for prompt, _ in forms))) == [wanted] * 5


def test_no_prompts_no_outputs(llm):
    assert llm.generate([], GREEDY) == []


def test_outputs_come_in_the_order_of_the_prompts(llm, model):
    """The first prompt is the longest and wants the most, so it finishes last."""
    prompts = [random_prompt(60 - 4 * i, seed=i, vocab_size=VOCAB_SIZE) for i in range(12)]
    params = [replace(GREEDY, max_tokens=20 - i) for i in range(12)]
    outputs = run(llm, prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert tokens_of(outputs) == [
        alone(model, prompt, each.max_tokens) for prompt, each in zip(prompts, params, strict=True)
    ]
    finished = [output.metrics.finished_time for output in outputs]
    assert finished != sorted(finished)
    assert len({output.request_id for output in outputs}) == 12


def test_one_sampling_params_for_all_or_one_for_each(llm):
    prompts = [[1, 2, 3], [4, 5], [6]]
    assert [len(t) for t in tokens_of(run(llm, prompts, replace(GREEDY, max_tokens=3)))] == [3] * 3
    each = [replace(GREEDY, max_tokens=count) for count in (1, 4, 2)]
    for params in (each, tuple(each), iter(each)):
        assert [len(tokens) for tokens in tokens_of(run(llm, prompts, params))] == [1, 4, 2]
    assert [len(tokens) for tokens in tokens_of(run(llm, prompts, None))] == [16] * 3


def test_the_callers_lists_are_left_alone(llm):
    prompt, prompts = [5, 6, 7], [[1, 2], [3]]
    output = run(llm, prompt)[0]
    run(llm, prompts)
    assert (prompt, prompts) == ([5, 6, 7], [[1, 2], [3]])
    output.outputs[0].token_ids.append(0)
    output.prompt_token_ids.append(0)
    assert run(llm, prompt)[0].prompt_token_ids == [5, 6, 7]


def test_what_an_output_tells(llm):
    (output,) = run(llm, "the key and the value of the token")
    (completion,) = output.outputs
    assert output.finished and completion.index == 0
    assert completion.finish_reason == "length" and completion.stop_reason is None
    assert completion.logprobs is None
    assert completion.text == llm.engine.tokenizer.decode(completion.token_ids)
    metrics = output.metrics
    assert (
        metrics.arrival_time
        <= metrics.first_scheduled_time
        < metrics.first_token_time
        < metrics.finished_time
    )
    assert metrics.time_to_first_token == metrics.first_token_time - metrics.arrival_time
    assert metrics.num_preemptions == 0


def test_num_cached_tokens(folder):
    llm = LLM(folder, **SETTINGS)
    prompt = random_prompt(40, seed=0, vocab_size=VOCAB_SIZE)
    assert run(llm, [prompt])[0].num_cached_tokens == 0
    assert [out.num_cached_tokens for out in run(llm, [prompt, prompt[:20], [1]])] == [32, 16, 0]
    stats = llm.stats
    assert (stats.cached_tokens, stats.prompt_tokens) == (48, 101)
    assert stats.cache_hit_rate == 48 / 101


def test_the_progress_bar(llm, capsys):
    llm.generate([[1, 2], [3]], GREEDY)
    shown = capsys.readouterr()
    assert "2/2" in shown.err and "tok/s" in shown.err and shown.out == ""
    llm.generate([[1, 2], [3]], GREEDY, use_tqdm=False)
    shown = capsys.readouterr()
    assert shown.err == shown.out == ""


def test_stats_count_what_was_done(folder):
    llm = LLM(folder, **SETTINGS)
    run(llm, [[1] * 20, [2] * 5], [replace(GREEDY, max_tokens=4), replace(GREEDY, max_tokens=2)])
    stats = llm.stats
    assert stats.prefill_tokens == 25
    # The first token of each comes from its prefill.
    assert stats.decode_tokens == 3 + 1
    assert stats.num_steps == 4
    assert (stats.finished_requests, stats.finish_reasons) == (2, {"length": 2})
    assert stats.num_kv_blocks == 40 and stats.peak_kv_blocks == 3
    assert stats.num_preemptions == 0
    assert stats.prefill_rate == stats.prefill_tokens / stats.prefill_seconds > 0
    assert stats.decode_rate == stats.decode_tokens / stats.decode_seconds > 0


def test_an_engine_without_a_tokenizer(folder, model):
    llm = LLM(folder, skip_tokenizer_init=True, **SETTINGS)
    (output,) = run(llm, [1, 2, 3], replace(GREEDY, logprobs=1))
    assert output.outputs[0].token_ids == alone(model, [1, 2, 3])
    assert output.outputs[0].text == "" and output.prompt is None
    assert output.outputs[0].logprobs[0][output.outputs[0].token_ids[0]].decoded_token is None


def test_a_tokenizer_from_elsewhere(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    llm = LLM(tmp_path, tokenizer=folder, **SETTINGS)
    assert run(llm, "the block")[0].prompt_token_ids == llm.engine.tokenizer.encode("the block")


# ---------------------------------------------------------------------------- logprobs


@torch.inference_mode()
def model_logprobs(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """[T, V]: what follows each token."""
    attend = borrowed_attention(model.config.head_size**-0.5)
    hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
    return model.compute_logits(hidden).log_softmax(dim=-1)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=3, seed=1, max_tokens=8)])
def test_logprobs(llm, model, params):
    """The model's own, whatever the temperature; the chosen token is always among them."""
    prompt = random_prompt(20, seed=3, vocab_size=VOCAB_SIZE)
    (output,) = run(llm, [prompt], replace(params, logprobs=3))
    (completion,) = output.outputs
    assert len(completion.logprobs) == len(completion.token_ids) == 8
    wanted = model_logprobs(model, prompt + completion.token_ids)[len(prompt) - 1 :]
    for token, row, entries in zip(completion.token_ids, wanted, completion.logprobs, strict=False):
        likeliest = row.topk(3).indices.tolist()
        assert set(entries) == {*likeliest, token}
        for rank, each in enumerate(likeliest, start=1):
            assert entries[each].rank == rank
        assert entries[token].rank == int((row > row[token]).sum()) + 1
        for each, entry in entries.items():
            assert math.isclose(entry.logprob, float(row[each]), abs_tol=1e-4)
            assert entry.decoded_token == llm.engine.tokenizer.decode([each])
    if params is not GREEDY:
        ranks = [e[t].rank for e, t in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert max(ranks) > 3, "temperature 3 should have left the likeliest three"


def test_logprobs_of_the_chosen_token_only(llm):
    outputs = run(
        llm, [[1, 2], [1, 2], [1, 2]], [GREEDY, *[replace(GREEDY, logprobs=n) for n in (0, 2)]]
    )
    none, chosen, two = (output.outputs[0] for output in outputs)
    assert none.logprobs is None
    assert [set(entries) for entries in chosen.logprobs] == [{token} for token in chosen.token_ids]
    assert all(len(entries) == 2 for entries in two.logprobs)


def test_logprobs_survive_preemption(folder, model):
    """A request that was preempted reports each place once."""
    llm = LLM(folder, **{**SETTINGS, "num_kv_blocks": 6})
    prompts = [random_prompt(16, seed=i, vocab_size=VOCAB_SIZE) for i in range(3)]
    outputs = run(llm, prompts, replace(GREEDY, max_tokens=30, logprobs=1))
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        (completion,) = output.outputs
        assert completion.token_ids == alone(model, prompt, 30)
        for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
            assert entries[token].rank == 1
    assert_idle(llm.engine)


# ---------------------------------------------------------------------------- how it ends


def scripted(llm: LLM, text: str) -> list[int]:
    """Let the model say ``text``, then END for ever; returns the text's tokens."""
    token_ids = llm.engine.tokenizer.encode(text)
    end = llm.engine.tokenizer.convert_tokens_to_ids(END)
    follow_script(llm.engine, token_ids + [end] * 100)
    return token_ids


SENTENCE = "the block table lists the blocks"


@pytest.mark.parametrize(
    "stop, text, reason",
    [
        ("table", "the block ", "table"),
        ("k t", "the bloc", "k t"),
        (["lists", "table"], "the block ", "table"),
        (["block table l", "table"], "the block ", "table"),
        (["nowhere", " "], "the", " "),
        ("blocks", "the block table lists the ", "blocks"),
        ("the", "", "the"),
        (SENTENCE, "", SENTENCE),
        (("tab", "table"), "the block ", "tab"),
    ],
)
def test_stop_strings(llm, stop, text, reason):
    script = scripted(llm, SENTENCE)
    (output,) = run(llm, [1], SamplingParams(max_tokens=50, stop=stop))
    (completion,) = output.outputs
    assert completion.text == text
    assert (completion.finish_reason, completion.stop_reason) == ("stop", reason)
    count = len(completion.token_ids)
    assert completion.token_ids == script[:count]
    decode = llm.engine.tokenizer.decode
    assert reason in decode(script[:count]) and reason not in decode(script[: count - 1])


def test_a_stop_string_that_spans_tokens(llm):
    """Cut the sentence into its tokens, and stop at the seam of two of them."""
    script = scripted(llm, SENTENCE)
    pieces = [llm.engine.tokenizer.decode([token]) for token in script]
    for index, (left, right) in enumerate(pairwise(pieces)):
        stop = left[-1] + right[0]
        (output,) = run(llm, [1], SamplingParams(max_tokens=50, stop=stop))
        at = SENTENCE.index(stop)
        assert output.outputs[0].text == SENTENCE[:at]
        assert len(output.outputs[0].token_ids) <= index + 2


def test_a_stop_string_at_the_last_token_counts_as_stop(llm):
    script = scripted(llm, SENTENCE)
    params = SamplingParams(max_tokens=len(script), stop=SENTENCE[-2:])
    (output,) = run(llm, [1], params)
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == SENTENCE[:-2]


def test_an_end_is_recorded_once(llm, monkeypatch):
    """By its last token, which completes a stop string, too."""
    script = scripted(llm, SENTENCE)
    events = EventLog()
    monkeypatch.setattr(llm.engine.scheduler, "events", events)
    run(llm, [1], SamplingParams(max_tokens=len(script), stop=SENTENCE[-2:]))
    assert len(events.of("finished")) == 1


def test_a_stop_string_that_never_comes(llm):
    script = scripted(llm, SENTENCE)
    params = SamplingParams(max_tokens=len(script), stop=["blocks ", "x"])
    (output,) = run(llm, [1], params)
    assert output.outputs[0].text == SENTENCE
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("length", None)


def test_a_stop_string_is_not_sought_in_the_prompt(llm):
    scripted(llm, SENTENCE)
    (output,) = run(llm, "table", SamplingParams(max_tokens=3, stop="table"))
    assert output.outputs[0].finish_reason == "length"


@pytest.fixture(scope="module")
def with_end(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same model, with an end token in its config."""
    copy_of = tmp_path_factory.mktemp("with end")
    for file in folder.iterdir():
        (copy_of / file.name).write_bytes(file.read_bytes())
    end = byte_tokenizer().convert_tokens_to_ids(END)
    edit_json(copy_of / "generation_config.json", lambda c: {**c, "eos_token_id": [end, 300]})
    return LLM(copy_of, **SETTINGS)


def test_the_models_end_token(with_end):
    script = scripted(with_end, SENTENCE)
    (output,) = run(with_end, [1], SamplingParams(max_tokens=50))
    (completion,) = output.outputs
    assert len(completion.token_ids) == len(script) + 1, "the end token is reported"
    assert completion.text == SENTENCE, "but is no text"
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_every_end_token_of_the_model_counts(with_end):
    follow_script(with_end.engine, [5, 300, 6, 7, 8])
    (output,) = run(with_end, [1], SamplingParams(max_tokens=50))
    assert output.outputs[0].token_ids == [5, 300]
    assert output.outputs[0].text == with_end.engine.tokenizer.decode([5])


def test_ignore_eos(with_end):
    script = scripted(with_end, SENTENCE)
    params = SamplingParams(max_tokens=len(script) + 5, ignore_eos=True)
    (output,) = run(with_end, [1], params)
    assert len(output.outputs[0].token_ids) == len(script) + 5
    assert output.outputs[0].finish_reason == "length"
    assert output.outputs[0].text == SENTENCE


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ids(with_end, ignore_eos):
    script = scripted(with_end, SENTENCE)
    stop = script[3]
    params = SamplingParams(
        max_tokens=50, stop_token_ids=[999 % VOCAB_SIZE, stop], ignore_eos=ignore_eos
    )
    (output,) = run(with_end, [1], params)
    (completion,) = output.outputs
    first = script.index(stop)
    assert completion.token_ids == script[: first + 1]
    assert completion.text == with_end.engine.tokenizer.decode(script[:first])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_max_tokens_none_goes_on_until_the_context_is_full(llm):
    (output,) = run(llm, [[1] * 100], replace(GREEDY, max_tokens=None))
    assert len(output.outputs[0].token_ids) == 128 - 100
    assert output.outputs[0].finish_reason == "length"


def test_max_model_len_ends_it_earlier(folder):
    llm = LLM(folder, max_model_len=50, **SETTINGS)
    (output,) = run(llm, [[1] * 20], replace(GREEDY, max_tokens=1000))
    assert len(output.outputs[0].token_ids) == 30
    assert output.outputs[0].finish_reason == "length"


# ---------------------------------------------------------------------------- stream


def test_stream(llm, model):
    prompt = "the block table"
    outputs = list(llm.stream(prompt, replace(GREEDY, max_tokens=12)))
    (whole,) = run(llm, prompt, replace(GREEDY, max_tokens=12))
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 13))
    assert [output.finished for output in outputs] == [False] * 11 + [True]
    assert [output.outputs[0].finish_reason for output in outputs] == [None] * 11 + ["length"]
    for before, after in pairwise(output.outputs[0].text for output in outputs):
        assert after.startswith(before)
    assert outputs[-1].outputs == whole.outputs
    assert outputs[-1].prompt == prompt


def test_a_streamed_text_never_splits_a_character(llm):
    script = scripted(llm, MULTIBYTE)
    texts = [
        output.outputs[0].text for output in llm.stream([1], SamplingParams(max_tokens=len(script)))
    ]
    assert texts[-1] == MULTIBYTE
    assert all(MULTIBYTE.startswith(text) for text in texts)
    assert len(set(texts)) > 10, "text comes bit by bit"


def test_a_streamed_text_never_shows_a_part_of_a_stop_string(llm):
    """What may be the beginning of a stop string is held back until it is clear."""
    script = scripted(llm, SENTENCE)
    params = SamplingParams(max_tokens=len(script), stop=["table lifts", "the blocks"])
    texts = [output.outputs[0].text for output in llm.stream([1], params)]
    assert texts[-1] == "the block table lists "
    assert all(texts[-1].startswith(text) for text in texts)
    assert not any(text.endswith(("t", "ta", "table", "table l", "table li")) for text in texts[1:])


def test_two_streams_take_turns(llm, model):
    prompts = [random_prompt(20, seed=i, vocab_size=VOCAB_SIZE) for i in range(2)]
    params = [replace(GREEDY, max_tokens=count) for count in (6, 10)]
    streams = [llm.stream(p, each) for p, each in zip(prompts, params, strict=True)]
    first, second = [], []
    for a, b in zip(*streams, strict=False):
        first.append(a.outputs[0].token_ids)
        second.append(b.outputs[0].token_ids)
    second += [output.outputs[0].token_ids for output in streams[1]]
    # Whoever steps moves both on; neither misses what the other's steps brought.
    assert first == [alone(model, prompts[0], n) for n in range(1, 7)]
    assert second[-1] == alone(model, prompts[1], 10)
    assert [len(tokens) for tokens in second] == sorted({len(tokens) for tokens in second})


def test_generate_while_a_stream_is_open(llm, model):
    prompt = random_prompt(20, seed=5, vocab_size=VOCAB_SIZE)
    stream = llm.stream(prompt, replace(GREEDY, max_tokens=12))
    seen = [output.outputs[0].token_ids for output in islice(stream, 3)]
    assert tokens_of(run(llm, [[1, 2, 3]])) == [alone(model, [1, 2, 3])]
    seen += [output.outputs[0].token_ids for output in stream]
    assert seen == [alone(model, prompt, n) for n in range(1, 13)]


def test_leaving_a_stream_early_gives_its_blocks_back(llm, engine, model):
    other = llm.stream([1, 2, 3], GREEDY)
    next(other)
    held = engine.block_manager.num_held
    for _ in llm.stream([7] * 40, replace(GREEDY, max_tokens=50)):
        assert engine.block_manager.num_held > held
        break
    assert engine.block_manager.num_held == held
    assert list(other)[-1].outputs[0].token_ids == alone(model, [1, 2, 3])


def test_a_stream_that_nobody_reads_costs_nothing(llm, engine):
    stream = llm.stream([1, 2, 3])
    assert not engine.has_unfinished_requests
    stream.close()


def count_steps(engine: LLMEngine, most: int) -> None:
    """A safety net: fail instead of stepping for ever."""
    right, left = engine.step, [most]

    def step() -> list[RequestOutput]:
        left[0] -= 1
        assert left[0] > 0, "stepping for ever"
        return right()

    engine.step = step


def test_a_stream_whose_request_is_aborted_ends(folder, model):
    """Whoever reads a stream learns its request's id, and may use it."""
    llm = LLM(folder, **SETTINGS)
    count_steps(llm.engine, 100)
    stream = llm.stream([1, 2, 3], replace(GREEDY, max_tokens=100))
    first = next(stream)
    output = llm.engine.abort_request(first.request_id)
    assert output.outputs[0].finish_reason == "abort"
    assert list(stream) == []
    assert_idle(llm.engine)
    # The same beside another request.
    stream, other = (llm.stream([n, 2], replace(GREEDY, max_tokens=20)) for n in (1, 2))
    first, _ = next(stream), next(other)
    llm.engine.abort_request(first.request_id)
    list(stream)
    assert list(other)[-1].outputs[0].token_ids == alone(model, [2, 2], 20)
    assert_idle(llm.engine)


# ---------------------------------------------------------------------------- chat

HELLO = [{"role": "user", "content": "hello"}]
PROMPT_OF_HELLO = "<|user|>hello<|end|><|assistant|>."


def test_chat(llm):
    (output,) = llm.chat(HELLO, GREEDY, use_tqdm=False)
    assert output.prompt == PROMPT_OF_HELLO
    end = llm.engine.tokenizer.convert_tokens_to_ids(END)
    assert output.prompt_token_ids.count(end) == 1, "special tokens are tokens, not letters"
    (same,) = run(llm, [output.prompt_token_ids])
    assert output.outputs == same.outputs


def test_many_conversations(llm):
    talk = [
        {"role": "system", "content": "be brief"},
        *HELLO,
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
    ]
    outputs = llm.chat([HELLO, talk], GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == [
        PROMPT_OF_HELLO,
        "<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>hi<|end|><|user|>bye<|end|>"
        "<|assistant|>.",
    ]
    params = [replace(GREEDY, max_tokens=n) for n in (2, 5)]
    outputs = llm.chat([HELLO, talk], params, use_tqdm=False)
    assert [len(tokens) for tokens in tokens_of(outputs)] == [2, 5]
    assert llm.chat([], GREEDY) == []


def test_arguments_of_the_template(llm):
    (output,) = llm.chat(HELLO, GREEDY, use_tqdm=False, thinking=True)
    assert output.prompt == "<|user|>hello<|end|><|assistant|>"


def test_stream_of_a_chat(llm):
    *_, last = llm.stream(HELLO, GREEDY)
    assert last.prompt == PROMPT_OF_HELLO
    assert last.outputs == llm.chat(HELLO, GREEDY, use_tqdm=False)[0].outputs
    *_, of_a_tuple = llm.stream(tuple(HELLO), GREEDY)
    assert of_a_tuple.outputs == last.outputs


# ---------------------------------------------------------------------------- engine


def test_an_engine_by_hand(engine, model):
    engine.add_request("streamed", [1, 2, 3], GREEDY)
    engine.add_request("whole", [4, 5], replace(GREEDY, max_tokens=5), stream=False)
    seen: dict[str, list[int]] = {"streamed": [], "whole": []}
    while engine.has_unfinished_requests:
        for output in engine.step():
            seen[output.request_id].append(len(output.outputs[0].token_ids))
    assert seen == {"streamed": list(range(1, 9)), "whole": [5]}
    assert engine.step() == []


def test_requests_may_come_at_any_time(engine, model):
    prompts = {str(n): random_prompt(9 * n, seed=n, vocab_size=VOCAB_SIZE) for n in range(1, 6)}
    finished = {}
    for key, prompt in prompts.items():
        engine.add_request(key, prompt, GREEDY)
        for output in engine.step() + engine.step():
            if output.finished:
                finished[output.request_id] = output
    finished |= drain(engine)
    for key, prompt in prompts.items():
        assert finished[key].outputs[0].token_ids == alone(model, prompt)


@pytest.mark.parametrize("at_step", range(0, 11, 2))
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_abort_leaves_the_others_alone(folder, model, victim, at_step):
    engine = LLMEngine(model=folder, **{**SETTINGS, "max_num_seqs": 2}, skip_tokenizer_init=True)
    trunk = random_prompt(40, seed=0, vocab_size=VOCAB_SIZE)
    prompts = {str(n): [*trunk[:36], n] for n in range(3)}
    for key, prompt in prompts.items():
        engine.add_request(key, prompt, GREEDY)
    finished = {}
    for _ in range(at_step):
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    key = str(victim)
    output = engine.abort_request(key)
    if output is None:
        assert key in finished, "only what has finished cannot be aborted"
    else:
        assert output.finished and output.outputs[0].finish_reason == "abort"
        count = len(output.outputs[0].token_ids)
        assert output.outputs[0].token_ids == alone(model, prompts[key])[:count]
        assert count < 8
    finished |= drain(engine)
    for each, prompt in prompts.items():
        if each != key or output is None:
            assert finished[each].outputs[0].token_ids == alone(model, prompt)
    assert (key in finished) == (output is None)
    assert engine.abort_request(key) is None and engine.abort_request("nobody") is None
    assert_idle(engine)


def test_an_aborted_request_shows_the_text_it_had(llm, engine):
    scripted(llm, MULTIBYTE)
    engine.add_request("a", [1], SamplingParams(max_tokens=50), stream=False)
    for _ in range(20):
        engine.step()
    (completion,) = engine.abort_request("a").outputs
    assert completion.text == engine.tokenizer.decode(completion.token_ids) != ""


def test_requests_of_others_are_left_alone(llm, engine, model):
    """LLM uses an engine that may have been given requests directly."""
    engine.add_request("mine", [4, 5, 6], replace(GREEDY, max_tokens=60))
    assert tokens_of(run(llm, [[1, 2, 3]])) == [alone(model, [1, 2, 3])]
    assert engine.is_serving("mine")
    assert drain(engine)["mine"].outputs[0].token_ids == alone(model, [4, 5, 6], 60)


# ---------------------------------------------------------------------------- when a step fails


@pytest.mark.parametrize("policy", ["prefill_first", "mixed"])
@pytest.mark.parametrize("at_step", [0, 1, 2, 5, 9])
def test_a_step_that_fails_loses_nobody(folder, model, at_step, policy):
    """Requests in every state when the KV cache is scribbled over: all come out right."""
    engine = LLMEngine(
        model=folder,
        skip_tokenizer_init=True,
        **{**SETTINGS, "max_num_seqs": 3, "max_num_batched_tokens": 24},
        policy=policy,
    )
    trunk = random_prompt(40, seed=1, vocab_size=VOCAB_SIZE)
    prompts = {str(n): [*trunk[: 8 * n], n] for n in range(6)}
    for key, prompt in prompts.items():
        engine.add_request(key, prompt, GREEDY)
    fail_once(engine, at_step)
    finished, failures = {}, 0
    while engine.has_unfinished_requests:
        try:
            outputs = engine.step()
        except RuntimeError as error:
            assert str(error) == "the device caught fire"
            failures += 1
            assert engine.block_manager.num_held == 0
            continue
        finished |= {output.request_id: output for output in outputs if output.finished}
    assert failures == 1
    for key, prompt in prompts.items():
        assert finished[key].outputs[0].token_ids == alone(model, prompt)
    assert_idle(engine)


def test_generate_that_fails_leaves_the_engine_clean(llm, engine, model):
    stream = llm.stream([9, 8, 7], replace(GREEDY, max_tokens=15))
    next(stream)
    fail_once(engine, 2)
    with pytest.raises(RuntimeError, match="caught fire"):
        run(llm, [[1, 2, 3], [4] * 50])
    # Its own requests are gone; the stream is not, and its tokens are right.
    assert tokens_of(run(llm, [[1, 2, 3]])) == [alone(model, [1, 2, 3])]
    assert list(stream)[-1].outputs[0].token_ids == alone(model, [9, 8, 7], 15)


def test_an_interrupted_generate_leaves_the_engine_clean(llm, engine, model):
    right = engine.runner.run
    left = [4]

    def run_until_interrupted(step):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return right(step)

    engine.runner.run = run_until_interrupted
    with pytest.raises(KeyboardInterrupt):
        run(llm, [[1, 2, 3], [4] * 50])
    assert_idle(engine)
    assert tokens_of(run(llm, [[1, 2, 3]])) == [alone(model, [1, 2, 3])]


# ---------------------------------------------------------------------------- the end


def test_context_manager(folder):
    with LLM(folder, **SETTINGS) as llm:
        assert len(run(llm, [1, 2])[0].outputs[0].token_ids) == 8
    assert llm.engine.runner is None
    with pytest.raises(ZeroDivisionError), LLM(folder, **SETTINGS) as llm:
        _ = 1 / 0
    assert llm.engine.runner is None


@pytest.mark.parametrize("knot", [None, "runner", "model", "cache"])
def test_shutdown_frees_all_that_is_large(folder, monkeypatch, knot):
    """Without a search for garbage, unless somebody has tied it into a knot; frozen or not."""
    engine = OverlappingEngine(model=folder, num_kv_blocks=4)
    large = {
        "runner": engine.runner,
        "model": engine.runner.model,
        "cache": engine.runner.cache,
    }
    if knot is None:
        monkeypatch.setattr(gc, "collect", pytest.fail)
    else:
        large[knot].knot = [large[knot]]
    parts = {name: weakref.ref(part) for name, part in large.items()}
    del large
    gc.freeze()
    engine.shutdown()
    assert [name for name, part in parts.items() if part() is not None] == []


def test_after_shutdown(folder):
    llm = LLM(folder, **SETTINGS)
    stream = llm.stream([1, 2], replace(GREEDY, max_tokens=50))
    next(stream)
    llm.shutdown()
    llm.shutdown()
    assert_idle(llm.engine)
    assert llm.stats.finish_reasons == {"abort": 1}
    closed = pytest.raises(RuntimeError, match="has been shut down; build a new one")
    with closed:
        next(stream)
    with closed:
        run(llm, [1, 2])
    with closed:
        next(llm.stream([1, 2]))
    with closed:
        llm.engine.step()
    with closed:
        llm.engine.add_request("a", [1])


def test_two_engines_do_not_disturb_each_other(folder, model):
    first, second = (LLM(folder, **SETTINGS) for _ in range(2))
    stream = first.stream([1, 2, 3], GREEDY)
    next(stream)
    assert tokens_of(run(second, [[4, 5]])) == [alone(model, [4, 5])]
    second.shutdown()
    assert list(stream)[-1].outputs[0].token_ids == alone(model, [1, 2, 3])


# ---------------------------------------------------------------------------- detokenizer


@pytest.fixture(scope="module", params=["our bytes", "embedded model"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "our bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def grow(tokenizer: Any, token_ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The text after each token, and at last after the end."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    texts = []
    for count in range(1, len(token_ids) + 1):
        detokenizer.update(token_ids[:count], finished=False)
        texts.append(detokenizer.text)
    detokenizer.update(token_ids, finished=True)
    return [*texts, detokenizer.text]


@pytest.mark.parametrize(
    "text", [MULTIBYTE, "🙂🙂🙂", "分页", " a  b\n\n c", "e\u0301 \u200d ﬁ", "\ufeffx"]
)
def test_text_grows_by_whole_characters(tokenizer, text):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(token_ids) == text
    texts = grow(tokenizer, token_ids)
    assert texts[-1] == text
    for each in texts:
        assert text.startswith(each)
    deltas = [after[len(before) :] for before, after in pairwise(["", *texts])]
    assert "".join(deltas) == text


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.text(alphabet="ab 🙂é分\u0301\n", max_size=12))
def test_any_text(text):
    tokenizer = BYTES
    token_ids = tokenizer.encode(text)
    texts = grow(tokenizer, token_ids)
    assert texts[-1] == text and all(text.startswith(each) for each in texts)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30))
def test_any_tokens(token_ids):
    """A random model utters bytes that are no text: the end is what decoding all at once gives."""
    whole = BYTES.decode(token_ids, skip_special_tokens=True)
    texts = grow(BYTES, token_ids)
    assert texts[-1] == whole
    for before, after in pairwise(texts):
        assert after.startswith(before)
    at_once = IncrementalDetokenizer(BYTES)
    at_once.update(token_ids, finished=True)
    assert at_once.text == whole


BYTES = byte_tokenizer()


def test_tokens_whose_text_depends_on_the_one_before():
    tokenizer = word_tokenizer()
    token_ids = tokenizer.encode(SENTENCE)
    pieces = [tokenizer.decode([token]) for token in token_ids]
    assert "".join(pieces) != SENTENCE == tokenizer.decode(token_ids), "alone, they lose spaces"
    texts = grow(tokenizer, token_ids)
    assert texts[-1] == SENTENCE and all(SENTENCE.startswith(text) for text in texts)


def test_a_character_that_is_never_completed():
    token_ids = BYTES.encode("a🙂")[:-1]
    texts = grow(BYTES, token_ids)
    assert set(texts[:-1]) == {"a"}, "not shown while it may still be completed"
    assert texts[-1].startswith("a" + REPLACEMENT)


def test_special_tokens_are_no_text():
    end = BYTES.convert_tokens_to_ids(END)
    token_ids = [*BYTES.encode("one"), end, *BYTES.encode(" two")]
    assert grow(BYTES, token_ids)[-1] == "one two"
    assert grow(BYTES, [end])[-1] == ""


def test_a_stop_string_in_many_bytes():
    """And whatever comes after it is no longer part of the text."""
    texts = grow(BYTES, BYTES.encode("ab🙂分cd"), stop=("🙂分",))
    assert texts[-1] == texts[-2] == "ab"
    assert "ab🙂" in texts, "the first character may stand alone"
