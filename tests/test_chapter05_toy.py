"""Chapter 5's toy, whose every number is in the text, and what this chapter writes in PyTorch."""

import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import oracle_greedy, random_prompt, save_checkpoint, tiny_qwen3

from minivllm.attention.naive import naive_attention
from minivllm.attention.paged import (
    PagedBatch,
    PagedKVCache,
    paged_attention_loop,
    slots_of,
    store_kv,
)
from minivllm.attention.paged_split import attend_to_piece, merge_pieces, paged_decode_in_pieces
from minivllm.models.loader import load_model

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]
toy = importlib.import_module("chapters.chapter05_paged_attention.toy")
memory = importlib.import_module("chapters.chapter05_paged_attention.memory")
chapter03 = importlib.import_module("chapters.chapter03_naive_attention.memory")

NAN = float("nan")


def toy_batch() -> PagedBatch:
    """The newest token of A and of B, whose K and V are stored already."""
    last = [slots[-1] for slots in toy.SLOTS]
    return PagedBatch(
        input_ids=torch.zeros(2, dtype=torch.int64),
        positions=torch.tensor([5, 2]),
        slot_mapping=torch.tensor(last),
        cu_query_lens=torch.tensor([0, 1, 2], dtype=torch.int32),
        context=torch.tensor(toy.LENGTHS, dtype=torch.int32),
        block_tables=toy.block_tables(),
        query_lens=(1, 1),
        context_lens=tuple(toy.LENGTHS),
    )


def assert_toy(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert torch.allclose(ours, expected, atol=1e-4), (
        f"{what}\nis        {_shown(ours.tolist())},\nshould be {_shown(expected.tolist())}"
    )


def _shown(numbers: list | float) -> list | float:
    return [_shown(x) for x in numbers] if isinstance(numbers, list) else round(numbers, 3)


def assert_slots(table: list[int], start: int, end: int, block_size: int, right: list[int]) -> None:
    found = list(slots_of(table, start, end, block_size))
    assert found == right, (
        f"tokens {start} to {end - 1} of a sequence with table {table} and blocks of {block_size}\n"
        f"are said to lie in slots {found},\nshould be                {right}"
    )


# ---------------------------------------------------------------------------- slots, storing


def test_slots_of_the_toy() -> None:
    for table, length, right in zip(toy.TABLES, toy.LENGTHS, toy.SLOTS, strict=True):
        assert_slots(table, 0, length, toy.BLOCK_SIZE, right)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_slots_of_some_tokens(block_size: int) -> None:
    """A prompt, a chunk from the middle, a single token, none: the slots of the whole, cut out."""
    table = [5, 0, 9, 2]
    whole = [block * block_size + offset for block in table for offset in range(block_size)]
    for start, end in ((0, 4 * block_size), (block_size // 2, 3 * block_size), (2, 3), (1, 1)):
        assert_slots(table, start, end, block_size, whole[start:end])


def test_slots_of_a_table_longer_than_its_tokens() -> None:
    assert_slots([7, 3, 8, 1], 2, 5, 4, [30, 31, 12])


def test_store_kv_on_the_toy() -> None:
    k_cache, v_cache = toy.pool()
    k, v, slots = toy.new_tokens()
    store_kv(k, v, k_cache, v_cache, slots)
    for name, ours, right in zip("kv", (k_cache, v_cache), toy.filled_pool(), strict=True):
        for slot, (mine, wanted) in enumerate(
            zip(ours.flatten(0, 1), right.flatten(0, 1), strict=True)
        ):
            assert torch.equal(mine, wanted), (
                f"slot {slot} of {name}_cache\nholds       {mine.tolist()},\n"
                f"should hold {wanted.tolist()}"
            )


def test_store_kv_on_the_toy_with_padding() -> None:
    """Slot -1 is Python's last slot, unless somebody takes care."""
    k_cache, v_cache = toy.pool()
    k, v, _ = toy.new_tokens()
    store_kv(k[:2], v[:2], k_cache, v_cache, torch.tensor([3, -1]))
    for name, cache, new in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[3], new[0]), f"slot 3 of {name} should hold token 0"
        changed = (flat != toy.STALE).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert changed == [3], f"slots {changed} of {name} were written, should be [3]"


# ---------------------------------------------------------------------------- the loop


def test_loop_on_the_toy() -> None:
    k_cache, v_cache = toy.filled_pool()
    out = paged_attention_loop(toy.Q, k_cache, v_cache, toy_batch(), toy.SCALE)
    for seq, name in enumerate("AB"):
        for head in range(4):
            what = f"the output of query head {head} of sequence {name}"
            assert_toy(out[seq, head], toy.OUT[seq, head], what)


def test_loop_reads_no_slot_of_others() -> None:
    """NaN wherever the two sequences have no token: the rest of a block, blocks of nobody."""
    caches = [torch.full_like(cache, NAN) for cache in toy.pool()]
    k, v, slots = toy.new_tokens()
    for cache, new in zip(caches, (k, v), strict=True):
        cache.flatten(0, 1)[slots] = new
    out = paged_attention_loop(toy.Q, *caches, toy_batch(), toy.SCALE)
    assert not out.isnan().any(), "a slot without a token of the sequence got into the output"
    assert_toy(out, toy.OUT, "the output among NaN")


def test_loop_of_a_prompt_and_a_decode() -> None:
    """All of A's tokens at once, as in a prefill, and B's newest."""
    k_cache, v_cache = toy.filled_pool()
    batch = toy_batch()
    batch = PagedBatch(
        **{
            **vars(batch),
            "cu_query_lens": torch.tensor([0, 6, 7], dtype=torch.int32),
            "query_lens": (6, 1),
        }
    )
    q = torch.cat((toy.Q[:1].expand(6, -1, -1), toy.Q[1:]))
    expected = naive_attention(q[:6], toy.K, toy.V, toy.SCALE)
    out = paged_attention_loop(q, k_cache, v_cache, batch, toy.SCALE)
    assert_toy(out[:6], expected, "the output of A's six queries")
    assert_toy(out[6], toy.OUT[1], "the output of B's newest query")


@torch.inference_mode()
def test_model_on_pages_equals_transformers(tmp_path: Path) -> None:
    """Three requests at once, scattered over the pool; one ends early and its blocks are reused."""
    drive = importlib.import_module("chapters.chapter05_paged_attention.drive")
    theirs = tiny_qwen3(seed=1)
    model = load_model(save_checkpoint(theirs, tmp_path), device="cpu")
    prompts = [random_prompt(length, seed=length) for length in (5, 18, 33, 9)]
    expected = oracle_greedy(theirs, prompts, 12)
    # 13 blocks: less than the four need together.
    pages = drive.Pages(model, 13, 8)
    requests = [drive.Request(str(n), list(prompt)) for n, prompt in enumerate(prompts)]
    for _ in range(6):
        pages.step(requests[:3])
    pages.end(requests[1])
    running = [requests[0], requests[2], requests[3]]
    for _ in range(6):
        pages.step(running)
    for number, count in enumerate((12, 6, 12, 6)):
        assert requests[number].answer == expected[number][:count], (
            f"request {number} says {requests[number].answer},\n"
            f"transformers   {expected[number][:count]}"
        )


# ---------------------------------------------------------------------------- pieces


def test_pieces_of_the_toy() -> None:
    """A's first four keys, and its other two, as query heads 0 and 1 see them."""
    found = [
        attend_to_piece(toy.Q[0], toy.K[part], toy.V[part], toy.SCALE)
        for part in (slice(0, 4), slice(4, 6))
    ]
    for number, (out, lse) in enumerate(found):
        what = f"the output of query head 0 over piece {number}"
        assert_toy(out[0], toy.FOUND_IN_PIECES[number], what)
        what = f"the output of query head 2, on KV head 1, over piece {number}"
        assert_toy(out[2], -toy.FOUND_IN_PIECES[number], what)
        what = f"the softmax denominator of piece {number}, exp(lse)"
        assert_toy(lse[0].exp(), toy.DENOMINATORS[number], what)


def test_merge_of_the_toy() -> None:
    outs = torch.stack((toy.FOUND_IN_PIECES, toy.MEAN_IN_PIECES), dim=1)  # [P, H, D]
    denominators = torch.stack((toy.DENOMINATORS, torch.tensor([4.0, 2.0])), dim=1)
    merged = merge_pieces(outs, denominators.log())
    assert_toy(merged[0], toy.FOUND[0], "(6, 6) of weight 8 and (2, 10) of weight 24, merged,")
    assert_toy(merged[1], toy.MEAN[0], "(6, 10) of weight 4 and (3, 10) of weight 2, merged,")


def random_piece(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(6, 16, generator=generator)
    k, v = torch.randn(2, length, 3, 16, generator=generator)
    return q, k, v


def assert_near(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert ours.shape == expected.shape, f"{what} has shape {tuple(ours.shape)}"
    assert not ours.isnan().any(), f"{what}: {int(ours.isnan().sum())} numbers are NaN"
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{what}: the largest error is {error:.2g} of the largest number"


def test_piece_of_all_keys_is_attention() -> None:
    q, k, v = random_piece(37)
    out, lse = attend_to_piece(q, k, v, 0.3)
    assert_near(out, naive_attention(q[None], k, v, 0.3)[0], "a piece of all keys")
    scores = torch.einsum("hd,nhd->hn", q.double(), k.repeat_interleave(2, dim=1).double()) * 0.3
    assert_near(lse.double(), scores.exp().sum(dim=1).log(), "lse")


@pytest.mark.parametrize("cuts", [[0, 37], [0, 1, 37], [0, 16, 32, 37], [0, 20, 20, 37]])
def test_merge_does_not_depend_on_the_cuts(cuts: list[int]) -> None:
    """Among them a piece without keys."""
    q, k, v = random_piece(37)
    pieces = [attend_to_piece(q, k[a:b], v[a:b], 0.3) for a, b in itertools.pairwise(cuts)]
    outs, lses = zip(*pieces, strict=True)
    merged = merge_pieces(torch.stack(outs), torch.stack(lses))
    assert_near(merged, naive_attention(q[None], k, v, 0.3)[0], f"cut at {cuts}")


def test_piece_without_keys_weighs_nothing() -> None:
    q, k, v = random_piece(0)
    out, lse = attend_to_piece(q, k, v, 0.3)
    assert (out == 0).all(), "the output of a piece without keys should be zeros"
    assert (lse == float("-inf")).all(), f"lse of a piece without keys is {lse[0]}, should be -inf"
    some = attend_to_piece(*random_piece(5), 0.3)
    merged = merge_pieces(torch.stack((out, some[0])), torch.stack((lse, some[1])))
    assert_near(merged, some[0], "nothing and a piece")


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_merge_survives_large_scores(offset: float) -> None:
    """exp(1000) overflows and exp(-1000) is 0: only differences of lse may be raised."""
    outs = torch.tensor([[[6.0, 6]], [[2.0, 10]]])
    lses = toy.DENOMINATORS.log()[:, None] + offset
    assert_near(merge_pieces(outs, lses), torch.tensor([[3.0, 9]]), f"lse around {offset}")
    q, k, v = random_piece(20)
    out, lse = attend_to_piece(30 * q, 30 * k, v, 1.0)
    assert out.isfinite().all() and lse.isfinite().all(), "exp of a large score overflows"
    assert_near(out, naive_attention(30 * q[None], 30 * k, v, 1.0)[0], "large scores")


@pytest.mark.parametrize("piece_len", [1, 3, 4, 100])
def test_decode_in_pieces_on_the_toy(piece_len: int) -> None:
    out = paged_decode_in_pieces(
        toy.Q,
        *toy.filled_pool(),
        toy.block_tables(),
        torch.tensor(toy.LENGTHS),
        scale=toy.SCALE,
        piece_len=piece_len,
    )
    assert_toy(out, toy.OUT, f"the toy in pieces of {piece_len}")


def test_decode_in_pieces_of_a_padded_row() -> None:
    lengths = torch.tensor([6, 0])
    tables = toy.block_tables()
    tables[1] = -1
    arguments = (toy.Q, *toy.filled_pool(), tables, lengths)
    out = paged_decode_in_pieces(*arguments, scale=toy.SCALE, piece_len=4)
    assert_toy(out[0], toy.OUT[0], "sequence A")
    assert (out[1] == 0).all(), "a row without context should be zeros"


# ---------------------------------------------------------------------------- memory


def test_memory_of_one_request() -> None:
    """Prompts of 3 with 3 new tokens: 3, 4 and 5 tokens are held, in pages of 4 in 4, 4 and 8."""
    run = memory.film([(3, 3)], 4)
    assert (run.held, run.reserved, run.running) == ([3, 4, 5], [4, 4, 8], [1, 1, 1])
    assert run.used == pytest.approx(12 / 16)
    assert run.empty == pytest.approx(4 / 3)


def test_memory_in_rows_is_that_of_chapter_3() -> None:
    requests = chapter03.workload()
    for max_len in (2048, 40_960):
        expected = chapter03.share_used(requests, max_len)
        assert memory.film(requests, max_len).used == pytest.approx(expected)


def test_memory_a_token_is_that_of_the_pages() -> None:
    sizes = SimpleNamespace(num_layers=28, num_kv_heads=8, head_size=128)
    block = PagedKVCache.bytes_per_block(sizes, 64, torch.bfloat16)
    assert block == 64 * chapter03.bytes_per_token(chapter03.MODELS["Qwen3-0.6B"])


def test_pages_waste_half_a_block_a_request() -> None:
    """The last block of a request is half full on average, whatever its length."""
    requests = chapter03.workload()
    for block_size in (16, 64, 256):
        run = memory.film(requests, block_size)
        assert run.empty == pytest.approx((block_size - 1) / 2, rel=0.02)
