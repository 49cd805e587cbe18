"""Chapter 9's table of threads, and the whole engine on it."""

import time

import pytest
import torch

from chapters.chapter09_tensor_parallelism import threads
from chapters.chapter09_tensor_parallelism.crew import talk
from chapters.chapter09_tensor_parallelism.threads import RanksApart, ThreadGroup, on_ranks

# ---------------------------------------------------------------------------- threads at one table


def test_ranks_exchange_and_the_table_writes_it_down():
    def work(group: ThreadGroup):
        mine = torch.tensor([1.0, 10.0]) * (group.rank + 1)
        every = group.all_gather(mine)
        return group.all_reduce(mine).tolist(), every.tolist(), group.least(7 - group.rank)

    found, meeting = on_ranks(3, work)
    assert found == [([6, 60], [[1, 10], [2, 20], [3, 30]], 5)] * 3
    assert [(w.kind, w.nbytes) for w in meeting.words][:2] == [("all_gather", 8), ("all_reduce", 8)]


def test_a_rank_that_skips_a_call_is_found_at_once():
    def work(group: ThreadGroup):
        for number in range(3):
            if (group.rank, number) != (1, 2):
                group.all_reduce(torch.ones(2))

    began = time.monotonic()
    with pytest.raises(RanksApart, match=r"rank 0 waits in all_reduce \[2\], and rank 1 has ended"):
        on_ranks(2, work)
    assert time.monotonic() - began < threads.LIMIT_SECONDS


def test_ranks_that_call_different_things_are_found_at_once():
    def work(group: ThreadGroup):
        if group.rank:
            group.named("head").all_gather(torch.ones(2))
        else:
            group.named("o_proj").all_reduce(torch.ones(2))

    said = r"rank 0 in all_reduce \[2\] of o_proj, rank 1 in all_gather \[2\] of head"
    with pytest.raises(RanksApart, match=said):
        on_ranks(2, work)


def test_a_rank_that_computes_forever_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(threads, "LIMIT_SECONDS", 0.1)

    def work(group: ThreadGroup):
        if group.rank:
            time.sleep(0.3)
        else:
            group.all_reduce(torch.ones(1))

    with pytest.raises(RanksApart, match=r"rank 0 has waited 0 s in all_reduce \[1\]"):
        on_ranks(2, work)


def test_the_cause_is_raised_and_not_what_followed_from_it():
    def work(group: ThreadGroup):
        if group.rank:
            raise ValueError("rank 1's own")
        group.all_reduce(torch.ones(1))

    with pytest.raises(ValueError, match="rank 1's own"):
        on_ranks(2, work)


# ---------------------------------------------------------------------------- the engine on threads


def test_the_engine_says_two_words_a_layer_and_answers_as_on_one_rank():
    prompts = [list(range(10, 30)), [40, 41]]
    alone, two, four = (talk(size, prompts) for size in (1, 2, 4))
    assert two.answers == alone.answers == four.answers and all(alone.answers)
    assert len(alone.steps) == len(two.steps) == len(four.steps)
    for step in four.steps:
        names = [word.who for word in step.words]
        layers = [
            f"layers.{n}.{part}_proj" for n in range(4) for part in ("self_attn.o", "mlp.down")
        ]
        assert names == ["embed_tokens", *layers, "sampler"]
    tokens = [len(range(10, 30)) + 2, 2]
    for step, count in zip(two.steps, tokens, strict=False):
        assert step.words[0].shape == (count, 256), "a hidden state a token"
