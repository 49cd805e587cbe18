"""Chapter 5's simple Triton kernels: values against float64, counts from the recorder.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

import contextlib
import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from helpers import oracle_greedy, random_prompt, save_checkpoint, tiny_qwen3

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from minivllm.attention import paged_simple_kernels, paged_store_kernels  # noqa: E402
from minivllm.models.loader import load_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "notebooks")) if path not in sys.path]
toy = importlib.import_module("chapters.chapter05_paged_attention.toy")
Recorder = importlib.import_module("recorder").Recorder

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the recorder needs the interpreter")
NAN = float("nan")


class Pages:
    """Random keys and values of some sequences, in shuffled blocks; all other slots hold NaN.

    Past the end of a table stands 1,000,000, so a look-up that goes too far leaves the pool.
    """

    def __init__(self, lengths, block_size, num_kv_heads=1, head_size=16, dtype=torch.float32):
        generator = torch.Generator().manual_seed(sum(lengths) + block_size)
        self.lengths, self.block_size = lengths, block_size
        self.k, self.v = (
            [
                torch.randn(n, num_kv_heads, head_size, generator=generator).to(dtype)
                for n in lengths
            ]
            for _ in range(2)
        )
        blocks = [-(-length // block_size) for length in lengths]
        free = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
        self.tables = torch.full((len(lengths), max(blocks) + 1), 1_000_000, dtype=torch.int32)
        shape = (sum(blocks) + 2, block_size, num_kv_heads, head_size)
        self.k_cache, self.v_cache = (torch.full(shape, NAN, dtype=dtype) for _ in range(2))
        for row, (length, used) in enumerate(zip(lengths, blocks, strict=True)):
            mine = [free.pop() for _ in range(used)]
            self.tables[row, :used] = torch.tensor(mine, dtype=torch.int32)
            for token in range(length):
                place = mine[token // block_size], token % block_size
                self.k_cache[place], self.v_cache[place] = self.k[row][token], self.v[row][token]
        self.context_lens = torch.tensor(lengths, dtype=torch.int32)

    def queries(self, num_heads):
        generator = torch.Generator().manual_seed(num_heads)
        shape = (len(self.lengths), 2 * num_heads, self.k_cache.shape[3])
        q = torch.randn(shape, generator=generator).to(self.k_cache.dtype)
        return q[:, ::2]  # a view with gaps

    def expected(self, q, scale):
        """The definition in float64; zeros for a sequence without tokens."""
        out = torch.zeros(q.shape, dtype=torch.float64)
        group = q.shape[1] // self.k_cache.shape[2]
        for row, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            for head in range(q.shape[1]):
                scores = k[:, head // group].double() @ q[row, head].double() * scale
                out[row, head] = scores.softmax(dim=0) @ v[:, head // group].double()
        return out

    def decode(self, q, scale, **options):
        # An address outside its tensor is stopped by the recorder, and not by the interpreter.
        tensors = (q, self.k_cache, self.v_cache, self.tables, self.context_lens)
        with Recorder(register_arguments=True) if INTERPRETED else contextlib.nullcontext():
            out = paged_simple_kernels.paged_decode_whole(
                *(tensor.to(DEVICE) for tensor in tensors), scale=scale, **options
            )
        assert out.shape == q.shape and out.dtype == q.dtype
        return out.cpu()


def assert_close(ours, expected, what):
    missing = int(ours.isnan().sum())
    assert not missing, (
        f"{what}: {missing} of {ours.numel()} numbers are NaN, as are the slots that hold no token "
        "of the sequence"
    )
    error = (ours.double() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(ours.dtype).eps, f"{what}: the relative error is {error:.2g}"


# ---------------------------------------------------------------------------- storing


def store(k, v, k_cache, v_cache, slots):
    tensors = (k, v, k_cache, v_cache, slots)
    with Recorder(register_arguments=True) if INTERPRETED else contextlib.nullcontext():
        paged_store_kernels.store_kv(*tensors)


def test_store_kernel_on_the_toy() -> None:
    k_cache, v_cache = (cache.to(DEVICE) for cache in toy.pool())
    store(*(t.to(DEVICE) for t in toy.new_tokens()[:2]), k_cache, v_cache, slots_of_the_toy())
    for name, ours, right in zip("kv", (k_cache, v_cache), toy.filled_pool(), strict=True):
        for slot, (mine, wanted) in enumerate(
            zip(ours.cpu().flatten(0, 1), right.flatten(0, 1), strict=True)
        ):
            assert torch.equal(mine, wanted), (
                f"slot {slot} of {name}_cache\nholds       {mine.tolist()},\n"
                f"should hold {wanted.tolist()}"
            )


def slots_of_the_toy() -> torch.Tensor:
    return toy.new_tokens()[2].to(DEVICE)


@pytest.mark.parametrize("shape", [(1, 16), (3, 80), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_store_kernel_takes_views(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows and heads of k and v with gaps between, and not the same; G * D no power of two."""
    num_kv_heads, head_size = shape
    k = torch.randn(4, 3 * num_kv_heads, head_size).to(DEVICE, dtype)[:, ::3]
    v = torch.randn(4, 2 * num_kv_heads, head_size).to(DEVICE, dtype)[:, ::2]
    k_cache = torch.full((3, 4, *shape), NAN, dtype=dtype, device=DEVICE)
    v_cache = k_cache.clone()
    slots = torch.tensor([11, 2, 0, 7], device=DEVICE)
    store(k, v, k_cache, v_cache, slots)
    for name, cache, new in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[slots], new), f"{name} does not hold the tokens at their slots"
        assert flat.isnan().all(dim=2).all(dim=1).sum() == 12 - 4, f"{name}: other slots changed"


@functools.cache
def stored() -> "Recorder":
    """Tokens 0 and 2 are padding."""
    k, v = torch.randn(2, 5, 2, 3)
    slots = torch.tensor([-1, 6, -1, 0, 3])
    tensors = {"k": k, "v": v, "slot_mapping": slots}
    tensors |= {name: torch.zeros(2, 4, 2, 3) for name in ("k_cache", "v_cache")}
    with Recorder(tensors, register_arguments=True) as rec:
        paged_store_kernels.store_kv(k, v, tensors["k_cache"], tensors["v_cache"], slots)
    return rec


@interpreted
def test_store_kernel_writes_padding_nowhere() -> None:
    for name in ("k_cache", "v_cache"):
        times = stored().times_written(name).reshape(8, -1)
        written = {slot: sorted(set(row.tolist())) for slot, row in enumerate(times) if row.any()}
        assert written == {6: [1], 0: [1], 3: [1]}, (
            f"slots of {name} and how often their numbers were written: {written}; "
            "should be slots 0, 3 and 6, once each"
        )
    assert {event.tensor for event in stored().select(kind="store")} == {"k_cache", "v_cache"}


@interpreted
def test_store_kernel_reads_each_real_token_once() -> None:
    for name in ("k", "v"):
        times = [sorted(set(row.ravel().tolist())) for row in stored().times_read(name)]
        assert times == [[0], [1], [0], [1], [1]], (
            f"tokens of {name} were read {times} times; padding needs no reading, others one"
        )
    assert not stored().select("k_cache", "load") and not stored().select("v_cache", "load")


@interpreted
def test_store_kernel_gives_each_program_a_token() -> None:
    assert stored().programs == [(token, 0, 0) for token in range(5)]
    for (token, _, _), events in stored().stores_by_program("k_cache").items():
        found = {
            4 * int(block) + int(offset)
            for event in events
            for block, offset in zip(*event.index[:2], strict=True)
        }
        right = {1: {6}, 3: {0}, 4: {3}}.get(token, set())
        assert found == right, f"program {token} wrote slots {sorted(found)}, should be {right}"


# ---------------------------------------------------------------------------- decode


def test_decode_kernel_on_the_toy() -> None:
    tensors = (toy.Q, *toy.filled_pool(), toy.block_tables(), torch.tensor(toy.LENGTHS).int())
    with Recorder(register_arguments=True) if INTERPRETED else contextlib.nullcontext():
        out = paged_simple_kernels.paged_decode_whole(
            *(tensor.to(DEVICE) for tensor in tensors), scale=toy.SCALE, block_n=16
        )
    for seq, name in enumerate("AB"):
        for head in range(4):
            ours = [round(x, 3) for x in out[seq, head].tolist()]
            right = toy.OUT[seq, head].tolist()
            assert ours == right, (
                f"the output of query head {head} of sequence {name}\nis        {ours},\n"
                f"should be {right}"
            )


@pytest.mark.parametrize("block_size", [4, 16, 32, 128])
def test_decode_kernel(block_size: int) -> None:
    """Lengths around a block and around the 32 keys of a tile."""
    lengths = [1, 16, 33, 70]
    pages = Pages(lengths, block_size)
    q = pages.queries(2)
    out, expected = pages.decode(q, 0.25, block_n=32), pages.expected(q, 0.25)
    for row, length in enumerate(lengths):
        assert_close(out[row], expected[row], f"{length} tokens in blocks of {block_size}")


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (3, 3), (20, 1)])
def test_decode_kernel_grouped_query(num_heads: int, num_kv_heads: int) -> None:
    """The last case has more query heads in a group than a tile of 16 rows."""
    pages = Pages([9, 20], 16, num_kv_heads)
    q = pages.queries(num_heads)
    out, expected = pages.decode(q, 0.3), pages.expected(q, 0.3)
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        what = f"query head {head}, which reads KV head {kv_head}"
        assert_close(out[:, head], expected[:, head], what)


@pytest.mark.parametrize("head_size", [2, 24, 64])
def test_decode_kernel_of_any_head_size(head_size: int) -> None:
    pages = Pages([5, 18], 16, head_size=head_size)
    q = pages.queries(2)
    assert_close(pages.decode(q, 0.3), pages.expected(q, 0.3), f"head size {head_size}")


def test_decode_kernel_of_a_padded_row() -> None:
    """A row without context: zeros, and no NaN from 0 / 0."""
    pages = Pages([7, 0, 3], 16)
    q = pages.queries(2)
    out, expected = pages.decode(q, 0.3), pages.expected(q, 0.3)
    assert not out[1].isnan().any(), "the output of a row without context is NaN, should be zeros"
    assert (out[1] == 0).all(), "the output of a row without context should be zeros"
    assert_close(out, expected, "the rows around it")


def test_decode_kernel_in_half_precision() -> None:
    pages = Pages([40, 3], 16, dtype=torch.float16)
    q = pages.queries(2)
    assert_close(pages.decode(q, 0.25), pages.expected(q, 0.25), "float16")


def test_decode_kernel_survives_large_scores() -> None:
    pages = Pages([40], 16)
    q = 300 * pages.queries(2)
    out = pages.decode(q, 1.0, block_n=16)
    assert out.isfinite().all(), "exp of a large score overflows: subtract the row's maximum first"
    assert (out.double() - pages.expected(q, 1.0)).abs().max() < 1e-3


@torch.inference_mode()
def test_model_on_the_kernels_equals_transformers(tmp_path: Path) -> None:
    drive = importlib.import_module("chapters.chapter05_paged_attention.drive")
    theirs = tiny_qwen3(seed=1)
    model = load_model(save_checkpoint(theirs, tmp_path), device=DEVICE)
    prompts = [random_prompt(length, seed=length) for length in (5, 18)]
    expected = oracle_greedy(theirs, prompts, 5)
    pages = drive.Pages(model, 8, 8, form=drive.by_kernels)
    requests = [drive.Request(str(n), list(prompt)) for n, prompt in enumerate(prompts)]
    with Recorder(register_arguments=True) if INTERPRETED else contextlib.nullcontext():
        for _ in range(5):
            pages.step(requests)
    found = [request.answer for request in requests]
    assert found == expected, f"the model says {found},\ntransformers   {expected}"


# ---------------------------------------------------------------------------- counts

LENGTHS = [40, 10, 33]


@functools.cache
def decoded() -> tuple["Recorder", Pages]:
    """4 query heads on 2 KV heads, blocks of 16, tiles of 32 keys."""
    pages = Pages(LENGTHS, 16, num_kv_heads=2)
    q = pages.queries(4)
    tensors = {
        "q": q,
        "k_cache": pages.k_cache,
        "v_cache": pages.v_cache,
        "block_tables": pages.tables,
        "context_lens": pages.context_lens,
    }
    with Recorder(tensors, register_arguments=True) as rec:
        paged_simple_kernels.paged_decode_whole(*tensors.values(), scale=0.25, block_n=32)
    return rec, pages


@interpreted
def test_decode_kernel_reads_each_key_once_for_its_group() -> None:
    """One read serves the 2 query heads of a KV head; a slot without a token is never read."""
    rec, pages = decoded()
    right = (~pages.k_cache.isnan()).long().numpy()
    for name in ("k_cache", "v_cache"):
        times = rec.times_read(name)
        most, never = times.max(), int((times[right == 1] == 0).sum())
        stale = int(times[right == 0].sum())
        assert (times == right).all(), (
            f"every number of {name} that belongs to a token should be read once, for both query "
            f"heads together; the most read was read {most} times, {never} never, "
            f"and {stale} reads went to slots without a token"
        )


@interpreted
def test_decode_kernel_looks_up_only_the_blocks_of_its_sequence() -> None:
    rec, _ = decoded()
    used = [[-(-length // 16) for length in LENGTHS]]
    touched = rec.times_read("block_tables") > 0
    found = [touched.sum(axis=1).tolist()]
    assert found == used, f"entries of the tables that were looked up: {found}, should be {used}"


@interpreted
def test_decode_kernel_gives_each_program_a_kv_head_of_a_sequence() -> None:
    rec, pages = decoded()
    assert len(rec.programs) == 2 * 3
    for (kv_head, seq, _), events in rec.loads_by_program("k_cache").items():
        heads = {int(head) for event in events for head in event.index[2]}
        blocks = {int(block) for event in events for block in event.index[0]}
        mine = set(pages.tables[seq, : -(-LENGTHS[seq] // 16)].tolist())
        assert heads == {kv_head}, f"program {(kv_head, seq)} read KV heads {heads}"
        assert blocks == mine, f"program {(kv_head, seq)} read blocks {blocks}, should be {mine}"
    for (kv_head, seq, _), events in rec.stores_by_program("out_ptr").items():
        rows = {
            (int(row), int(head))
            for event in events
            for row, head in zip(*event.index[:2], strict=True)
        }
        right = {(seq, 2 * kv_head), (seq, 2 * kv_head + 1)}
        assert rows == right, f"program {(kv_head, seq)} wrote {sorted(rows)}"
    assert (rec.times_written("out_ptr") == 1).all(), "every output should be written once"


# ---------------------------------------------------------------------------- equal shares


@interpreted
@pytest.mark.parametrize("shares", [1, 3, 5])
def test_shares_read_each_key_once_too(shares: int) -> None:
    """The fast form cuts sequences, and still no key is read twice."""
    records = importlib.import_module("chapters.chapter05_paged_attention.records")
    run = records.Shares([60, 25, 150, 40], shares)
    for name in ("k_cache", "v_cache"):
        times = run.rec.times_read(name)[..., 0, 0].ravel()
        assert sorted(set(times.tolist())) == [0, 1]
        assert times.sum() == 60 + 25 + 150 + 40
    tiles = [len(mine) for mine in run.tiles()]
    assert sum(tiles) == 4 + 2 + 10 + 3 and max(tiles) - min(tiles) <= shares
