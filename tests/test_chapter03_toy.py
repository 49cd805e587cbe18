"""Chapter 3's toy, whose every number is in the text: attention by hand, and a cache of 16 rows."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minivllm.attention.naive import (
    CachedNaiveAttention,
    ContiguousKVCache,
    NaiveAttention,
    generate_with_cache,
    naive_attention,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]
toy = importlib.import_module("chapters.chapter03_naive_attention.toy")
memory = importlib.import_module("chapters.chapter03_naive_attention.memory")


def toy_cache() -> ContiguousKVCache:
    sizes = SimpleNamespace(num_layers=toy.NUM_LAYERS, num_kv_heads=2, head_size=2)
    return ContiguousKVCache(sizes, toy.NUM_ROWS, toy.MAX_LEN, dtype=torch.float32, device="cpu")


def assert_toy(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    rounded = ours.round(decimals=3)
    assert torch.allclose(ours, expected, atol=1e-4), (
        f"{what}\nis        {rounded.tolist()},\nshould be {expected.tolist()}"
    )


def test_toy_dot_products() -> None:
    assert torch.equal(toy.ASKING @ toy.KEYS.T, toy.DOTS)


def test_naive_attention_on_the_toy() -> None:
    """With one-hot values, here two keys at a time, the output is the weights themselves."""
    for keys in (slice(0, 2), slice(2, 4)):
        one_hot = torch.eye(4)[:, None, keys].expand(-1, 2, -1)
        weights = naive_attention(toy.Q, toy.K, one_hot, toy.SCALE)[:, 0]
        assert_toy(weights, toy.WEIGHTS[:, keys], f"what head 0 gives keys {keys.start} and on")
    out = naive_attention(toy.Q, toy.K, toy.V, toy.SCALE)
    for head in range(4):
        assert_toy(out[:, head], toy.OUT[:, head], f"the output of query head {head}")


def test_naive_attention_of_the_toy_batch() -> None:
    q, k, v, expected = (tensor[toy.BATCH] for tensor in (toy.Q, toy.K, toy.V, toy.OUT))
    out = NaiveAttention(toy.CU_SEQLENS, toy.SCALE)(0, q, k, v)
    assert_toy(out, expected, "the output of the two sequences")


def test_cached_attention_on_the_toy() -> None:
    """Tokens 0 to 2 of the first sequence with the second one; then token 3 alone."""
    cache = toy_cache()
    first = toy.BATCH[[0, 1, 2, 4, 5]]
    prefill = CachedNaiveAttention(cache, [0, 1], [0, 0], [0, 3, 5], toy.SCALE)
    out = prefill(0, toy.Q[first], toy.K[first], toy.V[first])
    assert_toy(out, toy.OUT[first], "the prefill")
    decode = CachedNaiveAttention(cache, [0], [3], [0, 1], toy.SCALE)
    out = decode(0, toy.Q[3:], toy.K[3:], toy.V[3:])
    assert_toy(out, toy.OUT[3:], "token 3, decoded from the cache")
    filled = (cache.k[0] != 0).flatten(2).any(dim=2)
    assert filled.sum(dim=1).tolist() == [4, 2], f"rows 0 and 1 hold tokens at {filled.tolist()}"


def test_toy_cache_reserves_512_bytes_and_uses_192() -> None:
    cache = toy_cache()
    assert toy.BYTES_PER_TOKEN == 32
    assert cache.num_bytes == 512 == toy.NUM_ROWS * toy.MAX_LEN * toy.BYTES_PER_TOKEN
    assert toy.CU_SEQLENS[-1] * toy.BYTES_PER_TOKEN == 192


@pytest.mark.parametrize(
    ("name", "bytes_per_token"), [("Qwen3-0.6B", 112 * 1024), ("Qwen3-8B", 144 * 1024)]
)
def test_bytes_per_token(name: str, bytes_per_token: int) -> None:
    assert memory.bytes_per_token(memory.MODELS[name]) == bytes_per_token


def test_bytes_per_token_are_those_of_the_cache() -> None:
    model = memory.MODELS["Qwen3-0.6B"]
    sizes = SimpleNamespace(num_layers=28, num_kv_heads=8, head_size=128)
    cache = ContiguousKVCache(sizes, 2, 3, dtype=torch.bfloat16, device="meta")
    assert cache.num_bytes == 2 * 3 * memory.bytes_per_token(model)


def test_workload_and_its_waste() -> None:
    """A row is reserved for as long as its sequence runs, and fills by one token a step."""
    assert memory.share_used([(3, 1)], max_len=8) == pytest.approx(3 / 8)
    # Holds 3, then 4 tokens; the last token that comes out is never stored.
    assert memory.share_used([(3, 2)], max_len=8) == pytest.approx(3.5 / 8)
    assert memory.share_used([(3, 2), (2, 4)], max_len=8) == pytest.approx(
        (3 + 4 + 2 + 3 + 4 + 5) / (6 * 8)
    )
    workload = memory.workload()
    assert len(workload) == 256
    assert all(100 <= size <= 1024 for pair in workload for size in pair)


def test_generate_with_cache_refuses_what_the_model_has_no_positions_for() -> None:
    model = SimpleNamespace(config=SimpleNamespace(max_positions=16))
    with pytest.raises(ValueError, match=r"12 tokens.* max_tokens=6 need 17 .* model has 16"):
        list(generate_with_cache(model, [1] * 12, 6))
