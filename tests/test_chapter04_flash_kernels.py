"""Chapter 4's Triton kernels: values against float64, counts from the recorder.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

import contextlib
import functools
import importlib
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flash_helpers import (
    DEVICE,
    assert_close,
    assert_toy,
    boundaries,
    make_batch,
    norm_error,
    reference,
)
from helpers import oracle_logits, random_prompt, relative_error, save_checkpoint, tiny_qwen3

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")
import triton.language as tl  # noqa: E402

from minivllm.attention import flash  # noqa: E402
from minivllm.attention import flash_kernels as kernels  # noqa: E402
from minivllm.attention import flash_order_kernels as order_kernels  # noqa: E402
from minivllm.attention.naive import naive_attention  # noqa: E402
from minivllm.models.loader import load_model  # noqa: E402

toy = importlib.import_module("chapters.chapter04_flash_attention.toy")
Recorder = importlib.import_module("recorder").Recorder

INTERPRETED = bool(triton.knobs.runtime.interpret)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the recorder needs the interpreter")
SMALL = kernels.FlashTile(16, 16, 4, 2)


def by_kernel(q, k, v, lengths, scale, tile=SMALL):
    """The kernel's result, written over NaN; in the interpreter every address is checked."""
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    with Recorder(register_arguments=True) if INTERPRETED else contextlib.nullcontext():
        found = kernels.flash_attention_tiled(
            q,
            k,
            v,
            boundaries(lengths),
            scale=scale,
            max_seqlen=max(lengths, default=0),
            out=out,
            tile=tile,
        )
    assert found is out
    return out


# ------------------------------------------------------------------ one tile

attend_to_tile = kernels.attend_to_tile


@triton.jit
def one_tile_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    visible_ptr,
    max_ptr,
    sum_ptr,
    acc_ptr,
    scale_log2,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, cols, dims = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :])
    k = tl.load(k_ptr + cols[:, None] * D + dims[None, :])
    v = tl.load(v_ptr + cols[:, None] * D + dims[None, :])
    visible = tl.load(visible_ptr + rows[:, None] * N + cols[None, :]) != 0
    row_max, row_sum = tl.load(max_ptr + rows), tl.load(sum_ptr + rows)
    acc_at = acc_ptr + rows[:, None] * D + dims[None, :]
    row_max, row_sum, acc = attend_to_tile(
        q, k, v, visible, row_max, row_sum, tl.load(acc_at), scale_log2, PRECISION
    )
    tl.store(max_ptr + rows, row_max)
    tl.store(sum_ptr + rows, row_sum)
    tl.store(acc_at, acc)


class RunningTile:
    """16 rows of queries and their running values; takes tiles of 16 keys by the real helper."""

    def __init__(self, q: torch.Tensor, scale: float) -> None:
        self.q, self.scale = q.to(DEVICE), scale
        self.row_max = torch.full((16,), kernels.LOWEST.value, device=DEVICE)
        self.row_sum = torch.zeros(16, device=DEVICE)
        self.acc = torch.zeros(16, q.shape[1], device=DEVICE)

    def take(self, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> None:
        k, v, visible = (x.contiguous().to(DEVICE) for x in (k, v, visible))
        one_tile_kernel[(1,)](
            self.q,
            k,
            v,
            visible.int(),
            self.row_max,
            self.row_sum,
            self.acc,
            self.scale * math.log2(math.e),
            M=16,
            N=16,
            D=self.q.shape[1],
            PRECISION="ieee",
        )


def padded(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] in the corner of a [16, 16] tile of zeros."""
    tile = torch.zeros(16, 16)
    tile[: x.shape[0], : x.shape[1]] = x
    return tile


def test_attend_to_tile_on_the_toy() -> None:
    """The toy's last token in row 0; the other 15 rows see nothing."""
    running = RunningTile(padded(toy.ASKING[-1:]), toy.SCALE)
    visible = padded(torch.ones(1, toy.TILE))
    for tile in range(3):
        keys = slice(toy.TILE * tile, toy.TILE * (tile + 1))
        running.take(padded(toy.KEYS[keys]), padded(toy.VALUES[keys]), visible)
        after = f"after tile {tile}"
        largest = f"row_max {after}, the largest scale_log2 * x"
        assert_toy(running.row_max[:1], toy.MAX[tile : tile + 1], largest)
        assert_toy(running.row_sum[:1], toy.SUM[tile : tile + 1], f"row_sum {after}")
        assert_toy(running.acc[:1, :2], toy.ACC[tile : tile + 1], f"acc {after}")


def test_attend_to_tile_equals_the_step_in_pytorch() -> None:
    generator = torch.Generator().manual_seed(3)
    q = 3 * torch.randn(16, 32, generator=generator)
    running = RunningTile(q, 0.3)
    state = torch.full((16,), float("-inf")), torch.zeros(16), torch.zeros(16, 32)
    for tile in range(3):
        k, v = torch.randn(2, 16, 32, generator=generator)
        visible = torch.rand(16, 16, generator=generator) < 0.7
        running.take(k, v, visible)
        scores = (q @ k.T * 0.3).masked_fill(~visible, float("-inf"))
        state = flash.online_softmax_step(*state, scores, v)
        after = f"after tile {tile}"
        row_max = state[0] * math.log2(math.e)
        largest = f"row_max {after}, the largest scale_log2 * x"
        assert_close(running.row_max.cpu(), row_max, 1e-6, largest)
        assert_close(running.row_sum.cpu(), state[1], 1e-5, f"row_sum {after}")
        assert_close(running.acc.cpu(), state[2], 1e-5, f"acc {after}")


def test_attend_to_tile_of_a_row_that_sees_nothing() -> None:
    """Its sum stays 0, and a later tile finds it as new."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = torch.randn(3, 16, 16, generator=generator)
    running = RunningTile(q, 0.25)
    running.take(k, v, torch.zeros(16, 16))
    assert not running.row_sum.any(), f"the sum of nothing is {running.row_sum[0]:.3g}, not 0"
    assert not running.acc.any(), "acc must stay 0 while a row has seen nothing"
    running.take(k, v, torch.ones(16, 16))
    out = running.acc / running.row_sum[:, None]
    assert_close(out.cpu(), (q @ k.T * 0.25).softmax(dim=-1) @ v, 1e-6, "the tile after it")


def test_attend_to_tile_in_half_precision() -> None:
    """q, k and v in float16, the running values in float32; tl.dot wants both its sides alike."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 16, 16, generator=generator).half()
    running = RunningTile(q, 0.25)
    running.take(k, v, torch.ones(16, 16))
    out = running.acc / running.row_sum[:, None]
    expected = (q.double() @ k.double().T * 0.25).softmax(dim=-1) @ v.double()
    assert_close(out.cpu(), expected, 1e-3, "a tile of float16")


# ------------------------------------------------------------------ the kernel


def test_flash_kernel_on_the_toy() -> None:
    """6 and 3 tokens end to end. The interpreter takes tiles of 2 x 2; a GPU wants 16 at least."""
    q, k, v = (tensor[toy.BATCH].to(DEVICE) for tensor in (toy.Q, toy.K, toy.V))
    tile = kernels.FlashTile(toy.TILE, toy.TILE, 4, 2) if INTERPRETED else SMALL
    out = by_kernel(q, k, v, [6, 3], toy.SCALE, tile)
    expected = naive_attention(toy.Q, toy.K, toy.V, toy.SCALE)[toy.BATCH]
    assert_toy(out[:, 0], expected[:, 0], "the output of the two sequences")
    assert_toy(out[5, 0], toy.LAST, "the output of token 5")


@pytest.mark.parametrize(
    ("head_size", "num_heads", "num_kv_heads", "dtype"),
    [
        (32, 2, 2, torch.float32),
        (64, 4, 1, torch.float16),
        (80, 2, 1, torch.float32),
        (96, 2, 2, torch.float16),
        (128, 4, 2, torch.float16),
        (256, 2, 1, torch.float32),
    ],
)
def test_flash_kernel(head_size, num_heads, num_kv_heads, dtype) -> None:
    lengths = [1, 16, 37]
    q, k, v, _ = make_batch(lengths, num_heads, num_kv_heads, head_size, dtype)
    out = by_kernel(q, k, v, lengths, head_size**-0.5)
    expected = reference(q, k, v, lengths, head_size**-0.5)
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        what = (
            f"{num_heads} heads on {num_kv_heads} KV heads of {head_size} numbers: the sequence "
            f"from token {begin} to {begin + length - 1}"
        )
        assert_close(out[rows], expected[rows], limit, what)
        begin += length


@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (64, 64)])
def test_flash_kernel_does_not_depend_on_its_tile(tile) -> None:
    lengths = [50, 3, 65]
    q, k, v, _ = make_batch(lengths, 2, 1, 32, torch.float32)
    out = by_kernel(q, k, v, lengths, 0.2, kernels.FlashTile(*tile, 4, 2))
    expected = reference(q, k, v, lengths, 0.2)
    assert_close(out, expected, 1e-6, f"{tile[0]} rows and {tile[1]} keys a step")


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_flash_kernel_keeps_sequences_apart() -> None:
    """Not even a NaN leaves its sequence, though tiles reach over the borders."""
    lengths = [5, 20, 9]
    q, k, v, _ = make_batch(lengths, 2, 1, 32, torch.float32)
    expected = reference(q, k, v, lengths, 0.2)
    q[5:25], k[5:25], v[5:25] = (float("nan"),) * 3
    out = by_kernel(q, k, v, lengths, 0.2)
    others = [*range(5), *range(25, 34)]
    assert_close(out[others], expected[others], 1e-6, "the sequences beside one full of NaN")


def test_flash_kernel_survives_large_scores() -> None:
    q, k, v, _ = make_batch([20], 2, 1, 32, torch.float32)
    q, k = q * 100, k * 100  # scores of about 1e4: exp would overflow
    out = by_kernel(q, k, v, [20], 0.2)
    assert_close(out, reference(q, k, v, [20], 0.2), 1e-3, "scores of about 10,000")


def test_flash_kernel_on_nothing() -> None:
    q, k, v, cu_seqlens = make_batch([0], 2, 1, 32, torch.float32)
    out = kernels.flash_attention(q, k, v, cu_seqlens, scale=0.2, max_seqlen=0)
    assert out.shape == (0, 2, 32)


@torch.inference_mode()
def test_model_on_the_flash_kernel_equals_transformers(tmp_path: Path) -> None:
    theirs = tiny_qwen3(seed=1)
    ours = load_model(save_checkpoint(theirs, tmp_path), device=DEVICE)
    prompts = [random_prompt(length, seed=length) for length in (5, 18)]
    scale = ours.config.head_size**-0.5
    attend = flash.FlashAttention([0, 5, 23], scale, form=kernels.flash_attention, device=DEVICE)
    input_ids = torch.tensor([token for prompt in prompts for token in prompt], device=DEVICE)
    positions = torch.cat([torch.arange(5), torch.arange(18)]).to(DEVICE)
    with Recorder(register_arguments=True) if INTERPRETED else contextlib.nullcontext():
        logits = ours.compute_logits(ours(input_ids, positions, attend)).cpu()
    for prompt, mine in zip(prompts, logits.split((5, 18)), strict=True):
        error = relative_error(mine, oracle_logits(theirs, prompt))
        assert error < 1e-5, f"the sequence of {len(prompt)} tokens is off by {error:.2g}"


# ------------------------------------------------------------------ counts

LENGTHS = [40, 10]


@functools.cache
def recording(block_m: int = 16) -> "Recorder":
    """40 and 10 tokens, 4 query heads on 2 KV heads, in tiles of block_m rows and 16 keys."""
    generator = torch.Generator().manual_seed(8)
    q = torch.randn(50, 4, 16, generator=generator)
    k, v = torch.randn(2, 50, 2, 16, generator=generator)
    cu_seqlens = boundaries(LENGTHS)
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}
    with Recorder(tensors, register_arguments=True) as rec:
        kernels.flash_attention_tiled(
            q,
            k,
            v,
            cu_seqlens,
            scale=0.25,
            max_seqlen=40,
            tile=kernels.FlashTile(block_m, 16, 4, 2),
        )
    return rec


def rows_written(rec: "Recorder") -> dict[tuple[int, int, int], list[int]]:
    """Which tokens of the flattened batch each program writes; none for those past an end."""
    return {
        program: sorted({int(token) for event in events for token in event.index[0]})
        for program, events in rec.stores_by_program("out_ptr").items()
    }


def span(tokens: Iterable[int]) -> str:
    """The first and the last of some tokens, and how many they are where some lie between."""
    found = sorted(tokens)
    if not found:
        return "none"
    gaps = "" if found[-1] - found[0] + 1 == len(found) else f", {len(found)} of them"
    return f"{found[0]} to {found[-1]}{gaps}"


@interpreted
@pytest.mark.parametrize("block_m", [16, 32])
def test_flash_kernel_never_loads_a_tile_right_of_the_diagonal(block_m: int) -> None:
    rec = recording(block_m)
    for program, rows in rows_written(rec).items():
        begin = 40 * program[2]
        for name in ("k", "v"):
            events = rec.loads_by_program(name)[program]
            read = {int(token) for event in events for token in event.index[0]}
            if not rows:
                assert not read, (
                    f"program {program} has no rows, for its sequence ends before them; it should "
                    f"return at once, but it read {name} of tokens {span(read)}"
                )
                continue
            assert read == set(range(begin, rows[-1] + 1)), (
                f"program {program} writes tokens {rows[0]} to {rows[-1]}, so it needs {name} of "
                f"tokens {begin} to {rows[-1]}; it read {span(read)}"
            )


@interpreted
@pytest.mark.parametrize("block_m", [16, 32])
def test_flash_kernel_reads_a_key_once_for_each_block_from_its_own_on(block_m: int) -> None:
    """And for each of the 2 query heads of a group: 6, 4 and 2 times in blocks of 16 rows."""
    rec = recording(block_m)
    for name in ("k", "v"):
        times = rec.times_read(name)
        for length, begin in ((40, 0), (10, 40)):
            blocks = math.ceil(length / block_m)
            for token in range(length):
                expected = 2 * (blocks - token // block_m)
                found = set(times[begin + token].flatten().tolist())
                assert found == {expected}, (
                    f"{name} of token {token} of {length} is read {found} times; {blocks} blocks "
                    f"of {block_m} rows and 2 query heads to a KV head make it {expected}"
                )
    assert (rec.times_read("q") == 1).all(), "every query should be read once"


@interpreted
def test_flash_kernel_holds_one_tile_at_a_time() -> None:
    """16 keys of 16 numbers in one load, however long the sequence."""
    for name in ("k", "v"):
        lanes = max(event.mask.size for event in recording().select(name, "load"))
        assert lanes <= 16 * 16, f"a load of {name} has {lanes} lanes; a tile has 16 x 16"


@interpreted
def test_flash_kernel_stores_its_output_and_nothing_else() -> None:
    assert {event.tensor for event in recording().select(kind="store")} == {"out_ptr"}
    assert (recording().times_written("out_ptr") == 1).all(), "every output should be written once"
    assert not recording().select("out_ptr", "load"), "an output is written, never read"


@interpreted
def test_flash_kernel_starts_with_the_last_rows() -> None:
    """They have the longest way to go; programs past the end of a sequence write nothing."""
    written = rows_written(recording())
    assert len(written) == 3 * 4 * 2
    for head in range(4):
        blocks = [written[block, head, 0] for block in range(3)]
        expected = [list(range(32, 40)), list(range(16, 32)), list(range(16))]
        assert blocks == expected, (
            f"programs 0, 1 and 2 of head {head} wrote tokens {', '.join(map(span, blocks))};\n"
            f"should be {', '.join(map(span, expected))}: program 0 takes the last block"
        )
        assert [len(written[block, head, 1]) for block in range(3)] == [0, 0, 10]


# ------------------------------------------------------------------ the order of a ragged batch


@pytest.mark.parametrize("paged", [False, True])
def test_order_of_blocks_is_longest_first(paged) -> None:
    """Every block once, by the number of keys it has to visit."""
    query_lens, contexts = [40, 3, 0, 100, 16], [7, 90, 0, 0, 64]
    cu_query_lens = boundaries(query_lens)
    lengths = torch.tensor(query_lens) + torch.tensor(contexts)
    order = torch.full((1 + 14, 2), -1, dtype=torch.int32, device=DEVICE)
    order_kernels.order_blocks_kernel[(7, 5)](
        order, cu_query_lens, lengths.to(DEVICE, torch.int32), 5, M=16, BLOCK_B=2, PAGED=paged
    )
    count = int(order[0, 0])
    blocks = [tuple(row) for row in order[1 : 1 + count].tolist()]
    assert sorted(blocks) == [(s, i) for s in range(5) for i in range(-(-query_lens[s] // 16))]
    keys = [i + (contexts[s] // 16 if paged else 0) for s, i in blocks]
    assert keys == sorted(keys, reverse=True)
    assert (order[1 + count :] == -1).all()


# ------------------------------------------------------------------ bad input


def good_arguments():
    q, k, v, cu_seqlens = make_batch([4, 2], 4, 2, 16, torch.float32)
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens": cu_seqlens,
        "scale": 0.25,
        "max_seqlen": 4,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(6, 3, 16), "v": torch.zeros(6, 3, 16)}, "q has 4 heads .* have 3"),
        ({"v": torch.zeros(6, 2, 8)}, r"k has shape \(6, 2, 16\) but v \(6, 2, 8\)"),
        ({"k": torch.zeros(5, 2, 16), "v": torch.zeros(5, 2, 16)}, "q has 6 tokens .* have 5"),
        ({"q": torch.zeros(6, 4, 16).half()}, "q is torch.float16 but k is torch.float32"),
        ({"q": torch.zeros(6, 4, 16).long()}, "q is torch.int64; use float32"),
        ({"q": torch.zeros(6, 64)}, r"q has shape \(6, 64\); give \[tokens, heads, size\]"),
        ({"q": torch.zeros(6, 4, 32)}, "q has head size 32 but k and v have 16"),
        ({"q": torch.zeros(6, 16, 4).transpose(1, 2)}, "q has stride 4 .*contiguous"),
        ({"cu_seqlens": torch.tensor([0, 4, 6])}, "cu_seqlens is torch.int64; it must be int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens is empty"),
        ({"max_seqlen": 7}, "max_seqlen=7 is outside 0 to the 6 tokens"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"scale": math.nan}, "scale=nan must be positive"),
        ({"out": torch.zeros(6, 4, 8)}, r"out is torch.float32 \(6, 4, 8\) .* they must be equal"),
    ],
)
def test_bad_input_names_both_sides(change, message) -> None:
    arguments = {
        **good_arguments(),
        **{
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
            for name, value in change.items()
        },
    }
    with pytest.raises(ValueError, match=message):
        kernels.flash_attention(**arguments)
    if "out" not in change:
        with pytest.raises(ValueError, match=message):
            flash.flash_attention(**arguments)


# ------------------------------------------------------------------ on a GPU


def sdpa_error(q, k, v, lengths, scale, expected):
    """The relative error that PyTorch's own attention makes on the same input."""
    outs, begin = [], 0
    for length in lengths:
        rows = slice(begin, begin + length)
        begin += length
        queries, keys, values = (x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
        outs.append(out.squeeze(0).transpose(0, 1))
    return norm_error(torch.cat(outs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_error_is_that_of_pytorch(head_size, dtype) -> None:
    lengths = [1, 700, 64, 129, 2000]
    q, k, v, cu_seqlens = make_batch(lengths, 8, 2, head_size, dtype, seed=head_size)
    scale = head_size**-0.5
    expected = reference(q, k, v, lengths, scale)
    limit = 1.5 * sdpa_error(q, k, v, lengths, scale, expected)
    for form in (kernels.flash_attention, kernels.flash_attention_tiled):
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=DEVICE)
        form(q, k, v, cu_seqlens, scale=scale, max_seqlen=2000, out=out)
        assert norm_error(out, expected) <= limit


@pytest.mark.gpu
def test_gpu_ragged_batch_and_a_stray_nan() -> None:
    """Many short sequences beside a long one take the ordered list of blocks."""
    lengths = [*range(1, 60), 5000, 0, 128, 127]
    q, k, v, cu_seqlens = make_batch(lengths, 4, 2, 128, torch.bfloat16)
    expected = reference(q, k, v, lengths, 0.1)
    bad = slice(sum(lengths[:30]), sum(lengths[:31]))
    k[bad], v[bad] = float("nan"), float("nan")
    out = kernels.flash_attention(q, k, v, cu_seqlens, scale=0.1, max_seqlen=5000)
    good = torch.ones(len(q), dtype=torch.bool, device=DEVICE)
    good[bad] = False
    assert norm_error(out[good], expected[good]) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 128, 129, 3000])
@pytest.mark.parametrize("head_size", [64, 128])
def test_gpu_single_sequence(length, head_size) -> None:
    """Fewer blocks than programs, and a last round that is not full."""
    q, k, v, cu_seqlens = make_batch([length], 6, 2, head_size, torch.float16)
    out = kernels.flash_attention(q, k, v, cu_seqlens, scale=0.1, max_seqlen=length)
    assert norm_error(out, reference(q, k, v, [length], 0.1)) < 1e-3
