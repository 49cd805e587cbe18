"""Chapter 3: attention written out, many sequences laid end to end, and a contiguous KV cache.

The oracle for attention is the formula in float64, one query at a time; for the cache it is the
same model without one, and transformers.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import (
    oracle_greedy,
    oracle_logits,
    random_prompt,
    relative_error,
    save_checkpoint,
    tiny_llama,
    tiny_qwen3,
)
from torch import nn
from transformers import PreTrainedModel

from minivllm.attention.naive import (
    CachedNaiveAttention,
    ContiguousKVCache,
    NaiveAttention,
    causal_mask,
    generate_with_cache,
    naive_attention,
)
from minivllm.models.loader import load_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster without a second thread to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, PreTrainedModel]:
    """One checkpoint in our model and in transformers'."""
    theirs = tiny_qwen3(seed=1, num_hidden_layers=3)
    return load_model(save_checkpoint(theirs, tmp_path_factory.mktemp("pair"))), theirs


def random_qkv(
    num_queries: int, context_len: int, num_heads: int, num_kv_heads: int, head_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_queries, num_heads, head_size, generator=generator)
    k, v = torch.randn(2, context_len, num_kv_heads, head_size, generator=generator)
    return q, k, v


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """The definition, one query of one head at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for index in range(len(q)):
        sees = len(k) - len(q) + index + 1
        for head in range(q.shape[1]):
            scores = k[:sees, head // group] @ q[index, head] * scale
            out[index, head] = scores.softmax(dim=0) @ v[:sees, head // group]
    return out


# ---------------------------------------------------------------------------- attention


def test_causal_mask() -> None:
    mask = causal_mask(4, 4)
    assert mask.dtype == torch.bool, f"the mask is {mask.dtype}; True means: may look"
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert mask.int().tolist() == expected, f"query i sees keys 0 to i:\n{mask.int()}"


def test_causal_mask_of_the_last_queries() -> None:
    """Two new tokens after three that are cached: they stand at positions 3 and 4."""
    mask = causal_mask(2, 5).int().tolist()
    assert mask == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], (
        f"the queries are the last of the context, so the first sees 4 keys: {mask}"
    )
    assert causal_mask(1, 5).all(), "a single new token sees the whole context"


def test_naive_attention() -> None:
    q, k, v = random_qkv(7, 7, 2, 2, 16, seed=0)
    out = naive_attention(q, k, v, 0.25)
    assert out.shape == q.shape, f"the output has shape {tuple(out.shape)}, expected [Q, H, D]"
    error = relative_error(out, exact_attention(q, k, v, 0.25))
    assert error < 1e-5, f"softmax(q k^T * scale) v is off by {error:.2g}"


def test_naive_attention_first_token_sees_itself_alone() -> None:
    q, k, v = random_qkv(3, 3, 2, 2, 8, seed=1)
    out = naive_attention(q, k, v, 1.0)
    assert torch.allclose(out[0], v[0], atol=1e-6), "one key: its weight is 1, the output its value"
    k[1:], v[1:] = 50.0, -50.0
    again = naive_attention(q, k, v, 1.0)
    assert torch.equal(again[0], out[0]), "the first token must not see those after it"


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 2), (5, 1), (3, 3)])
def test_naive_attention_grouped_query(num_heads: int, num_kv_heads: int) -> None:
    q, k, v = random_qkv(6, 6, num_heads, num_kv_heads, 8, seed=2)
    out = naive_attention(q, k, v, 0.3)
    expected = exact_attention(q, k, v, 0.3)
    for head in range(num_heads):
        error = relative_error(out[:, head], expected[:, head])
        assert error < 1e-5, (
            f"query head {head} is off by {error:.2g}; with {num_heads} query and {num_kv_heads} "
            f"KV heads it reads KV head {head * num_kv_heads // num_heads}"
        )


@pytest.mark.parametrize("num_queries", [1, 3, 9])
def test_naive_attention_of_the_last_queries(num_queries: int) -> None:
    q, k, v = random_qkv(num_queries, 9, 4, 2, 8, seed=3)
    error = relative_error(naive_attention(q, k, v, 0.3), exact_attention(q, k, v, 0.3))
    assert error < 1e-5, f"{num_queries} queries at the end of 9 tokens: off by {error:.2g}"


def test_naive_attention_survives_large_scores() -> None:
    """A softmax that does not subtract the maximum overflows here."""
    q, k, v = random_qkv(5, 5, 1, 1, 8, seed=4)
    out = naive_attention(100 * q, 100 * k, v, 1.0)
    assert out.isfinite().all()
    assert relative_error(out, exact_attention(100 * q, 100 * k, v, 1.0)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_naive_attention_in_half_precision(dtype: torch.dtype) -> None:
    """Scores and weights are rounded once each; a softmax in half precision adds more."""
    q, k, v = (tensor.to(dtype) for tensor in random_qkv(128, 128, 4, 2, 32, seed=5))
    q *= 4
    out = naive_attention(q, k, v, 32**-0.5)
    assert out.dtype == dtype, f"the dtype of q must be kept, not {out.dtype}"
    exact = exact_attention(q, k, v, 32**-0.5)
    error = (out.double() - exact).norm() / exact.norm() / torch.finfo(dtype).eps
    assert error < 0.95, f"off by {error:.2f} roundings: take the softmax in float32"


def test_naive_attention_refuses_what_does_not_fit() -> None:
    q, k, v = random_qkv(3, 3, 4, 3, 8, seed=6)
    with pytest.raises(ValueError, match=r"4 heads.* 3 of k"):
        naive_attention(q, k, v, 1.0)
    q, k, v = random_qkv(5, 3, 4, 2, 8, seed=6)
    with pytest.raises(ValueError, match=r"5 tokens.* only 3"):
        naive_attention(q, k, v, 1.0)


def test_naive_attention_of_many_sequences() -> None:
    """Three sequences of 4, 1 and 3 tokens end to end, as if each were alone."""
    q, k, v = random_qkv(8, 8, 4, 2, 8, seed=7)
    out = NaiveAttention([0, 4, 5, 8], 0.3)(0, q, k, v)
    assert out.shape == q.shape
    for start, end in ((0, 4), (4, 5), (5, 8)):
        alone = exact_attention(q[start:end], k[start:end], v[start:end], 0.3)
        error = relative_error(out[start:end], alone)
        assert error < 1e-5, f"tokens {start} to {end - 1} must see each other and no one else"


@torch.inference_mode()
def test_model_with_naive_attention_equals_transformers(
    pair: tuple[nn.Module, PreTrainedModel],
) -> None:
    """Sequences of 5, 1, 33 and 12 tokens in one flattened batch, each against its own oracle."""
    ours, theirs = pair
    prompts = [random_prompt(length, seed=length) for length in (5, 1, 33, 12)]
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0).tolist()
    input_ids = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    attend = NaiveAttention([0, *ends], ours.config.head_size**-0.5)
    logits = ours.compute_logits(ours(input_ids, positions, attend))
    for prompt, end in zip(prompts, ends, strict=True):
        error = relative_error(logits[end - len(prompt) : end], oracle_logits(theirs, prompt))
        assert error < 1e-5, f"the sequence of {len(prompt)} tokens is off by {error:.2g}"


# ---------------------------------------------------------------------------- the cache


def new_cache(model: nn.Module, num_rows: int = 2, max_len: int = 8) -> ContiguousKVCache:
    return ContiguousKVCache(model.config, num_rows, max_len, dtype=torch.float32, device="cpu")


def test_contiguous_cache(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    cache = new_cache(pair[0])
    assert cache.k.shape == cache.v.shape == (3, 2, 8, 2, 32), "[layers, rows, max_len, G, D]"
    _, k, v = random_qkv(1, 5, 4, 2, 32, seed=0)
    keys, values = cache.store(1, 0, 0, k[:3], v[:3])
    assert torch.equal(keys, k[:3]) and torch.equal(values, v[:3])
    keys, values = cache.store(1, 0, 3, k[3:], v[3:])
    assert torch.equal(keys, k), "after a second store the keys of the first must still be there"
    assert torch.equal(values, v), (
        "after a second store the values of the first must still be there"
    )
    assert keys.data_ptr() == cache.k[1, 0].data_ptr(), "store returns views, not copies"
    for name, tensor in (("k", cache.k), ("v", cache.v)):
        tensor = tensor.clone()
        tensor[1, 0, :5] = 0
        assert not tensor.any(), f"store wrote {name} outside layer 1, row 0, positions 0 to 4"


def test_contiguous_cache_takes_its_memory_at_once(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    """2 (k and v) * 3 layers * 2 rows * 8 tokens * 2 heads * 32 numbers * 4 bytes."""
    assert new_cache(pair[0]).num_bytes == 2 * 3 * 2 * 8 * 2 * 32 * 4
    half = ContiguousKVCache(pair[0].config, 2, 8, dtype=torch.bfloat16, device="cpu")
    assert half.num_bytes == 2 * 3 * 2 * 8 * 2 * 32 * 2


def test_contiguous_cache_that_is_full(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    cache = new_cache(pair[0])
    _, k, v = random_qkv(1, 3, 4, 2, 32, seed=0)
    cache.store(0, 0, 5, k, v)
    with pytest.raises(ValueError, match=r"9 tokens.*max_len=8"):
        cache.store(0, 0, 6, k, v)


def test_cached_attention_stores_and_attends(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    """Row 1 gets 3 tokens and row 0 one; then row 0 two more and row 1 one more."""
    cache = new_cache(pair[0])
    q, k, v = random_qkv(7, 7, 4, 2, 32, seed=1)
    first = CachedNaiveAttention(cache, [1, 0], [0, 0], [0, 3, 4], 0.3)(2, q[:4], k[:4], v[:4])
    second = CachedNaiveAttention(cache, [0, 1], [1, 3], [0, 2, 3], 0.3)(2, q[4:], k[4:], v[4:])
    row1, row0 = [0, 1, 2, 6], [3, 4, 5]
    out = torch.cat((first, second))
    for name, tokens in (("row 0", row0), ("row 1", row1)):
        expected = exact_attention(q[tokens], k[tokens], v[tokens], 0.3)
        error = relative_error(out[tokens], expected)
        assert error < 1e-5, f"{name}: the new tokens must see all that the row holds, and no more"


@torch.inference_mode()
def test_model_with_cache_equals_transformers(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    """Two sequences: prompts in chunks, then decoding together, the second one step behind."""
    ours, theirs = pair
    a, b = random_prompt(14, seed=1), random_prompt(9, seed=2)
    cache = new_cache(ours, num_rows=3, max_len=16)
    done = {2: 0, 0: 0}
    tokens = {2: a, 0: b}
    logits: dict[int, list[torch.Tensor]] = {2: [], 0: []}
    for step in ({2: 6}, {2: 4, 0: 5}, {0: 1, 2: 1}, {2: 1, 0: 1}, {0: 2, 2: 2}):
        rows, ends, ids, positions = list(step), [0], [], []
        for row, count in step.items():
            ids += tokens[row][done[row] : done[row] + count]
            positions += range(done[row], done[row] + count)
            ends.append(len(ids))
        starts = [done[row] for row in rows]
        attend = CachedNaiveAttention(cache, rows, starts, ends, ours.config.head_size**-0.5)
        out = ours.compute_logits(ours(torch.tensor(ids), torch.tensor(positions), attend))
        for index, row in enumerate(rows):
            logits[row].append(out[ends[index] : ends[index + 1]])
            done[row] += step[row]
    assert done == {2: 14, 0: 9}
    for row in (2, 0):
        error = relative_error(torch.cat(logits[row]), oracle_logits(theirs, tokens[row]))
        assert error < 1e-5, f"row {row} is off by {error:.2g}"


def test_generate_with_cache_equals_transformers_for_100_prompts(
    pair: tuple[nn.Module, PreTrainedModel],
) -> None:
    ours, theirs = pair
    prompts = [random_prompt(1 + index % 12, seed=index) for index in range(100)]
    for prompt, expected in zip(prompts, oracle_greedy(theirs, prompts, 8), strict=True):
        assert list(generate_with_cache(ours, prompt, 8)) == expected, f"prompt {prompt}"


def test_generate_with_cache_for_llama(tmp_path_factory: pytest.TempPathFactory) -> None:
    theirs = tiny_llama(seed=2)
    ours = load_model(save_checkpoint(theirs, tmp_path_factory.mktemp("llama")))
    prompt = random_prompt(9, seed=4)
    assert list(generate_with_cache(ours, prompt, 20)) == oracle_greedy(theirs, [prompt], 20)[0]


def test_generate_with_cache_runs_each_token_once(pair: tuple[nn.Module, PreTrainedModel]) -> None:
    """A prompt of 6 and 5 new tokens: one pass over 6 tokens, then 4 over a single one."""
    ours, _ = pair
    lengths = []
    handle = ours.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    tokens = list(generate_with_cache(ours, random_prompt(6, seed=5), 5))
    handle.remove()
    assert len(tokens) == 5
    assert lengths == [6, 1, 1, 1, 1], f"the forward passes ran over {lengths} tokens"


def test_generate_with_cache_stops(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_qwen3(seed=1), tmp_path)
    model, prompt = load_model(folder), random_prompt(7, seed=3)
    free = list(generate_with_cache(model, prompt, 10))
    assert len(free) == 10, "without end tokens, generation runs to max_tokens"
    model = load_model(folder, dataclasses.replace(model.config, eos_token_ids=(free[4],)))
    stopped = list(generate_with_cache(model, prompt, 10))
    assert stopped == free[: free.index(free[4]) + 1], "the end token is the last that is yielded"
    assert list(generate_with_cache(model, prompt, 0)) == []
    with pytest.raises(ValueError, match="prompt_token_ids is empty"):
        list(generate_with_cache(model, [], 4))
