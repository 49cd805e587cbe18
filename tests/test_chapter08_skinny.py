"""Chapter 8: the kernels for a handful of rows, each against its twin in PyTorch.

Without a GPU they run in Triton's interpreter, in float32 and float16, at sizes of a few tiles; the
launches that overlap are for a GPU of compute capability 9 or later only.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
from skinny_helpers import (
    DEVICE,
    DTYPES,
    LAYERS,
    NAN,
    SMALL_TILES,
    TINY,
    Sequences,
    Step,
    assert_close,
    int32,
    make_model,
    normal,
    poisoned,
    silu_and_mul,
)

from minivllm.attention.naive import naive_attention
from minivllm.attention.paged import PagedKVCache
from minivllm.engine import (
    skinny_attention_kernels,
    skinny_gemv_kernels,
    skinny_kernels,
    skinny_split_kernels,
    skinny_sum_kernels,
)
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.engine.skinny_gemv_kernels import Stream
from minivllm.engine.skinny_tuning import SkinnyTuning
from minivllm.layers.layernorm import rms_norm
from minivllm.layers.rotary_embedding import RotaryEmbedding
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.qwen3 import Qwen3ForCausalLM


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stream_of(parts, ids, size, dtype):
    """The residual stream of rows ``ids``, and the float32 sum that it stands for.

    It begins as rows of an embedding; behind a product it is a sum and the product's ``parts``.
    """
    at = torch.tensor(ids, device=DEVICE)
    if parts:
        stream = Stream(normal(len(ids), size), at, normal(parts, len(ids), size))
        return stream, stream.total + stream.parts.sum(dim=0)
    stream = Stream(normal(7, size, dtype=dtype), at)
    return stream, stream.total[at].float()


# ------------------------------------------------------------------ one row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
def test_gemv(dtype, silu):
    """36 rows do not fill the last tile."""
    weight, x = normal(36, 48, dtype=dtype), normal(1, 48, dtype=dtype)
    out = poisoned(1, 1, 18 if silu else 36)
    skinny_gemv_kernels.gemv(weight, x, out, silu=silu, weights=512)
    expected = x.double() @ weight.double().T
    assert_close(out[0], silu_and_mul(expected) if silu else expected, dtype)


@pytest.mark.parametrize("parts", [2, 3])
def test_gemv_leaves_parts_to_be_summed(parts):
    weight, x = normal(16, 48), normal(1, 48)
    out = poisoned(parts, 1, 16)
    skinny_gemv_kernels.gemv(weight, x, out, weights=128)
    assert_close(out.sum(dim=0), x @ weight.T, torch.float32)
    assert not out[0].allclose(out.sum(dim=0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [0, 3])
def test_gemv_normalises_the_residual_stream(dtype, parts):
    weight, gain = normal(20, 48, dtype=dtype), normal(48, dtype=dtype)
    stream, expected_total = stream_of(parts, [5], 48, dtype)
    out, total = poisoned(1, 1, 20), poisoned(1, 48)
    options = {"gain": gain, "total": total, "eps": 1e-3, "weights": 512}
    skinny_gemv_kernels.gemv(weight, stream, out, **options)
    assert_close(total, expected_total, torch.float32)
    normed = rms_norm(expected_total.double(), gain.double(), 1e-3)
    assert_close(out[0], normed @ weight.double().T, dtype)


@pytest.mark.parametrize("parts", [1, 2])
def test_gemv_merges_the_splits_of_attention(parts):
    """The third split is past the end of the sequence, and holds NaN."""
    heads, head_size, splits = 4, 64, 3
    values, lse = normal(splits, 1, heads, head_size), normal(splits, 1, heads)
    values[2], lse[2] = NAN, NAN
    weight, out = normal(8, heads * head_size), poisoned(parts, 1, 8)
    options = {"lse": lse, "context": int32([30]), "min_split": 16, "weights": 1024}
    skinny_gemv_kernels.gemv(weight, values, out, **options)
    share = torch.softmax(lse[:2] * 0.6931471805599453, dim=0)
    merged = (share[..., None] * values[:2]).sum(dim=0).flatten(1)
    assert_close(out.sum(dim=0), merged @ weight.T, torch.float32)


# ------------------------------------------------------------------ 2 to 64 rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("rows", "parts", "size"), [(2, 1, 64), (17, 1, 144), (3, 3, 96)])
def test_skinny_product(dtype, silu, rows, parts, size):
    """A tile takes 64 columns in one go; 144 is more than two of them. 17 rows are padded to 32."""
    if silu and parts > 1:
        pytest.skip("SiLU of a part is not a part of SiLU")
    weight, x = normal(40, size, dtype=dtype), normal(rows, size, dtype=dtype)
    out = poisoned(parts, rows, 20 if silu else 40)
    tile = {"block_n": 32, "block_k": 32, "slices": 2}
    skinny_kernels.skinny_product(weight, x, out, silu=silu, **tile)
    expected = x.double() @ weight.double().T
    assert_close(out.sum(dim=0), silu_and_mul(expected) if silu else expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [0, 2])
def test_sum_and_norm(dtype, parts):
    gain = normal(48, dtype=dtype)
    stream, expected = stream_of(parts, [2, 0, 6], 48, dtype)
    total, out = poisoned(3, 48), poisoned(3, 48, dtype=dtype)
    skinny_sum_kernels.sum_and_norm(stream, gain, total, out, eps=1e-3)
    assert_close(total, expected, torch.float32)
    assert_close(out, rms_norm(expected.double(), gain.double(), 1e-3), dtype)


def check_sum_and_gain(stream, expected, gain, blocks):
    rows, size = expected.shape
    total, out = poisoned(rows, size), poisoned(rows, size, dtype=gain.dtype)
    squares = poisoned(blocks, rows)
    skinny_sum_kernels.sum_and_gain(stream, gain, total, out, squares)
    assert_close(total, expected, torch.float32)
    assert_close(out, expected.double() * gain.double(), gain.dtype)
    assert_close(squares.sum(dim=0), expected.double().square().sum(dim=1), torch.float32)
    return out, squares


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "size", "blocks"), [(0, 48, 1), (2, 300, 2), (3, 512, 4)])
def test_sum_and_gain(dtype, parts, size, blocks):
    """Two programs for 300 columns, which are no power of two."""
    gain = normal(size, dtype=dtype)
    check_sum_and_gain(*stream_of(parts, [2, 0, 6], size, dtype), gain, blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "blocks"), [(0, 1), (2, 3), (1, 1)])
def test_sum_and_gain_leaves_the_division_to_the_product(dtype, parts, blocks):
    """The norm is whole once the squares are divided out, here by the product of one row."""
    gain, weight = normal(48, dtype=dtype), normal(10, 48, dtype=dtype)
    stream, expected = stream_of(parts, [2, 0, 6], 48, dtype)
    out, squares = check_sum_and_gain(stream, expected, gain, blocks)
    for row in range(3):
        product = poisoned(1, 1, 10)
        skinny_gemv_kernels.gemv(
            weight, out[row : row + 1], product, squares=squares[:, row].contiguous(), eps=1e-3
        )
        normed = rms_norm(expected[row : row + 1].double(), gain.double(), 1e-3)
        assert_close(product[0], normed @ weight.double().T, dtype)


# ------------------------------------------------------------------ attention


def expected_attention(qkv, gains, rotary, sequences, heads, eps):
    """What the model and a plain loop give: [P, H, D], and k and v of the new tokens [P, G, D]."""
    kv_heads, head_size = sequences.k.shape[-2:]
    rows = qkv.view(len(qkv), -1, head_size).float()
    q, k, v = rows.split([heads, kv_heads, kv_heads], dim=1)
    if gains is not None:
        q, k = (rms_norm(x, gain.float(), eps) for x, gain in zip((q, k), gains, strict=True))
    q, k = rotary(sequences.positions, q, k)
    out = torch.zeros_like(q)
    for row, slots in enumerate(sequences.slots):
        if slots:
            keys, values = (
                torch.cat([cache[0].flatten(0, 1)[slots[:-1]].float(), new[row : row + 1]])
                for cache, new in ((sequences.k, k), (sequences.v, v))
            )
            out[row] = naive_attention(q[row : row + 1], keys, values, head_size**-0.5)[0]
    return out, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("block_size", [16, 32])
def test_attention(dtype, splits, block_size):
    """Lengths: none, one token, a part of a tile, a tile and one more, several tiles."""
    lengths, heads, kv_heads, head_size = [0, 1, 9, 18, 70], 2, 1, 64
    sequences = Sequences(
        lengths, kv_heads=kv_heads, head_size=head_size, block_size=block_size, dtype=dtype
    )
    rows, eps = len(lengths), 1e-4
    qkv = normal(1, rows, (heads + 2 * kv_heads) * head_size)
    gains = [(1 + 0.1 * normal(head_size)).to(dtype) for _ in range(2)]
    rotary = RotaryEmbedding(head_size, 128, 1e4, device=DEVICE)
    expected, k, v = expected_attention(qkv[0], gains, rotary, sequences, heads, eps)
    before = sequences.k[0].flatten(0, 1).clone()
    out, lse = poisoned(splits, rows, heads, head_size), poisoned(splits, rows, heads)
    skinny_attention_kernels.skinny_attention(
        qkv,
        *gains,
        rotary.table,
        sequences.positions,
        sequences.slot_mapping,
        sequences.tables,
        sequences.context,
        sequences.k[0],
        sequences.v[0],
        out,
        lse,
        eps=eps,
        tile=16,
        min_split=16,
        stages=2,
    )
    attended = out[0]
    if splits > 1:
        attended = poisoned(rows, heads, head_size)
        skinny_split_kernels.merge_splits(out, lse, sequences.context, attended, min_split=16)
    assert attended.isfinite().all()
    assert_close(attended[1:], expected[1:], dtype)
    written = sequences.slot_mapping[1:]
    keys, values = (cache[0].flatten(0, 1) for cache in (sequences.k, sequences.v))
    assert_close(keys[written], k[1:], dtype)
    assert_close(values[written], v[1:], dtype)
    others = torch.ones(len(keys), dtype=torch.bool, device=DEVICE)
    others[written] = False
    assert torch.equal(keys[others].nan_to_num(7.0), before[others].nan_to_num(7.0))


# ------------------------------------------------------------------ the whole step


@pytest.mark.parametrize("model_class", [Qwen3ForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize(("lengths", "norm_inside"), [([37], 2048), ([37], 0), ([20, 0, 1], 2048)])
def test_a_step_gives_the_models_logits(model_class, lengths, norm_inside):
    """Two calls, for buffers are used again; the row of length 0 is padding."""
    model = make_model(model_class, TINY, torch.float32)
    step = Step(TINY, lengths, torch.float32)
    tuning = replace(SMALL_TILES, norm_inside=norm_inside, merge_inside=norm_inside)
    forward = SkinnyForward(model, step.cache, len(lengths), tuning=tuning)
    assert forward.norm_inside == forward.merge_inside == (len(lengths) == 1 and norm_inside > 0)
    expected, cache = step.by_model(model, torch.float32)
    logits = step.by_kernels(forward)
    assert_close(logits[step.real], expected, torch.float32)
    assert logits.data_ptr() == step.by_kernels(forward).data_ptr()
    assert_close(logits[step.real], expected, torch.float32)
    step.assert_stored(cache)


@pytest.mark.parametrize(
    ("change", "rows", "word"),
    [
        ({}, 0, "rows=0"),
        ({}, 65, "rows=65"),
        ({"head_size": 80}, 1, "head_size=80"),
        ({"attention_bias": True}, 1, "attention_bias"),
        ({"mlp_bias": True}, 1, "mlp_bias"),
        ({"hidden_size": 40}, 1, "hidden_size=40"),
        ({"intermediate_size": 100}, 1, "intermediate_size=100"),
    ],
)
def test_what_does_not_fit_is_said(change, rows, word):
    config = replace(TINY, **change)
    assert not SkinnyForward.fits(config, rows, DEVICE)
    assert word in SkinnyForward.why_not(config, rows, DEVICE)
    assert SkinnyForward.fits(TINY, 64, DEVICE)


def test_wrong_inputs_are_named():
    model = make_model(Qwen3ForCausalLM, TINY, torch.float32)
    cache = PagedKVCache(TINY, 2, 16, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match="rows=99"):
        SkinnyForward(model, cache, 99)
    half = PagedKVCache(TINY, 2, 16, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match=r"cache is torch\.float16"):
        SkinnyForward(model, half, 1)
    odd = PagedKVCache(TINY, 2, 24, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match="block_size=24"):
        SkinnyForward(model, odd, 1)
    forward = SkinnyForward(model, cache, 1, tuning=SMALL_TILES)
    ids = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    tables, context = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), int32([1])
    with pytest.raises(ValueError, match=r"context is torch.int64"):
        forward(ids, ids, ids, tables, ids)
    with pytest.raises(ValueError, match=r"input_ids is torch.int64 \(2,\)"):
        forward(torch.cat([ids, ids]), ids, ids, tables, context)
    with pytest.raises(ValueError, match="block_tables has shape"):
        forward(ids, ids, ids, tables[0, :1], context)


# ------------------------------------------------------------------ at real sizes


@pytest.mark.gpu
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize(
    ("rows", "norm_inside"), [(1, 2048), (1, 0), *((rows, 2048) for rows in (2, 8, 17, 32, 64))]
)
def test_a_step_at_real_sizes_in_a_graph(rows, norm_inside, dependent):
    """bfloat16, ragged contexts, replayed many times: a race would change the result."""
    lengths = [1 + 97 * i % 700 for i in range(rows)]
    lengths[0] = 1500
    model = make_model(Qwen3ForCausalLM, LAYERS, torch.bfloat16)
    wide = make_model(Qwen3ForCausalLM, LAYERS, torch.float32)
    wide.load_state_dict(model.state_dict())
    step = Step(LAYERS, lengths, torch.bfloat16, block_size=64)
    exact, _ = step.by_model(wide, torch.float32)
    plain, _ = step.by_model(model, torch.bfloat16)
    inside = {"norm_inside": norm_inside, "merge_inside": norm_inside}
    tuning = replace(SkinnyTuning.for_rows(rows), dependent=dependent, **inside)
    forward = SkinnyForward(model, step.cache, rows, tuning=tuning)
    step.by_kernels(forward)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step.by_kernels(forward)
    seen = []
    for _ in range(20):
        logits.fill_(NAN)
        graph.replay()
        seen.append(logits.clone())
    assert all(torch.equal(seen[0], other) for other in seen)

    def error(x):
        return ((x.float() - exact).norm() / exact.norm()).item()

    assert error(seen[0]) <= 1.5 * error(plain)
    # New tokens at the same addresses: nothing of the first ones was kept.
    step.ids.copy_((step.ids + 1) % LAYERS.vocab_size)
    exact, _ = step.by_model(wide, torch.float32)
    graph.replay()
    assert error(logits) <= 1.5 * error(plain) + 0.01
