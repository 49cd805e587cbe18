"""Chapter 8: heads summed from parts, and steps with attention from outside, or on Hopper.

Without a GPU the kernels run in Triton's interpreter.
"""

from dataclasses import replace
from types import SimpleNamespace

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
    Step,
    assert_close,
    hopper_only,
    make_model,
    normal,
    poisoned,
)

from minivllm.attention.naive import naive_attention
from minivllm.attention.paged_triton import TritonAttention
from minivllm.engine import step_forms
from minivllm.engine.fused_heads_kernels import qk_norm_rope_store
from minivllm.engine.skinny_buffers import Scratch
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.engine.skinny_tuning import SkinnyTuning
from minivllm.layers.layernorm import rms_norm
from minivllm.layers.rotary_embedding import RotaryEmbedding
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.qwen3 import Qwen3ForCausalLM


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------ heads, from parts


class Parts:
    """Parts of a projection, among NaN; all that nobody may read or write is NaN, too."""

    def __init__(self, parts, tokens, dtype, *, norm=True, heads=3, kv_heads=2, size=16):
        self.sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": size}
        width = (heads + 2 * kv_heads) * size
        around = poisoned(parts, tokens + 2, width + 24)
        self.qkv = around[:, 1:-1, 8:-16]
        self.qkv.copy_(normal(parts, tokens, width))
        self.gains = [None, None]
        if norm:
            self.gains = [(1 + 0.3 * normal(size)).to(dtype) for _ in range(2)]
        self.eps = 1e-3
        self.rotary = RotaryEmbedding(size, 64, 1e4, device=DEVICE)
        self.positions = torch.randperm(64, device=DEVICE)[:tokens]
        self.table = torch.full_like(self.rotary.table, NAN)
        self.table[self.positions] = self.rotary.table[self.positions]
        self.slots = torch.randperm(32, device=DEVICE)[:tokens]
        self.slots[1::3] = -1
        self.caches = [poisoned(2, 16, kv_heads, size, dtype=dtype) for _ in range(2)]

    def __call__(self, qkv=None, caches=None):
        return qk_norm_rope_store(
            self.qkv if qkv is None else qkv,
            *self.gains,
            self.eps,
            self.table,
            self.positions,
            self.slots,
            *(caches or self.caches),
            **self.sizes,
        )

    def expected(self):
        """In float64: q [T, H, D], k and v [T, G, D]."""
        heads, kv_heads, size = self.sizes.values()
        summed = self.qkv.double().sum(dim=0).unflatten(1, (-1, size))
        q, k, v = summed.split([heads, kv_heads, kv_heads], dim=1)
        if self.gains[0] is not None:
            q, k = (
                rms_norm(x, gain.double(), self.eps)
                for x, gain in zip((q, k), self.gains, strict=True)
            )
        return (*self.rotary(self.positions, q.float(), k.float()), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "norm"), [(1, True), (3, True), (4, False)])
def test_heads_are_summed_from_parts(dtype, parts, norm):
    heads = Parts(parts, 4, dtype, norm=norm)
    q = heads()
    assert q.dtype == dtype and q.is_contiguous()
    expected_q, expected_k, expected_v = heads.expected()
    assert_close(q, expected_q, dtype)
    written = heads.slots >= 0
    slots = heads.slots[written]
    for cache, expected in zip(heads.caches, (expected_k, expected_v), strict=True):
        rows = cache.flatten(0, 1)
        assert_close(rows[slots], expected[written], dtype)
        others = torch.ones(len(rows), dtype=torch.bool, device=DEVICE)
        others[slots] = False
        assert rows[others].isnan().all(), "a slot of nobody was written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_the_sum_of_their_parts_in_this_order(dtype):
    """Neither norm nor RoPE touches them: one rounding, at the end."""
    heads = Parts(3, 4, dtype)
    heads()
    summed = heads.qkv[0] + heads.qkv[1] + heads.qkv[2]
    values = summed.unflatten(1, (-1, 16))[:, -2:].to(dtype)
    written = heads.slots >= 0
    stored = heads.caches[1].flatten(0, 1)[heads.slots[written]]
    assert torch.equal(stored, values[written])


def test_one_part_is_the_projection_itself():
    heads = Parts(1, 4, torch.float32)
    q = heads()
    caches = [cache.clone() for cache in heads.caches]
    assert torch.equal(q, heads(heads.qkv[0]))
    for before, after in zip(caches, heads.caches, strict=True):
        assert torch.equal(before.nan_to_num(9.0), after.nan_to_num(9.0))


def test_parts_of_many_tokens_take_larger_programs(monkeypatch):
    monkeypatch.setattr("minivllm.engine.fused_heads_kernels.MANY_TOKENS", 2)
    heads = Parts(2, 3, torch.float32, heads=11, kv_heads=4)
    assert_close(heads(), heads.expected()[0], torch.float32)


def test_no_tokens_in_parts():
    heads = Parts(2, 0, torch.float16)
    q = heads()
    assert q.shape == (0, 3, 16) and q.dtype == torch.float16


def test_parts_that_do_not_fit_are_refused():
    heads = Parts(2, 4, torch.float16)
    with pytest.raises(ValueError, match=r"give \[T, numbers\]"):
        heads(heads.qkv.half())  # parts are float32
    with pytest.raises(ValueError, match="need rows of 112 in one piece"):
        heads(heads.qkv[..., 1:])
    with pytest.raises(ValueError, match=r"give \[T, numbers\]"):
        heads(heads.qkv[None])
    with pytest.raises(ValueError, match="need rows of 112 in one piece"):
        heads(heads.qkv.transpose(0, 2).contiguous().transpose(0, 2))
    with pytest.raises(ValueError, match=r"qkv is torch\.float32 but k_cache torch\.float16"):
        heads(heads.qkv[0])  # one row a token must be in the cache's dtype
    k_cache, v_cache = heads.caches
    with pytest.raises(ValueError, match=r"k_cache torch\.float16 and v_cache torch\.float32"):
        heads(caches=[k_cache, v_cache.float()])


# ------------------------------------------------------------------ a step with another's attention


class PlainAttention:
    """Attention over slots, one sequence after the other; NaN for a row of padding."""

    def __init__(self, step, cache):
        self.step, self.cache = step, cache
        self.layers = []

    def attend_stored(self, layer, q, *, pdl=False):
        assert q.is_contiguous() and q.dtype == self.cache.k.dtype
        assert pdl == (DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0))
        self.layers.append(layer)
        out = torch.full_like(q, NAN)
        for row, slots in enumerate(self.step.made.slots):
            if slots:
                k, v = (x[layer].flatten(0, 1)[slots] for x in (self.cache.k, self.cache.v))
                out[row] = naive_attention(q[row : row + 1], k, v, q.shape[-1] ** -0.5)[0]
        return out


def runner_of(step, bind):
    """What ``run_chain`` needs of a runner, and the inputs of its step."""
    made = step.made
    scale = step.cache.k.shape[-1] ** -0.5
    runner = SimpleNamespace(cache=step.cache, scale=scale, bind_attention=bind)
    inputs = SimpleNamespace(
        input_ids=step.ids,
        positions=made.positions,
        slot_mapping=made.slot_mapping,
        block_tables=made.tables,
        context=made.context,
    )
    return runner, inputs


@pytest.mark.parametrize("model_class", [Qwen3ForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_with_another_attention_gives_the_models_logits(model_class, parts):
    """Two calls, for buffers are used again; the row of length 0 is padding, and NaN."""
    lengths = [20, 0, 1]
    model = make_model(model_class, TINY, torch.float32)
    step = Step(TINY, lengths, torch.float32)
    tuning = replace(SMALL_TILES, qkv_parts=parts, own_attention=False)
    forward = SkinnyForward(model, step.cache, len(lengths), tuning=tuning)
    assert len(forward.buffers.qkv) == parts
    expected, cache = step.by_model(model, torch.float32)
    bound = []

    def bind(cache, batch, scale):
        assert cache is step.cache and scale == TINY.head_size**-0.5
        assert torch.equal(batch.context, step.made.context)
        assert batch.query_lens == (1, 1, 1) and batch.context_lens == ()
        bound.append(PlainAttention(step, cache))
        return bound[-1]

    runner, inputs = runner_of(step, bind)
    for _ in range(2):
        forward.logits.fill_(NAN)
        step_forms.run_chain(forward, runner, inputs)
        assert_close(forward.logits[0, step.real], expected, torch.float32)
    assert [plain.layers for plain in bound] == [[0, 1], [0, 1]]
    step.assert_stored(cache)


def test_two_sizes_in_one_scratch_do_not_disturb_each_other():
    model = make_model(Qwen3ForCausalLM, replace(TINY, num_layers=1), torch.float32)
    config, scratch = model.config, Scratch(torch.device(DEVICE))
    steps = [Step(config, lengths, torch.float32) for lengths in ([5, 18, 1], [9, 2])]
    forwards = [
        SkinnyForward(model, step.cache, len(step.ids), tuning=SMALL_TILES, scratch=scratch)
        for step in steps
    ]
    assert forwards[0].buffers.normed.data_ptr() == forwards[1].buffers.normed.data_ptr()
    for step, forward in [*zip(steps, forwards, strict=True)] * 2:
        expected, _ = step.by_model(model, torch.float32)
        assert_close(step.by_kernels(forward), expected, torch.float32)


def test_a_chain_with_its_own_attention_binds_no_other():
    model = make_model(Qwen3ForCausalLM, replace(TINY, num_layers=1), torch.float32)
    step = Step(model.config, [5, 9], torch.float32)
    forward = SkinnyForward(model, step.cache, 2, tuning=SMALL_TILES)

    def bind(*_):
        raise AssertionError("its attention has been bound")

    step_forms.run_chain(forward, *runner_of(step, bind))
    expected, _ = step.by_model(model, torch.float32)
    assert_close(forward.logits[0], expected, torch.float32)


# ------------------------------------------------------------------ on a GPU


def check_step(rows, **changes):
    """bfloat16, ragged contexts, a row of padding, replayed: a race would change the result."""
    lengths = [1 + 97 * i % 700 for i in range(rows)]
    lengths[0] = 1500
    if rows > 2:
        lengths[2] = 0
    model = make_model(Qwen3ForCausalLM, LAYERS, torch.bfloat16)
    wide = make_model(Qwen3ForCausalLM, LAYERS, torch.float32)
    wide.load_state_dict(model.state_dict())
    step = Step(LAYERS, lengths, torch.bfloat16, block_size=64)
    attention = TritonAttention(
        LAYERS,
        max_num_seqs=rows,
        max_model_len=step.made.tables.shape[1] * 64,
        block_size=64,
        dtype=torch.bfloat16,
        device=step.cache.k.device,
    )
    exact, _ = step.by_model(wide, torch.float32)
    plain, _ = step.by_model(model, torch.bfloat16)
    tuning = replace(SkinnyTuning.for_rows(rows), **changes)
    forward = SkinnyForward(model, step.cache, rows, tuning=tuning)
    assert forward.hopper and forward.dependent
    runner, inputs = runner_of(step, attention)
    step_forms.run_chain(forward, runner, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_forms.run_chain(forward, runner, inputs)
    logits = forward.logits[0]
    seen = []
    for _ in range(20):
        logits.fill_(NAN)
        graph.replay()
        seen.append(logits[step.real])
    assert all(torch.equal(seen[0], other) for other in seen)

    def error(x, expected):
        return ((x.float() - expected).norm() / expected.norm()).item()

    assert error(seen[0], exact) <= 1.5 * error(plain, exact)
    # New tokens at the same addresses: nothing of the first ones was kept.
    step.ids.copy_((step.ids + 1) % LAYERS.vocab_size)
    exact, _ = step.by_model(wide, torch.float32)
    plain, _ = step.by_model(model, torch.bfloat16)
    graph.replay()
    assert error(logits[step.real], exact) <= 1.5 * error(plain, exact)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("own_attention", [True, False])
@pytest.mark.parametrize("rows", [2, 5, 8, 17, 32, 64, 100, 128])
def test_a_step_on_hopper_in_a_graph(rows, own_attention):
    check_step(rows, own_attention=own_attention)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("rows", [2, 32, 128])
def test_a_step_that_divides_at_once(rows):
    check_step(rows, late=False)
