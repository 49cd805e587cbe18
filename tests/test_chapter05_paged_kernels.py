"""Chapter 5: attention over pages in Triton (store, decode, prefill, both), against float64.

Whatever must not be read holds NaN here: blocks of nobody, rows past a sequence's end. Whatever
must be written holds NaN before, and table entries past a sequence's last block are -1.
"""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from minivllm.attention import paged_checks  # noqa: E402
from minivllm.attention import paged_kernels as paged  # noqa: E402
from minivllm.attention.flash_kernels import FlashTile  # noqa: E402
from minivllm.attention.paged_split_kernels import sums_in_float64  # noqa: E402

NOTEBOOKS = str(Path(__file__).resolve().parents[1] / "notebooks")
sys.path[:0] = [path for path in (NOTEBOOKS,) if path not in sys.path]
Recorder = importlib.import_module("recorder").Recorder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


def every_address_checked():
    """In the interpreter an address outside its tensor is an error, and does not end the run."""
    if not triton.knobs.runtime.interpret:
        return contextlib.nullcontext()
    return Recorder(register_arguments=True)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def starts(lengths):
    """Prefix sums with a leading 0, int32 [B + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


class Pages:
    """Random keys and values of some sequences, and a cache that holds them in shuffled blocks."""

    def __init__(self, lengths, block_size, num_kv_heads, head_size, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (sum(lengths), num_kv_heads, head_size)
        self.lengths = lengths
        self.k, self.v = (
            torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2)
        )
        blocks = [-(-length // block_size) for length in lengths]
        num_blocks = sum(blocks) + 2
        free = torch.randperm(num_blocks, generator=generator).tolist()
        self.tables = torch.full((len(lengths), max(blocks) + 1), -1, dtype=torch.int32)
        slots = []
        for row, (length, used) in enumerate(zip(lengths, blocks, strict=True)):
            mine, free = free[:used], free[used:]
            self.tables[row, :used] = torch.tensor(mine, dtype=torch.int32)
            slots += [mine[t // block_size] * block_size + t % block_size for t in range(length)]
        self.slots = torch.tensor(slots, device=DEVICE)
        self.tables = self.tables.to(DEVICE)
        self.context_lens = int32(lengths)
        cache = (num_blocks, block_size, num_kv_heads, head_size)
        self.k_cache = torch.full(cache, NAN, dtype=dtype, device=DEVICE)
        self.v_cache = self.k_cache.clone()
        self.k_cache.flatten(0, 1)[self.slots] = self.k
        self.v_cache.flatten(0, 1)[self.slots] = self.v

    def queries(self, query_lens, num_heads, seed=1):
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(sum(query_lens), num_heads, self.k.shape[2], generator=generator)
        return q.to(DEVICE, self.k.dtype)

    def expected(self, q, query_lens, scale):
        """In float64: each sequence's last queries over all its keys; 0 for an empty sequence."""
        group = q.shape[1] // self.k.shape[1]
        out = torch.zeros(q.shape, dtype=torch.float64, device=DEVICE)
        row = token = 0
        for count, length in zip(query_lens, self.lengths, strict=True):
            if length > 0:
                q64 = q[row : row + count].double()
                k64, v64 = (
                    x[token : token + length].double().repeat_interleave(group, dim=1)
                    for x in (self.k, self.v)
                )
                scores = torch.einsum("qhd,khd->hqk", q64, k64) * scale
                position = torch.arange(length - count, length, device=DEVICE)
                future = torch.arange(length, device=DEVICE) > position[:, None]
                weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
                out[row : row + count] = torch.einsum("hqk,khd->qhd", weights, v64)
            row, token = row + count, token + length
        return out


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def poisoned(q):
    return torch.full(q.shape, NAN, dtype=q.dtype, device=q.device)


def make_plan(pages, num_heads, **options):
    k_cache = pages.k_cache
    return paged.PagedDecodePlan(
        *pages.tables.shape,
        k_cache.shape[1],
        num_heads,
        *k_cache.shape[2:],
        dtype=k_cache.dtype,
        device=DEVICE,
        **options,
    )


# ------------------------------------------------------------------ store


@pytest.mark.parametrize("shape", [(2, 16), (3, 80), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_store_writes_its_slots_and_nothing_else(shape, dtype):
    num_kv_heads, head_size = shape
    fused = torch.randn(5, 2 * num_kv_heads * head_size, device=DEVICE).to(dtype)
    k, v = (x.unflatten(1, shape) for x in fused.chunk(2, dim=1))  # strided views
    k_cache = torch.full((3, 16, *shape), NAN, dtype=dtype, device=DEVICE)
    v_cache = k_cache.clone()
    slots = torch.tensor([14, 15, -1, 32, 0], device=DEVICE)
    with every_address_checked():
        paged.store_kv(k, v, k_cache, v_cache, slots)
    written = [0, 1, 3, 4]
    for cache, new in ((k_cache, k), (v_cache, v)):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[slots[written]], new[written])
        assert flat.isnan().all(dim=(1, 2)).sum() == 3 * 16 - len(written)


def test_store_of_nothing():
    cache = torch.zeros(1, 16, 2, 8, device=DEVICE)
    empty = torch.zeros(0, 2, 8, device=DEVICE)
    paged.store_kv(empty, empty, cache, cache, torch.zeros(0, dtype=torch.int64, device=DEVICE))


# ------------------------------------------------------------------ decode


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "block_size", "dtype"),
    [
        (4, 2, 32, 16, torch.float32),  # a tile of 64 spans four blocks
        (2, 2, 64, 64, torch.float16),
        (6, 1, 80, 256, torch.float32),  # a block holds several tiles
        (2, 1, 128, 32, torch.float16),
        (18, 1, 32, 64, torch.float32),  # more than 16 query heads share a KV head
        (2, 1, 256, 16, torch.float32),
    ],
)
def test_decode_equals_float64(num_heads, num_kv_heads, head_size, block_size, dtype):
    lengths = [1, 0, 130, 64, 33]
    pages = Pages(lengths, block_size, num_kv_heads, head_size, dtype)
    q = pages.queries([1] * 5, num_heads)
    scale = head_size**-0.5
    expected = pages.expected(q, [1] * 5, scale)
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    arguments = (q, pages.k_cache, pages.v_cache, pages.tables, pages.context_lens)
    with every_address_checked():
        whole = paged.paged_decode_whole(*arguments, scale=scale)
    assert (whole[1] == 0).all(), "the sequence without context must get zeros"
    error = relative_error(whole, expected)
    assert error < limit, f"paged_decode_whole: the relative error is {error:.2g}"
    split = paged.paged_decode(*arguments, scale=scale, out=poisoned(q))
    assert relative_error(split, expected) < limit
    assert (split[1] == 0).all()  # the padded row


@pytest.mark.skipif(
    not sums_in_float64(torch.float32, torch.device(DEVICE)), reason="slow in float64"
)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_decode_of_float32_adds_up_in_float64(what):
    """1e8 + 1 - 1e8 is 0 in float32, in that order."""
    pages = Pages([3], 16, 1, 16, torch.float32)
    q = torch.zeros(1, 1, 16, device=DEVICE)
    used = pages.tables[0, 0]
    keys, values = (cache[used, :3, 0].zero_() for cache in (pages.k_cache, pages.v_cache))
    if what == "keys":
        q[0, 0, :3] = torch.tensor([1e4, 1, -1e4])
        keys[1, :3] = torch.tensor([1e4, 1, 1e4])
        values[1] = 1
        expected = torch.tensor(1.0).exp() / (torch.tensor(1.0).exp() + 2)
    else:
        values[:, :] = torch.tensor([1e8, 1, -1e8])[:, None]
        expected = torch.tensor(1 / 3)
    out = paged.paged_decode(
        q, pages.k_cache, pages.v_cache, pages.tables, pages.context_lens, scale=1.0
    )
    assert torch.allclose(out.cpu(), expected.expand(1, 1, 16), rtol=1e-6)


def test_what_decode_adds_up_in_float64():
    cpu = torch.device("cpu")
    assert sums_in_float64(torch.float32, cpu)
    assert not sums_in_float64(torch.float16, cpu) and not sums_in_float64(torch.bfloat16, cpu)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "block_size", "dtype"),
    [
        (4, 2, 64, torch.float32),
        (6, 6, 16, torch.float16),  # a tile of 32 spans two blocks
        (16, 4, 32, torch.float32),
    ],
)
def test_decode_with_two_kv_heads_in_a_program(num_heads, num_kv_heads, block_size, dtype):
    lengths = [1, 0, 130, 64, 33]
    pages = Pages(lengths, block_size, num_kv_heads, 32, dtype)
    q = pages.queries([1] * 5, num_heads)
    plan = make_plan(pages, num_heads, processors=8, tile=32, min_share=1, wide_from=5)
    assert plan.wide_from == 5
    plan.prepare(pages.tables, pages.context_lens)
    arguments = (q, pages.k_cache, pages.v_cache, pages.tables, pages.context_lens)
    out = paged.paged_decode(*arguments, scale=0.2, plan=plan, out=poisoned(q))
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    assert relative_error(out, pages.expected(q, [1] * 5, 0.2)) < limit


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (18, 2), (4, 1)])
def test_kv_heads_that_do_not_pair_are_left_alone(num_heads, num_kv_heads):
    """An odd one out, or more query heads than the matrix unit has rows."""
    pages = Pages([40, 3], 16, num_kv_heads, 16, torch.float32)
    assert make_plan(pages, num_heads, wide_from=1).wide_from > 2


@pytest.mark.parametrize("shares", [1, 2, 3, 5, 12, 40])
def test_decode_does_not_depend_on_the_shares(shares):
    """Whatever the borders cut: nothing, one sequence several times, several sequences."""
    lengths = [20, 0, 150, 1, 16, 31]
    pages = Pages(lengths, 16, 1, 32, torch.float32)
    q = pages.queries([1] * 6, 2)
    plan = make_plan(pages, 2, processors=shares, programs_each=1, tile=16, min_share=1)
    assert plan.shares == shares
    plan.prepare(pages.tables, pages.context_lens)
    arguments = (q, pages.k_cache, pages.v_cache, pages.tables, pages.context_lens)
    out = paged.paged_decode(*arguments, scale=0.2, plan=plan, out=poisoned(q))
    assert relative_error(out, pages.expected(q, [1] * 6, 0.2)) < 1e-6
    tiles = 2 + 1 + 10 + 1 + 1 + 2
    share = -(-tiles // shares)
    counts = [max(0, min(share, tiles - i * share)) for i in range(shares)]
    assert plan.share[:, 0].tolist() == counts
    seqs = [s for s, length in enumerate(lengths) for _ in range(-(-max(1, length) // 16))]
    spans = {s: (seqs.index(s) // share, (tiles - 1 - seqs[::-1].index(s)) // share) for s in seqs}
    cut = {i: (s, j) for i, (s, j) in enumerate(plan.cut.tolist()) if j > i}
    assert cut == {first: (s, last) for s, (first, last) in spans.items() if last > first}


def test_decode_with_one_very_long_sequence():
    lengths = [5, 900, 7]
    pages = Pages(lengths, 64, 1, 32, torch.float32)
    q = pages.queries([1] * 3, 2)
    plan = make_plan(pages, 2, processors=8, programs_each=1, min_share=1)
    plan.prepare(pages.tables, pages.context_lens)
    # 17 tiles on 8 programs: the long one's 15 are spread, none has more than 3.
    assert plan.share[:, 0].tolist() == [3, 3, 3, 3, 3, 2, 0, 0]
    arguments = (q, pages.k_cache, pages.v_cache, pages.tables, pages.context_lens)
    out = paged.paged_decode(*arguments, scale=0.2, plan=plan, out=poisoned(q))
    assert relative_error(out, pages.expected(q, [1] * 3, 0.2)) < 1e-6


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("shares", [1, 4])
def test_plan_lists_every_tile(block_size, shares):
    lengths = [70, 0, 40, 150]
    pages = Pages(lengths, block_size, 1, 16, torch.float32)
    plan = make_plan(pages, 1, processors=shares, programs_each=1, tile=32, min_share=1)
    plan.prepare(pages.tables, pages.context_lens)
    tiles = [(s, t) for s in range(4) for t in range(0, max(lengths[s], 1), 32)]
    share = -(-len(tiles) // shares)
    begins = [sum(lengths[:s]) for s in range(4)]
    run = min(block_size, 32)
    for index, (s, t) in enumerate(tiles):
        place = divmod(index, share)
        assert plan.tile_seq[place] == s
        assert plan.tile_left[place] == lengths[s] - t
        for i, token in enumerate(range(t, min(t + 32, lengths[s]), run)):
            assert plan.tile_slot[place][i] == pages.slots[begins[s] + token]
    for row in range(shares):
        mine = tiles[row * share : (row + 1) * share]
        assert plan.share[row].tolist() == [len(mine), int(mine[0][1] == 0)]


def test_plan_follows_the_lengths_when_prepared_again():
    """As in a CUDA graph: same tensors, new contents."""
    pages = Pages([40, 90], 16, 1, 32, torch.float32)
    plan = make_plan(pages, 2, processors=3, programs_each=1, tile=16, min_share=1)
    for lengths in ([40, 90], [3, 64], [0, 17]):
        view = Pages([40, 90], 16, 1, 32, torch.float32)
        view.lengths = lengths
        view.k = torch.cat([view.k[: lengths[0]], view.k[40 : 40 + lengths[1]]])
        view.v = torch.cat([view.v[: lengths[0]], view.v[40 : 40 + lengths[1]]])
        pages.context_lens.copy_(int32(lengths))
        plan.prepare(pages.tables, pages.context_lens)
        q = pages.queries([1, 1], 2)
        arguments = (q, pages.k_cache, pages.v_cache, pages.tables, pages.context_lens)
        out = paged.paged_decode(*arguments, scale=0.2, plan=plan, out=poisoned(q))
        assert relative_error(out, view.expected(q, [1, 1], 0.2)) < 1e-6


# ------------------------------------------------------------------ prefill, and both


@pytest.mark.parametrize(
    ("block_size", "head_size", "dtype", "tile"),
    [
        (16, 32, torch.float32, (16, 32)),
        (64, 80, torch.float16, (16, 16)),
        (256, 128, torch.float32, (32, 64)),
    ],
)
def test_prefill_may_start_in_the_middle(block_size, head_size, dtype, tile):
    """Whole prompts, chunks behind a context, a single token, no queries at all."""
    lengths, query_lens = [20, 65, 40, 9], [20, 18, 1, 0]
    pages = Pages(lengths, block_size, 1, head_size, dtype)
    q = pages.queries(query_lens, 2)
    scale = head_size**-0.5
    out = paged.paged_prefill_tiled(
        q,
        pages.k_cache,
        pages.v_cache,
        pages.tables,
        starts(query_lens),
        pages.context_lens,
        scale=scale,
        max_query_len=20,
        tile=FlashTile(*tile, 4, 2),
        out=poisoned(q),
    )
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    assert relative_error(out, pages.expected(q, query_lens, scale)) < limit


@pytest.mark.parametrize("num_decodes", [0, 2, 3])
def test_mixed_batch(num_decodes):
    lengths, query_lens = [33, 50, 8, 20], [1, 1, 1, 12]
    pages = Pages(lengths, 16, 2, 32, torch.float32)
    q = pages.queries(query_lens, 4)
    out = paged.paged_attention(
        q,
        pages.k_cache,
        pages.v_cache,
        pages.tables,
        starts(query_lens),
        pages.context_lens,
        scale=0.2,
        max_query_len=12,
        num_decodes=num_decodes,
        out=poisoned(q),
    )
    assert relative_error(out, pages.expected(q, query_lens, 0.2)) < 1e-6


# ------------------------------------------------------------------ bad input


def good_arguments():
    pages = Pages([20, 7], 16, 2, 32, torch.float32)
    return {
        "q": pages.queries([1, 1], 4),
        "k_cache": pages.k_cache,
        "v_cache": pages.v_cache,
        "block_tables": pages.tables,
        "context_lens": pages.context_lens,
        "scale": 0.2,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4, 32)}, "q has 3 rows but block_tables 2"),
        ({"q": torch.zeros(2, 3, 32)}, "q has 3 heads but k and v have 2"),
        ({"q": torch.zeros(2, 4, 16)}, "q has head size 16 but k and v have 32"),
        ({"q": torch.zeros(2, 4, 32).half()}, "q is torch.float16 but k is torch.float32"),
        ({"v_cache": torch.zeros(5, 16, 1, 32)}, r"k_cache has shape .* but v_cache \(5, 16, 1"),
        ({"k_cache": torch.zeros(16, 2, 32)}, r"k_cache has shape \(16, 2, 32\); give"),
        ({"context_lens": torch.zeros(3, dtype=torch.int32)}, r"context_lens .*\[2\]"),
        ({"context_lens": torch.zeros(2)}, "context_lens is torch.float32; it must be int32"),
        ({"block_tables": torch.zeros(2, 3)}, "block_tables is torch.float32"),
        ({"scale": -1.0}, "scale=-1.0 must be positive"),
        ({"out": torch.zeros(2, 4, 16)}, "they must be equal"),
    ],
)
def test_bad_input_names_both_sides(change, message):
    arguments = {**good_arguments(), **change}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        paged.paged_decode(**arguments)


def test_cache_must_be_what_the_kernels_expect():
    arguments = good_arguments()
    for name, cache, message in (
        ("k_cache", arguments["k_cache"].transpose(1, 2), "k_cache must be contiguous"),
        ("k_cache", arguments["k_cache"][:, :12].contiguous(), "k_cache has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            paged.paged_decode(**{**arguments, name: cache})
    odd = arguments["k_cache"][:, :12].contiguous()
    with pytest.raises(ValueError, match="a block of 12 tokens in k_cache; use a power of two"):
        paged.paged_decode(**{**arguments, "k_cache": odd, "v_cache": odd})


def test_plan_must_fit_and_be_prepared():
    arguments = good_arguments()
    tables, lengths = arguments["block_tables"], arguments["context_lens"]
    plan = paged.PagedDecodePlan(2, 3, 16, 4, 2, 32, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match="plan is not prepared"):
        paged.paged_decode(**arguments, plan=plan)
    plan.prepare(tables, lengths)
    paged.paged_decode(**arguments, plan=plan)
    with pytest.raises(ValueError, match="plan is not prepared"):
        paged.paged_decode(**{**arguments, "context_lens": lengths.clone()}, plan=plan)
    other = paged.PagedDecodePlan(2, 3, 16, 8, 2, 32, dtype=torch.float32, device=DEVICE)
    other.prepare(tables, lengths)
    with pytest.raises(ValueError, match=r"plan was made for \(H, D, G, S\) = \(8, 32, 2, 16\)"):
        paged.paged_decode(**arguments, plan=other)
    small = paged.PagedDecodePlan(1, 3, 16, 4, 2, 32, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match=r"block_tables is \[2, 3\] but .* \[1, 3\]"):
        small.prepare(tables, lengths)
    with pytest.raises(ValueError, match=r"context_lens has shape \(1,\) but must have \[2\]"):
        plan.prepare(tables, lengths[:1])
    with pytest.raises(ValueError, match="num_heads=3 must be a multiple of num_kv_heads=2"):
        paged.PagedDecodePlan(1, 3, 16, 3, 2, 32, dtype=torch.float32, device=DEVICE)


def test_num_decodes_must_fit():
    arguments = good_arguments()
    with pytest.raises(ValueError, match="num_decodes=3 is outside 0 to 2"):
        paged.paged_attention(
            **arguments, cu_query_lens=starts([1, 1]), max_query_len=1, num_decodes=3
        )


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("block_tables", 5, r"block_tables\[0, 1\] = 5 lies outside the 5 blocks"),
        ("block_tables", -1, r"block_tables\[0, 1\] = -1 lies outside"),
        ("context_lens", 49, r"context_lens\[0\] = 49 needs 4 blocks .* room for 3"),
    ],
)
def test_debug_mode_finds_a_table_that_leads_outside(monkeypatch, entry, value, message):
    arguments = good_arguments()
    monkeypatch.setattr(paged_checks, "DEBUG", True)
    paged.paged_decode(**arguments)
    arguments[entry] = arguments[entry].clone()
    arguments[entry].view(-1)[1 if entry == "block_tables" else 0] = value
    with pytest.raises(ValueError, match=message):
        paged.paged_decode(**arguments)


def test_debug_mode_keeps_a_plan_from_overflowing(monkeypatch):
    monkeypatch.setattr(paged_checks, "DEBUG", True)
    plan = paged.PagedDecodePlan(2, 3, 16, 4, 2, 32, dtype=torch.float32, device=DEVICE)
    tables = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"context_lens\[1\] = 49 needs 4 blocks .* room for 3"):
        plan.prepare(tables, int32([48, 49]))


def test_debug_mode_finds_a_slot_that_leads_outside(monkeypatch):
    monkeypatch.setattr(paged_checks, "DEBUG", True)
    cache = torch.zeros(2, 16, 1, 8, device=DEVICE)
    new = torch.zeros(2, 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"slot_mapping\[1\] = 32 lies outside the 32 slots"):
        paged.store_kv(new, new, cache, cache, torch.tensor([3, 32], device=DEVICE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 8)}, r"k has shape \(2, 2, 8\) but k_cache holds"),
        ({"v": torch.zeros(2, 1, 4)}, r"k has shape \(2, 1, 8\) but v \(2, 1, 4\)"),
        (
            {"k": torch.zeros(2, 1, 8).half(), "v": torch.zeros(2, 1, 8).half()},
            "k is torch.float16",
        ),
        ({"slot_mapping": torch.zeros(2, dtype=torch.int32)}, r"int64 \[2\]"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int64)}, r"int64 \[2\]"),
    ],
)
def test_store_refuses_what_does_not_fit(change, message):
    arguments = {
        "k": torch.zeros(2, 1, 8),
        "v": torch.zeros(2, 1, 8),
        "k_cache": torch.zeros(2, 16, 1, 8),
        "v_cache": torch.zeros(2, 16, 1, 8),
        "slot_mapping": torch.zeros(2, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        paged.store_kv(**{name: tensor.to(DEVICE) for name, tensor in arguments.items()})


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 32, 64, 256])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "dtype"),
    [
        (16, 8, 128, torch.bfloat16),
        (32, 8, 128, torch.float16),
        (8, 2, 64, torch.bfloat16),
        (4, 4, 80, torch.bfloat16),
        (24, 1, 96, torch.float16),
        (4, 2, 256, torch.bfloat16),
        (4, 2, 32, torch.float32),
        (4, 2, 256, torch.float32),
    ],
)
def test_gpu_equals_float64(block_size, num_heads, num_kv_heads, head_size, dtype):
    lengths = [1, 0, 3000, 64, 129, 777, 31]
    query_lens = [1, 0, 700, 64, 1, 300, 31]
    limit = 2e-6 if dtype == torch.float32 else 3e-3 if dtype == torch.bfloat16 else 5e-4
    pages = Pages(lengths, block_size, num_kv_heads, head_size, dtype)
    before = pages.k_cache.clone(), pages.v_cache.clone()
    scale = head_size**-0.5
    arguments = (pages.k_cache, pages.v_cache, pages.tables)
    q = pages.queries([1] * 7, num_heads)
    expected = pages.expected(q, [1] * 7, scale)
    for form in (paged.paged_decode, paged.paged_decode_whole):
        out = form(q, *arguments, pages.context_lens, scale=scale)
        assert relative_error(out, expected) < limit
    q = pages.queries(query_lens, num_heads)
    expected = pages.expected(q, query_lens, scale)
    cu_query_lens = starts(query_lens)
    for form in (paged.paged_prefill, paged.paged_prefill_tiled):
        out = form(
            q,
            *arguments,
            cu_query_lens,
            pages.context_lens,
            scale=scale,
            max_query_len=700,
            out=poisoned(q),
        )
        assert relative_error(out, expected) < limit
    for cache, copy in zip((pages.k_cache, pages.v_cache), before, strict=True):
        assert torch.equal(cache.view(torch.uint8), copy.view(torch.uint8))


@pytest.mark.gpu
def test_gpu_graph_captured_once_serves_other_lengths():
    pages = Pages([700, 2000, 33, 1], 64, 8, 128, torch.bfloat16)
    q = pages.queries([1] * 4, 16)
    out = poisoned(q)
    plan = make_plan(pages, 16)
    lengths = pages.context_lens.clone()
    arguments = (q, pages.k_cache, pages.v_cache, pages.tables, lengths)

    def step():
        plan.prepare(pages.tables, lengths)
        paged.paged_decode(*arguments, scale=0.1, plan=plan, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in ([700, 2000, 33, 1], [1, 1, 1, 1], [650, 64, 0, 0], [5, 1999, 33, 0]):
        lengths.copy_(int32(now))
        out.fill_(NAN)
        graph.replay()
        fresh = paged.paged_decode_whole(*arguments, scale=0.1)
        assert relative_error(out, fresh.double()) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "wide"), [(3, False), (40, True)])
def test_gpu_dependent_launches_wait_for_what_they_read(batch, wide):
    """Each layer's queries are the output of the one in front, in one graph with the plan."""
    torch.manual_seed(0)
    pages = Pages([1500, 90, 400] + [70] * (batch - 3), 64, 8, 128, torch.bfloat16)
    plan = make_plan(pages, 16)
    assert (batch >= plan.wide_from) == wide
    first = pages.queries([1] * batch, 16)
    steps = [torch.empty_like(first) for _ in range(12)]
    arguments = (pages.k_cache, pages.v_cache, pages.tables, pages.context_lens)

    def step(pdl):
        plan.prepare(pages.tables, pages.context_lens)
        q = first
        for out in steps:
            q = paged.paged_decode(q, *arguments, scale=0.1, plan=plan, out=out, pdl=pdl)

    step(False)
    expected = [out.clone() for out in steps]
    step(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(True)
    for _ in range(50):
        for out in steps:
            out.fill_(NAN)
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(steps, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("decodes", [0, 3])
def test_gpu_one_order_of_blocks_serves_all_layers(decodes):
    """Also where most sequences of a recorded step are not there, or its first ones decode."""
    query_lens = [1] * decodes + [1, 700, 0, 64, 300, *([0] * 200)]
    lengths = [n + 77 if n else 0 for n in query_lens]
    q_heads, scale = 16, 0.1
    order = None
    for _ in range(2):
        pages = Pages(lengths, 64, 8, 128, torch.bfloat16)
        q = pages.queries(query_lens, q_heads)
        cu_query_lens = starts(query_lens)
        arguments = (q, pages.k_cache, pages.v_cache)
        if order is None:
            order = paged.prefill_order(
                *arguments,
                cu_query_lens[decodes:],
                pages.context_lens[decodes:],
                max_query_len=1024,
            )
        out = paged.paged_attention(
            *arguments,
            pages.tables,
            cu_query_lens,
            pages.context_lens,
            scale=scale,
            max_query_len=len(q),
            num_decodes=decodes,
            order=order,
            out=poisoned(q),
        )
        assert relative_error(out, pages.expected(q, query_lens, scale)) < 3e-3
