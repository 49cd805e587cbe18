"""Chapter 4: attention without the score matrix, in PyTorch and in Triton, against float64."""

import math

import pytest
import torch

from minivllm.attention import flash

pytest.importorskip("triton")
from minivllm.attention import flash_kernels as kernels
from minivllm.attention import flash_order_kernels as order_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = kernels.FlashTile(16, 16, 4, 2)


def reference(q, k, v, lengths, scale):
    """Causal attention of each sequence in float64, scores and all: [T, H, D]."""
    group = q.shape[1] // k.shape[1]
    outs, begin = [], 0
    for length in lengths:
        rows = slice(begin, begin + length)
        begin += length
        q64, k64, v64 = (x[rows].double() for x in (q, k, v))
        k64, v64 = (x.repeat_interleave(group, dim=1) for x in (k64, v64))
        scores = torch.einsum("qhd,khd->hqk", q64, k64) * scale
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v64))
    return torch.cat(outs)


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def make_batch(lengths, num_heads, num_kv_heads, head_size, dtype, seed=0):
    """q, k, v as views of one fused tensor, the way a fused projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    width = (num_heads + 2 * num_kv_heads) * head_size
    qkv = torch.randn(sum(lengths), width, generator=generator).to(DEVICE, dtype)
    sizes = [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
    q, k, v = (x.unflatten(1, (-1, head_size)) for x in qkv.split(sizes, dim=1))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return q, k, v, cu_seqlens


# ------------------------------------------------------------------ online softmax, in PyTorch


@pytest.mark.parametrize("tile", [1, 3, 7, 16, 100])
def test_online_softmax_does_not_depend_on_the_tile(tile):
    q, k, v, _ = make_batch([23], 4, 2, 16, torch.float64)
    out = flash.attend_in_tiles(q, k, v, scale=0.25, tile=tile)
    assert relative_error(out, reference(q, k, v, [23], 0.25)) < 1e-14


def test_online_softmax_step_keeps_the_running_values_it_promises():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 12, generator=generator, dtype=torch.float64) * 10
    values = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    row_max = torch.full((5,), float("-inf"), dtype=torch.float64)
    row_sum, acc = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    for start in range(0, 12, 4):
        end = start + 4
        row_max, row_sum, acc = flash.online_softmax_step(
            row_max, row_sum, acc, scores[:, start:end], values[start:end]
        )
        seen = scores[:, :end]
        weights = (seen - seen.amax(1, keepdim=True)).exp()
        assert torch.equal(row_max, seen.amax(1))
        assert torch.allclose(row_sum, weights.sum(1), rtol=1e-12)
        assert torch.allclose(acc, weights @ values[:end], rtol=1e-12)


def test_online_softmax_survives_scores_that_exp_would_not():
    scores = torch.tensor([[800.0, 900.0, 1000.0, -1000.0]])
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    state = torch.full((1,), float("-inf")), torch.zeros(1), torch.zeros(1, 1)
    for i in range(4):
        state = flash.online_softmax_step(*state, scores[:, i : i + 1], values[i : i + 1])
    assert (state[2] / state[1].unsqueeze(-1)).item() == pytest.approx(3.0)


def test_queries_may_be_the_last_of_their_sequence():
    q, k, v, _ = make_batch([20], 4, 2, 16, torch.float64)
    whole = reference(q, k, v, [20], 0.25)
    out = flash.attend_in_tiles(q[13:], k, v, scale=0.25, tile=8)
    assert relative_error(out, whole[13:]) < 1e-14


def test_torch_form_of_a_flattened_batch():
    lengths = [1, 9, 0, 30]
    q, k, v, cu_seqlens = make_batch(lengths, 6, 3, 8, torch.float64)
    out = flash.flash_attention(q, k, v, cu_seqlens, scale=0.3, max_seqlen=30, tile=8)
    assert relative_error(out, reference(q, k, v, lengths, 0.3)) < 1e-14


# ------------------------------------------------------------------ the kernel


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
def test_kernel_equals_float64(head_size, num_heads, num_kv_heads, dtype):
    lengths = [1, 16, 37]
    q, k, v, cu_seqlens = make_batch(lengths, num_heads, num_kv_heads, head_size, dtype)
    scale = head_size**-0.5
    out = torch.full(q.shape, float("nan"), dtype=dtype, device=DEVICE)
    kernels.flash_attention_tiled(
        q, k, v, cu_seqlens, scale=scale, max_seqlen=37, out=out, tile=SMALL
    )
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    assert relative_error(out, reference(q, k, v, lengths, scale)) < limit


@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (64, 64)])
def test_kernel_does_not_depend_on_its_tile(tile):
    lengths = [50, 3, 65]
    q, k, v, cu_seqlens = make_batch(lengths, 2, 1, 32, torch.float32)
    tile = kernels.FlashTile(*tile, 4, 2)
    out = kernels.flash_attention_tiled(q, k, v, cu_seqlens, scale=0.2, max_seqlen=65, tile=tile)
    assert relative_error(out, reference(q, k, v, lengths, 0.2)) < 1e-6


def test_kernel_keeps_sequences_apart():
    """Not even a NaN leaves its sequence, though tiles reach over the borders."""
    lengths = [5, 20, 9]
    q, k, v, cu_seqlens = make_batch(lengths, 2, 1, 32, torch.float32)
    expected = reference(q, k, v, lengths, 0.2)
    q[5:25], k[5:25], v[5:25] = (float("nan"),) * 3
    out = kernels.flash_attention(q, k, v, cu_seqlens, scale=0.2, max_seqlen=20)
    others = [*range(5), *range(25, 34)]
    assert relative_error(out[others], expected[others]) < 1e-6


def test_kernel_survives_large_scores():
    q, k, v, cu_seqlens = make_batch([20], 2, 1, 32, torch.float32)
    q, k = q * 100, k * 100  # scores of about 1e4: exp would overflow
    out = kernels.flash_attention(q, k, v, cu_seqlens, scale=0.2, max_seqlen=20)
    assert relative_error(out, reference(q, k, v, [20], 0.2)) < 1e-3


def test_kernel_on_nothing():
    q, k, v, cu_seqlens = make_batch([0], 2, 1, 32, torch.float32)
    out = kernels.flash_attention(q, k, v, cu_seqlens, scale=0.2, max_seqlen=0)
    assert out.shape == (0, 2, 32)


@pytest.mark.parametrize("paged", [False, True])
def test_order_of_blocks_is_longest_first(paged):
    """Every block once, by the number of keys it has to visit."""
    query_lens, contexts = [40, 3, 0, 100, 16], [7, 90, 0, 0, 64]
    cu_query_lens = torch.tensor([0, *query_lens]).cumsum(0).to(DEVICE, torch.int32)
    lengths = torch.tensor(query_lens) + torch.tensor(contexts)
    order = torch.full((1 + 14, 2), -1, dtype=torch.int32, device=DEVICE)
    order_kernels.order_blocks_kernel[(7, 5)](
        order, cu_query_lens, lengths.to(DEVICE, torch.int32), 5, M=16, BLOCK_B=8, PAGED=paged
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
def test_bad_input_names_both_sides(change, message):
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
    return relative_error(torch.cat(outs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_error_is_that_of_pytorch(head_size, dtype):
    lengths = [1, 700, 64, 129, 2000]
    q, k, v, cu_seqlens = make_batch(lengths, 8, 2, head_size, dtype, seed=head_size)
    scale = head_size**-0.5
    expected = reference(q, k, v, lengths, scale)
    limit = 1.5 * sdpa_error(q, k, v, lengths, scale, expected)
    for form in (kernels.flash_attention, kernels.flash_attention_tiled):
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=DEVICE)
        form(q, k, v, cu_seqlens, scale=scale, max_seqlen=2000, out=out)
        assert relative_error(out, expected) <= limit


@pytest.mark.gpu
def test_gpu_ragged_batch_and_a_stray_nan():
    """Many short sequences beside a long one take the ordered list of blocks."""
    lengths = [*range(1, 60), 5000, 0, 128, 127]
    q, k, v, cu_seqlens = make_batch(lengths, 4, 2, 128, torch.bfloat16)
    expected = reference(q, k, v, lengths, 0.1)
    bad = slice(sum(lengths[:30]), sum(lengths[:31]))
    k[bad], v[bad] = float("nan"), float("nan")
    out = kernels.flash_attention(q, k, v, cu_seqlens, scale=0.1, max_seqlen=5000)
    good = torch.ones(len(q), dtype=torch.bool, device=DEVICE)
    good[bad] = False
    assert relative_error(out[good], expected[good]) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 128, 129, 3000])
@pytest.mark.parametrize("head_size", [64, 128])
def test_gpu_single_sequence(length, head_size):
    """Fewer blocks than programs, and a last round that is not full."""
    q, k, v, cu_seqlens = make_batch([length], 6, 2, head_size, torch.float16)
    out = kernels.flash_attention(q, k, v, cu_seqlens, scale=0.1, max_seqlen=length)
    assert relative_error(out, reference(q, k, v, [length], 0.1)) < 1e-3
