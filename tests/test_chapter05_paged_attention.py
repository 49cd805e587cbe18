"""Chapter 5, the PyTorch path: attention over K and V in pages.

The oracle is chapter 3's naive attention over the same K and V laid out in one piece. Every slot
that a batch has no business with holds large numbers, so reading one of them cannot pass.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.attention import paged_torch, paged_torch_decode
from minivllm.attention.naive import naive_attention
from minivllm.attention.paged import (
    PADDING_SLOT,
    PagedBatch,
    PagedKVCache,
    paged_attention_loop,
    store_kv,
)
from minivllm.attention.paged_torch import (
    TorchAttention,
    TorchPagedAttention,
    bind_torch_attention,
)
from minivllm.attention.paged_torch_decode import DecodeGroup
from minivllm.attention.paged_torch_prefill import PrefillGroup
from minivllm.models.config import ModelConfig

GARBAGE = 1e4
LAYERS = 2


def model_config(num_heads: int, num_kv_heads: int, head_size: int) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 32,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": head_size,
            "max_position_embeddings": 4096,
        }
    )


@dataclass
class Case:
    """A batch, the cache behind it, its q, k, v [T, ...], and what must come out [T, H, D]."""

    batch: PagedBatch
    cache: PagedKVCache
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    expected: torch.Tensor

    def run(self, layer: int = 1) -> torch.Tensor:
        attend = bind_torch_attention(self.cache, self.batch, self.scale)
        return attend(layer, self.q, self.k, self.v)


def make_case(
    lens: list[tuple[int, int]],
    *,
    shared: dict[int, tuple[int, int]] | None = None,
    gaps: int = 3,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """lens: (new tokens, context) of each sequence. Blocks lie in random order.

    shared: sequence -> (an earlier one, how many blocks it begins with). gaps: how many blocks
    more the pool has.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    tables: list[list[int]] = []
    needed = [-(-context // block_size) for _, context in lens]
    free = torch.randperm(sum(needed) + gaps, generator=generator).tolist()
    for count in needed:
        tables.append([free.pop() for _ in range(count)])
    config = model_config(num_heads, num_kv_heads, head_size)
    num_blocks = sum(needed) + gaps
    cache = PagedKVCache(config, num_blocks, block_size, dtype=dtype, device=device)
    cache.k.fill_(GARBAGE)
    cache.v.fill_(GARBAGE)

    def random(num_tokens: int, num: int) -> torch.Tensor:
        return torch.randn(num_tokens, num, head_size, generator=generator).to(device, dtype)

    scale = head_size**-0.5
    whole: list[tuple[torch.Tensor, torch.Tensor]] = []
    new: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    slots: list[int] = []
    expected = []
    for row, ((num_queries, context), table) in enumerate(zip(lens, tables, strict=True)):
        q = random(num_queries, num_heads)
        k, v = random(context, num_kv_heads), random(context, num_kv_heads)
        other, count = (shared or {}).get(row, (0, 0))
        if count:
            assert other < row and count * block_size <= context - num_queries
            table[:count] = tables[other][:count]
            k[: count * block_size] = whole[other][0][: count * block_size]
            v[: count * block_size] = whole[other][1][: count * block_size]
        whole.append((k, v))
        for position in range(context):
            block, offset = table[position // block_size], position % block_size
            if position < context - num_queries:
                cache.k[:, block, offset] = k[position]
                cache.v[:, block, offset] = v[position]
            else:
                slots.append(block * block_size + offset)
        new.append((q, k[context - num_queries :], v[context - num_queries :]))
        expected.append(naive_attention(q.float(), k.float(), v.float(), scale))
    q, k, v = (torch.cat(parts) for parts in zip(*new, strict=True))
    widest = max(needed)
    boundaries = [0]
    for num_queries, _ in lens:
        boundaries.append(boundaries[-1] + num_queries)
    batch = PagedBatch(
        input_ids=torch.zeros(len(q), dtype=torch.int64, device=device),
        positions=torch.cat([torch.arange(c - n, c) for n, c in lens]).to(device),
        slot_mapping=torch.tensor(slots, device=device),
        cu_query_lens=torch.tensor(boundaries, dtype=torch.int32, device=device),
        context=torch.tensor([c for _, c in lens], dtype=torch.int32, device=device),
        block_tables=torch.tensor(
            [table + [-1] * (widest - len(table)) for table in tables],
            dtype=torch.int32,
            device=device,
        ),
        query_lens=tuple(n for n, _ in lens),
        context_lens=tuple(c for _, c in lens),
    )
    return Case(batch, cache, q, k, v, scale, torch.cat(expected))


def assert_right(case: Case, out: torch.Tensor, tolerance: float = 2e-6) -> None:
    """tolerance: a share of the largest number expected."""
    assert out.shape == case.q.shape and out.dtype == case.q.dtype
    # Not torch.testing.assert_close, whose first call imports for seconds.
    error = (out.float() - case.expected).abs().max() / case.expected.abs().max()
    assert error <= tolerance


# Decodes, whole prompts, chunks, and all of them at once.
BATCHES = {
    "one decode": [(1, 40)],
    "first token ever": [(1, 1)],
    "decodes": [(1, 33), (1, 1), (1, 16), (1, 17), (1, 64)],
    "a prompt": [(37, 37)],
    "prompts of one length": [(20, 20), (20, 20), (20, 20)],
    "prompts of like length": [(17, 17), (32, 32), (25, 25)],
    "a chunk": [(10, 43)],
    "chunks of one length": [(8, 40), (8, 8), (8, 19)],
    "everything": [(1, 50), (16, 16), (1, 3), (7, 30), (2, 18), (1, 32), (40, 48)],
    "decodes first and last": [(1, 20), (5, 5), (1, 20)],
}


# ---------------------------------------------------------------------------- storing


def test_store_kv_writes_the_named_slots_and_no_others():
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    k_cache, v_cache = torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)
    store_kv(k, v, k_cache, v_cache, torch.tensor([6, 0, 3]))
    for cache, new in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[1, 2], new[0])
        assert torch.equal(cache[0, 0], new[1])
        assert torch.equal(cache[0, 3], new[2])
        assert cache.flatten(0, 1)[[1, 2, 4, 5, 7]].count_nonzero() == 0


def test_store_kv_leaves_padding_out():
    k, v = torch.ones(3, 1, 4), torch.ones(3, 1, 4)
    k_cache, v_cache = torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4)
    store_kv(k, v, k_cache, v_cache, torch.tensor([PADDING_SLOT, 1, PADDING_SLOT]))
    assert k_cache.flatten(0, 1)[:, 0, 0].tolist() == [0, 1, 0, 0]
    assert v_cache.flatten(0, 1)[:, 0, 0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_block_is_what_a_block_takes(dtype):
    config = model_config(4, 2, 32)
    cache = PagedKVCache(config, 5, 64, dtype=dtype, device="cpu")
    taken = (cache.k.nbytes + cache.v.nbytes) // 5
    assert PagedKVCache.bytes_per_block(config, 64, dtype) == taken
    assert cache.k.shape == (LAYERS, 5, 64, 2, 32)
    assert cache.k.count_nonzero() == cache.v.count_nonzero() == 0


# ---------------------------------------------------------------------------- attention


@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("gaps", [0, 200])
def test_pages_give_what_one_piece_gives(lens, gaps):
    """In a pool that is full, and scattered over one that is nearly empty."""
    case = make_case(lens, gaps=gaps)
    assert_right(case, case.run())


@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
def test_the_loop_gives_it_too(lens):
    case = make_case(lens)
    k_cache, v_cache = case.cache.k[0], case.cache.v[0]
    store_kv(case.k, case.v, k_cache, v_cache, case.batch.slot_mapping)
    assert_right(case, paged_attention_loop(case.q, k_cache, v_cache, case.batch, case.scale))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (16, 8), (6, 2)])
def test_head_counts_and_block_sizes(heads, block_size):
    case = make_case(BATCHES["everything"], heads=heads, block_size=block_size)
    assert_right(case, case.run())


@pytest.mark.parametrize("head_size", [16, 64, 80, 128])
def test_head_sizes(head_size):
    case = make_case(BATCHES["everything"], head_size=head_size)
    assert_right(case, case.run())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, tolerance):
    case = make_case(BATCHES["everything"], dtype=dtype)
    assert_right(case, case.run(), tolerance)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 1, 1, 2, 5, 16, 17, 40]), st.integers(0, 50)).map(
            lambda pair: (pair[0], sum(pair))
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([16, 32]),
    st.integers(0, 5),
)
def test_any_batch(lens, block_size, seed):
    case = make_case(lens, block_size=block_size, seed=seed)
    assert_right(case, case.run())


# Rows that begin with the same blocks, enough of them that treating the prefix apart pays.
SHARED = {
    "one prefix": ([(1, 50 + i) for i in range(12)], {i: (0, 3) for i in range(1, 12)}),
    "one prefix, some alone": (
        [(1, 90 + i) if i % 3 else (1, 10 + i) for i in range(16)],
        {i: (1, 4) for i in range(2, 16) if i % 3},
    ),
    "two prefixes": (
        [(1, 70 + i) for i in range(8)] + [(1, 101)] * 8,
        {**{i: (0, 3) for i in range(1, 8)}, **{i: (8, 6) for i in range(9, 16)}},
    ),
    "a nested prefix": (
        [(1, 120)] * 8,
        {**{i: (0, 3) for i in range(1, 4)}, **{i: (0, 7) for i in range(4, 8)}},
    ),
    "with chunks between": (
        [(1, 49), (30, 30)] * 9,
        {2 * i: (0, 3) for i in range(1, 9)},
    ),
    "nothing of its own but the newest token": ([(1, 65)] * 9, {i: (0, 4) for i in range(1, 9)}),
}


def make_groups(case: Case) -> list[DecodeGroup | PrefillGroup]:
    return TorchPagedAttention(case.cache, case.batch, case.scale).groups


def num_shared(case: Case) -> int:
    """How many runs of blocks are read once for several rows."""
    return sum(len(group.shared) for group in make_groups(case) if isinstance(group, DecodeGroup))


@pytest.mark.parametrize("spared", [1, 256])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("lens, shared", SHARED.values(), ids=SHARED)
def test_shared_prefixes(monkeypatch, lens, shared, heads, spared):
    """spared: from how many tokens on it pays to treat a prefix apart."""
    monkeypatch.setattr(paged_torch_decode, "MIN_TOKENS_SPARED", spared)
    case = make_case(lens, shared=shared, heads=heads)
    assert num_shared(case) > 0
    assert_right(case, case.run())


def test_prefixes_of_prefixes_are_shared_too(monkeypatch):
    monkeypatch.setattr(paged_torch_decode, "MIN_TOKENS_SPARED", 1)
    lens, shared = SHARED["a nested prefix"]
    case = make_case(lens, shared=shared)
    # All eight have 3 blocks in common; the first and four others have 4 blocks more.
    assert num_shared(case) == 2
    assert_right(case, case.run())


@pytest.mark.parametrize("spared, counts", [(48, [3, 4, 4]), (49, [7, 7]), (256, [7, 7])])
def test_a_prefix_of_few_prefixes_is_read_by_each_of_them(monkeypatch, spared, counts):
    """Two runs of eight rows, all of which begin with the same 3 blocks: 48 tokens."""
    monkeypatch.setattr(paged_torch_decode, "MIN_TOKENS_SPARED", spared)
    shared = {i: (0, 7) for i in range(1, 8)} | {8: (0, 3)} | {i: (8, 7) for i in range(9, 16)}
    case = make_case([(1, 115 + i) for i in range(16)], shared=shared)
    (group,) = make_groups(case)
    assert sorted(each.count for each in group.shared) == counts
    assert_right(case, case.run())


def test_what_is_shared_is_read_once():
    lens, shared = SHARED["two prefixes"]
    case = make_case(lens, shared=shared)
    (group,) = make_groups(case)
    assert sorted(each.count for each in group.shared) == [3, 6]
    assert len(group.shared_blocks) == len(set(group.shared_blocks.tolist())) == 9
    # Of its own, each row has at most two blocks left.
    assert group.hidden.shape[-1] == 2 * 16


def test_what_one_step_prepared_serves_the_next():
    """While no row begins a block, only lengths change; a new block or table starts afresh."""
    backend = TorchAttention()
    lens, shared = SHARED["two prefixes"]
    made = []
    for grown in range(20):
        case = make_case([(1, context + grown) for _, context in lens], shared=shared)
        attend = backend(case.cache, case.batch, case.scale)
        made.append(attend.groups[0])
        out = attend(0, case.q, case.k, case.v)
        alone = bind_torch_attention(case.cache, case.batch, case.scale)
        torch.testing.assert_close(out, alone(0, case.q, case.k, case.v), rtol=0, atol=1e-6)
    assert 1 < len({id(group) for group in made}) < len(made)


def test_a_short_prefix_of_two_rows_is_not_worth_it():
    case = make_case([(1, 40), (1, 40)], shared={1: (0, 2)})
    assert num_shared(case) == 0
    assert_right(case, case.run())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([1, 40, 256]), st.sampled_from([3, 300]))
def test_any_tree_of_prefixes(data, spared, gaps):
    """Every row may begin as any earlier row does, for any number of blocks."""
    blocks = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=9))
    lens = [(1, 16 * count + data.draw(st.integers(1, 16))) for count in blocks]
    shared = {}
    for row in range(1, len(blocks)):
        other = data.draw(st.integers(0, row - 1))
        shared[row] = other, data.draw(st.integers(0, min(blocks[row], blocks[other])))
    case = make_case(lens, shared=shared, gaps=gaps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_torch_decode, "MIN_TOKENS_SPARED", spared)
        assert_right(case, case.run())


@pytest.mark.parametrize("most_mask, most_keys", [(1, 1), (300, 1 << 17), (1 << 26, 64), (700, 90)])
def test_groups_stay_within_their_limits(monkeypatch, most_mask, most_keys):
    """However little may be built at once, the result is the same."""
    monkeypatch.setattr(paged_torch, "MAX_MASK_ELEMENTS", most_mask)
    monkeypatch.setattr(paged_torch, "MAX_GATHERED_KEYS", most_keys)
    lens = [*BATCHES["everything"], (1, 7), (64, 64), (3, 60)]
    case = make_case(lens)
    groups = make_groups(case)
    assert {token for group in groups for token in group.tokens.tolist()} == set(range(len(case.q)))
    for group in groups:
        if isinstance(group, PrefillGroup):
            rows, width, longest = group.shape[0], group.shape[1], group.mask.shape[-1]
        else:
            rows, width, longest = group.num_rows, 1, group.hidden.shape[-1]
        # Contexts are rounded up to whole blocks after the cut, and one row always goes.
        if rows > 1:
            assert rows * (longest - 15) <= most_keys
            assert rows * width * (longest - 15) <= most_mask
    assert_right(case, case.run())


def test_one_long_sequence_does_not_pad_all_others_to_its_length(monkeypatch):
    monkeypatch.setattr(paged_torch, "MAX_GATHERED_KEYS", 1024)
    case = make_case([(1, 20)] * 30 + [(1, 1000)] + [(1, 20)] * 30)
    assert sum(group.hidden.numel() for group in make_groups(case)) < 3 * 1024
    assert_right(case, case.run())


def test_layers_have_their_own_pages():
    case = make_case([(5, 20)])
    before = case.cache.k[0].clone()
    case.run(layer=1)
    assert torch.equal(case.cache.k[0], before)
    table = case.batch.block_tables[0].tolist()
    assert torch.equal(case.cache.k[1, table[0], 15], case.k[0])
    assert torch.equal(case.cache.v[1, table[1], 3], case.v[4])


def test_chunks_give_what_the_whole_prompt_gives():
    case = make_case([(50, 50)])
    out = []
    for start, end in ((0, 7), (7, 32), (32, 33), (33, 50)):
        batch = replace(
            case.batch,
            slot_mapping=case.batch.slot_mapping[start:end],
            query_lens=(end - start,),
            context_lens=(end,),
        )
        attend = bind_torch_attention(case.cache, batch, case.scale)
        out.append(attend(1, case.q[start:end], case.k[start:end], case.v[start:end]))
    assert_right(case, torch.cat(out))


def test_two_sequences_may_share_a_block_that_this_very_step_fills():
    """The first computes 20 tokens; the second shares its block of 16 and brings 2 of its own."""
    case = make_case([(20, 20), (2, 18)], seed=3)
    tables = case.batch.block_tables.clone()
    tables[1, 0] = tables[0, 0]
    case.batch = replace(case.batch, block_tables=tables)
    k = torch.cat([case.k[:16], case.k[20:]])
    v = torch.cat([case.v[:16], case.v[20:]])
    expected = naive_attention(case.q[20:], k, v, case.scale)
    case.expected = torch.cat([case.expected[:20], expected])
    assert_right(case, case.run())


@pytest.mark.gpu
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
def test_on_a_gpu(lens, dtype, tolerance):
    case = make_case(lens, dtype=dtype, device="cuda")
    assert_right(case, case.run(), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("lens, shared", SHARED.values(), ids=SHARED)
def test_shared_prefixes_on_a_gpu(lens, shared):
    case = make_case(lens, shared=shared, device="cuda")
    assert_right(case, case.run(), 1e-4)
