"""Chapter 8: the products for 2 to 256 rows on Hopper, and the chain of kernels around them.

What a matrix unit of Hopper does, no interpreter imitates. Without such a GPU the kernel is
compiled for one and its instructions are read; everything around it runs in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
from test_chapter08_skinny import (
    DEVICE,
    LAYERS,
    NAN,
    SMALL_TILES,
    TINY,
    Step,
    assert_close,
    make_model,
    normal,
    poisoned,
)

from minivllm.attention.flash_hopper import runs_on_hopper
from minivllm.attention.naive import naive_attention
from minivllm.attention.paged_triton import TritonAttention
from minivllm.engine import skinny_forward, step_forms
from minivllm.engine.fused_heads_kernels import qk_norm_rope_store
from minivllm.engine.skinny_buffers import Scratch, SkinnyBuffers
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.engine.skinny_gemv_kernels import Stream
from minivllm.engine.skinny_kernels import sum_and_gain, sum_and_norm
from minivllm.engine.skinny_tuning import HOPPER_BLOCK_N, OWN_ATTENTION, SkinnyTuning
from minivllm.layers.layernorm import rms_norm
from minivllm.layers.rotary_embedding import RotaryEmbedding
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.qwen3 import Qwen3ForCausalLM

ON_HOPPER = torch.cuda.is_available() and runs_on_hopper(torch.device("cuda"), torch.bfloat16, 128)
hopper_only = pytest.mark.skipif(
    not ON_HOPPER, reason="needs a GPU of compute capability 9.0, on which the kernel is compiled"
)
PROCESSORS = 132  # multiprocessors of an H100 or H200
SHARED_OF_HOPPER = 227 << 10  # bytes that a program can have
CHUNK = 128  # columns of K in a copy, unless told otherwise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------ what the compiler makes of it


# rows, K, parts, SiLU, dtype, buffers at most. 100 rows are padded to 128, 250 to 256, of which two
# buffers find room. K is no multiple of a chunk in the last two.
COMPILED = {
    "8 rows": (8, 512, 1, False, "bfloat16", 8),
    "32 rows, SiLU": (32, 768, 1, True, "float16", 3),
    "100 rows, parts of 4 chunks": (100, 1024, 2, False, "bfloat16", 2),
    "128 rows, K = 4.5 chunks": (128, 576, 1, False, "float16", 2),
    "256 rows, SiLU": (250, 320, 1, True, "bfloat16", 8),
}
# In a process of its own: Triton must not run in its interpreter, and its driver is replaced.
COMPILE = """
import json, re, sys
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

try:
    assert knobs.nvidia.ptxas.path
except Exception as error:
    print(json.dumps({"missing": f"{type(error).__name__}: {error}"}))
    sys.exit()

from minivllm.engine.compile_ahead import compile_ahead
from minivllm.engine.skinny_hopper_kernels import hopper_product, hopper_product_kernel


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        raise AssertionError("there is nothing to launch on")


class Utils:
    def load_binary(self, *arguments):
        return 1, 2, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}


class Claimed:
    launcher_cls = Launcher
    utils = Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Claimed())
EVENTS = {
    "bar.sync": "barrier",
    "barrier.sync": "barrier",
    "wgmma.mma_async": "product",
    "wgmma.wait_group.sync.aligned 1": "one left",
    "wgmma.wait_group.sync.aligned 0": "none left",
    "cp.async.bulk.tensor": "copy",
    "griddepcontrol.launch_dependents": "launch",
    "griddepcontrol.wait": "wait",
    "st.global": "store",
}
PATTERN = re.compile("|".join(map(re.escape, EVENTS)))
facts = {}
for name, (rows, size, parts, silu, dtype, stages) in json.loads(sys.argv[1]).items():
    dtype = getattr(torch, dtype)
    weight, x = torch.zeros(200, size, dtype=dtype), torch.zeros(rows, size, dtype=dtype)
    width, out_dtype = (100, dtype) if silu else (200, torch.float32)
    out = torch.zeros(parts, rows, width, dtype=out_dtype)
    squares = torch.zeros(4, rows) if rows == 100 else None
    options = {"silu": silu, "squares": squares, "stages": stages, "dependent": True}
    launch = lambda: hopper_product(weight, x, out, **options)
    assert compile_ahead(launch) == 1, f"{name}: not compiled, the warnings say why"
    compiled = list(hopper_product_kernel.device_caches[0][0].values())[-1]
    lines = [line.split("//")[0] for line in compiled.asm["ptx"].splitlines()]
    events = [EVENTS[found[0]] for line in lines if (found := PATTERN.search(line))]
    facts[name] = {"shared": compiled.metadata.shared, "events": events}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    script = folder / "script.py"
    script.write_text(COMPILE, encoding="utf-8")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(COMPILED)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    if "missing" in facts:
        pytest.skip(f"Triton cannot compile for a GPU here: {facts['missing']}")
    return facts


def buffers_in(name, facts):
    """How many chunks of both factors a program has room for."""
    rows = COMPILED[name][0]
    padded = max(8, 1 << (rows - 1).bit_length())
    return facts["shared"] // (CHUNK * (HOPPER_BLOCK_N + padded) * 2)


def chunks_of(name):
    _, size, parts, *_ = COMPILED[name]
    return -(-size // parts // CHUNK)


@pytest.mark.parametrize("name", COMPILED)
def test_the_kernel_compiles_for_hopper(compiled, name):
    """By the engine's own way of compiling ahead, for a GPU that is only claimed to be there."""
    facts, most = compiled[name], COMPILED[name][-1]
    assert facts["shared"] <= SHARED_OF_HOPPER
    assert min(2, chunks_of(name)) <= buffers_in(name, facts) <= min(most, chunks_of(name))
    # An instruction takes 16 columns of K; chunks may be a loop or not.
    products = facts["events"].count("product")
    assert products > 0 and products % (CHUNK // 16) == 0
    assert "store" in facts["events"][facts["events"].index("none left") :]


@pytest.mark.parametrize("name", COMPILED)
def test_weights_are_on_their_way_before_the_wait_and_x_is_not(compiled, name):
    events = compiled[name]["events"]
    assert events.count("launch") == events.count("wait") == 1
    before, behind = events[: events.index("wait")], events[events.index("wait") :]
    assert "launch" in before and "product" not in before and "store" not in before
    x_copies = behind[: behind.index("product")].count("copy")
    assert x_copies >= buffers_in(name, compiled[name])
    assert before.count("copy") == x_copies * (2 if "SiLU" in name else 1)


@pytest.mark.parametrize("name", COMPILED)
def test_no_buffer_is_refilled_while_a_warp_may_still_read_it(compiled, name):
    """A warp starts the copies for all four. So each must have waited for the product before."""
    events = compiled[name]["events"]
    refills = [at for at in range(events.index("product"), len(events)) if events[at] == "copy"]
    assert refills or chunks_of(name) <= buffers_in(name, compiled[name])
    for at in refills:
        newest = max(i for i in range(at) if events[i] == "one left")
        assert "product" not in events[newest:at], "a product has been started since"
        assert "barrier" in events[newest:at], "nobody knows whether the other warps have waited"


# ------------------------------------------------------------------ how it is cut


SHAPES = {
    # hidden size, rows of qkv, heads times their size, MLP size; parts of qkv, o and down
    "0.6B": (1024, 4096, 2048, 3072, (1, 4, 6)),
    "8B": (4096, 6144, 4096, 12288, (4, 4, 6)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parts_of_known_shapes(name):
    size, qkv, heads, mlp_size, expected = SHAPES[name]
    tuning = SkinnyTuning.for_rows(32)
    parts = (
        tuning.hopper_parts(qkv, size, PROCESSORS, 2 * tuning.hopper_weights),
        tuning.hopper_parts(size, heads, PROCESSORS),
        tuning.hopper_parts(size, mlp_size, PROCESSORS),
    )
    assert parts == expected


@pytest.mark.parametrize("processors", [4, 78, 132])
@pytest.mark.parametrize("chunk", [64, 128])
def test_parts_are_made_of_whole_chunks_and_find_room(processors, chunk):
    tuning = replace(SkinnyTuning.for_rows(32), hopper_chunk=chunk)
    for size in (48, 80, 128, 576, 1024, 1088, 1536, 2560, 3072, 9728, 12288, 25600):
        for width in (16, 64, 72, 1024, 2560, 5120, 151936):
            parts = tuning.hopper_parts(width, size, processors)
            if parts == 1:
                continue
            assert size % (parts * chunk) == 0
            assert -(-width // 64) * parts <= tuning.hopper_programs * processors
            # One cut less would have left a program with too much.
            fewer = max(n for n in range(1, parts) if size % (n * chunk) == 0 or n == 1)
            assert size // fewer * 64 > tuning.hopper_weights


# ------------------------------------------------------------------ the memory between kernels


def test_scratch_is_shared_by_name_and_dtype():
    scratch = Scratch(torch.device("cpu"))
    large = scratch.take("a", torch.float32, 2, 3, 4)
    assert large.shape == (2, 3, 4) and large.is_contiguous() and large.dtype == torch.float32
    small = scratch.take("a", torch.float32, 3, 5)
    assert small.is_contiguous() and small.data_ptr() == large.data_ptr()
    small.fill_(7)
    assert (large.flatten()[:15] == 7).all()
    others = [
        scratch.take("b", torch.float32, 2, 3, 4),
        scratch.take("a", torch.float16, 2, 3, 4),
        scratch.take("a", torch.int32, 2, 3, 4),
    ]
    assert others[1].dtype == torch.float16
    assert len({x.untyped_storage().data_ptr() for x in (large, *others)}) == 4


def test_scratch_grows_and_leaves_what_it_gave_alone():
    scratch = Scratch(torch.device("cpu"))
    first = scratch.take("a", torch.float32, 6).fill_(1)
    grown = scratch.take("a", torch.float32, 7).fill_(2)
    assert grown.data_ptr() != first.data_ptr()
    assert (first == 1).all()
    again = scratch.take("a", torch.float32, 6)
    assert again.data_ptr() == grown.data_ptr()
    assert (first == 1).all() and (again == 2).all()
    assert scratch.take("a", torch.float32, 7).data_ptr() == grown.data_ptr()


def buffers_of(model, rows, tuning, scratch, **changes):
    options = {"processors": PROCESSORS, "merge_inside": False, "hopper": True, **changes}
    return SkinnyBuffers.allocate(model, rows, tuning, scratch, **options)


def test_buffers_on_hopper():
    """The shapes of 0.6B; memory that is not there will do."""
    config = replace(LAYERS, num_layers=1)
    model = Qwen3ForCausalLM(config, dtype=torch.bfloat16, device="meta")
    tuning = SkinnyTuning.for_rows(32)
    buffers = buffers_of(model, 32, tuning, Scratch(torch.device("meta")))
    assert buffers.qkv.shape == (1, 32, 4096)
    assert buffers.o_parts.shape == (4, 32, 1024)
    assert buffers.down_parts.shape == (6, 32, 1024)
    assert buffers.act.shape == (1, 32, 3072)
    assert [total.shape for total in buffers.totals] == [(32, 1024)] * 2
    assert buffers.normed.shape == (32, 1024)
    for wide in (buffers.qkv, buffers.o_parts, buffers.down_parts, *buffers.totals, buffers.lse):
        assert wide.dtype == torch.float32
    for narrow in (buffers.normed, buffers.act, buffers.attended):
        assert narrow.dtype == torch.bfloat16
    chosen = replace(tuning, qkv_parts=2, o_parts=8, down_parts=3)
    buffers = buffers_of(model, 32, chosen, Scratch(torch.device("meta")))
    assert [len(x) for x in (buffers.qkv, buffers.o_parts, buffers.down_parts)] == [2, 8, 3]


def test_buffers_elsewhere():
    config = replace(LAYERS, num_layers=1)
    model = Qwen3ForCausalLM(config, dtype=torch.bfloat16, device="meta")
    for rows in (1, 8, 32):
        tuning = SkinnyTuning.for_rows(rows)
        scratch = Scratch(torch.device("meta"))
        buffers = buffers_of(model, rows, tuning, scratch, hopper=False)
        assert len(buffers.qkv) == (
            1 if rows == 1 else tuning.parts(rows, 4096, 1024, 16, PROCESSORS)
        )
        assert len(buffers.o_parts) == tuning.parts(rows, 1024, 2048, 128, PROCESSORS)
        assert len(buffers.down_parts) == tuning.parts(rows, 1024, 3072, 16, PROCESSORS)
    options = {"hopper": False, "merge_inside": True}
    buffers = buffers_of(model, 1, tuning, Scratch(torch.device("meta")), **options)
    assert len(buffers.o_parts) == 4 and not buffers.direct


def test_buffers_of_fewer_rows_lie_in_those_of_more():
    model = Qwen3ForCausalLM(TINY, dtype=torch.float16, device="cpu")
    scratch = Scratch(torch.device("cpu"))
    tuning = replace(SMALL_TILES, qkv_parts=1)
    many = buffers_of(model, 16, tuning, scratch)
    few = buffers_of(model, 3, tuning, scratch)

    def places(buffers):
        named = vars(buffers)
        tensors = [x for x in named.values() if isinstance(x, torch.Tensor)]
        return [x.data_ptr() for x in (*tensors, *named["totals"])]

    # Attention has more splits of fewer rows, and one split is kept in another dtype.
    at = [places(buffers) for buffers in (many, few)]
    assert len(set(at[0])) == len(at[0]) and len(set(at[1])) == len(at[1])
    assert few.normed.data_ptr() == many.normed.data_ptr()
    assert few.o_parts.data_ptr() == many.o_parts.data_ptr()
    assert [x.data_ptr() for x in few.totals] == [x.data_ptr() for x in many.totals]
    for buffers in (many, few):
        for tensor in (x for x in vars(buffers).values() if isinstance(x, torch.Tensor)):
            assert tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


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
        rotary = RotaryEmbedding(size, 64, 1e4, device=DEVICE)
        self.positions = torch.randperm(64, device=DEVICE)[:tokens]
        self.rotary = rotary
        self.table = torch.full_like(rotary.table, NAN)
        self.table[self.positions] = rotary.table[self.positions]
        self.slots = torch.randperm(32, device=DEVICE)[:tokens]
        self.slots[1::3] = -1
        self.caches = [poisoned(2, 16, kv_heads, size, dtype=dtype) for _ in range(2)]

    def __call__(self, **changes):
        given = {"qkv": self.qkv, "caches": self.caches, **changes}
        return qk_norm_rope_store(
            given.pop("qkv"),
            *self.gains,
            self.eps,
            self.table,
            self.positions,
            self.slots,
            *given.pop("caches"),
            **self.sizes,
            **given,
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
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
    assert torch.equal(q, heads(qkv=heads.qkv[0]))
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
    half = heads.qkv.half()
    with pytest.raises(ValueError, match=r"give \[T, numbers\]"):
        heads(qkv=half)  # parts are float32
    with pytest.raises(ValueError, match="need rows of 112 in one piece"):
        heads(qkv=heads.qkv[..., 1:])
    with pytest.raises(ValueError, match=r"give \[T, numbers\]"):
        heads(qkv=heads.qkv[None])
    with pytest.raises(ValueError, match="need rows of 112 in one piece"):
        heads(qkv=heads.qkv.transpose(0, 2).contiguous().transpose(0, 2))
    with pytest.raises(ValueError, match=r"qkv is torch\.float32 but k_cache torch\.float16"):
        heads(qkv=heads.qkv[0])  # one row a token must be in the cache's dtype
    k_cache, v_cache = heads.caches
    with pytest.raises(ValueError, match=r"k_cache torch\.float16 and v_cache torch\.float32"):
        heads(caches=[k_cache, v_cache.float()])


# ------------------------------------------------------------------ the step, another's attention


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
    real = [i for i, length in enumerate(lengths) if length]
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
        assert_close(forward.logits[0, real], expected, torch.float32)
    assert [plain.layers for plain in bound] == [[0, 1], [0, 1]]
    slots = step.made.slot_mapping[real]
    for mine, theirs in ((step.cache.k, cache.k), (step.cache.v, cache.v)):
        assert_close(mine.flatten(1, 2)[:, slots], theirs.flatten(1, 2)[:, slots], torch.float32)


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


# ------------------------------------------------------------------ where all of this runs


WIDE = replace(TINY, hidden_size=4096)


def test_where_the_chain_runs_without_hopper():
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert step_forms.skinny_places(TINY, dtype, cpu) == 32
        assert step_forms.skinny_places(WIDE, dtype, cpu) == 1
        assert "rows=65 must be 1 to 64" in SkinnyForward.why_not(TINY, 65, cpu, dtype)
    assert "rows=0" in SkinnyForward.why_not(TINY, 0, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU that is here")
def test_the_interpreter_takes_64_rows(monkeypatch):
    assert SkinnyForward.fits(TINY, 64, "cpu")
    assert SkinnyForward.fits(TINY, 64, "cpu", torch.float16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "need Triton and a GPU" in SkinnyForward.why_not(TINY, 64, "cpu")


def test_where_the_chain_runs_on_hopper(monkeypatch):
    def pretend(device, dtype, head_size):
        return dtype != torch.float32 and head_size in (64, 128)

    for module in (skinny_forward, step_forms):
        monkeypatch.setattr(module, "runs_on_hopper", pretend)
    monkeypatch.setattr(skinny_forward, "triton_runs_on", lambda device: True)
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        assert step_forms.skinny_places(TINY, dtype, cpu) == 128
        assert step_forms.skinny_places(WIDE, dtype, cpu) == 32
        assert SkinnyForward.fits(TINY, 256, cpu, dtype)
        assert "must be 1 to 256" in SkinnyForward.why_not(TINY, 257, cpu, dtype)
    assert step_forms.skinny_places(TINY, torch.float32, cpu) == 32
    assert not SkinnyForward.fits(TINY, 65, cpu, torch.float32)


def test_whose_attention_by_rows():
    for rows in (1, 2, 4, 5, 16, 17, 128):
        tuning = SkinnyTuning.for_rows(rows)
        assert tuning.hopper
        assert tuning.own_attention == (rows <= OWN_ATTENTION)


# ------------------------------------------------------------------ on a GPU


PRODUCTS = {
    # K, parts, columns of out, SiLU, dtype, buffers at most
    "K smaller than a chunk": (80, 1, 100, False, torch.bfloat16, 8),
    "K smaller than a chunk, SiLU": (80, 1, 24, True, torch.float16, 2),
    "nine chunks in two buffers": (1088, 1, 72, False, torch.float16, 2),
    "nine chunks in eight buffers, SiLU": (1088, 1, 40, True, torch.bfloat16, 8),
    "eight chunks in as many buffers": (1024, 1, 64, False, torch.bfloat16, 8),
    "eight chunks in two buffers, SiLU": (1024, 1, 96, True, torch.float16, 2),
    "parts of four chunks": (3072, 6, 200, False, torch.bfloat16, 8),
    "parts of four chunks in two buffers": (3072, 6, 128, False, torch.float16, 2),
    "parts of a chunk": (256, 2, 16, False, torch.bfloat16, 2),
}
# Of the largest number: float32 sums, or a rounding to 16 bits.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def among_nan(*shape, dtype, scale=1.0):
    """Random numbers that begin at 16 bytes, and no further, with NaN on both sides."""
    numel = torch.Size(shape).numel()
    flat = poisoned(8 + numel + 4096, dtype=dtype)
    inside = flat[8 : 8 + numel].view(shape)
    assert inside.data_ptr() % 16 == 0
    return inside.copy_(normal(*shape) * scale)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("rows", [2, 7, 8, 9, 16, 33, 64, 100, 128, 200, 256])
@pytest.mark.parametrize("name", PRODUCTS)
def test_product(name, rows):
    """Everything is written and nothing behind it, whatever lies around both factors."""
    from minivllm.engine.skinny_hopper_kernels import hopper_product

    size, parts, width, silu, dtype, stages = PRODUCTS[name]
    weight = among_nan(2 * width if silu else width, size, dtype=dtype, scale=size**-0.5)
    x = among_nan(rows, size, dtype=dtype)
    out_dtype = dtype if silu else torch.float32
    numel = parts * rows * width
    # As much again as padded rows and tiles of all parts would take.
    flat = poisoned(numel + 256 * (width + 64) * parts, dtype=out_dtype)
    out = flat[:numel].view(parts, rows, width)
    hopper_product(weight, x, out, silu=silu, stages=stages)
    expected = x.double().unflatten(1, (parts, -1)).transpose(0, 1) @ (
        weight.double().unflatten(1, (parts, -1)).permute(1, 2, 0)
    )
    if silu:
        gate, up = expected.chunk(2, dim=-1)
        expected = F.silu(gate) * up
    assert out.isfinite().all(), "something was not written, or NaN was read"
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error.item() <= ROUNDING[out_dtype]
    assert flat[numel:].isnan().all(), "something behind the result was written"
    before = out.clone()
    hopper_product(weight, x, out, silu=silu, stages=stages)
    assert torch.equal(out, before)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("rows", [16, 128])
def test_many_programs_share_a_multiprocessor(rows, together):
    """More of them than find room at once: 1,600 tiles, each of which must come out the same."""
    from minivllm.engine.skinny_hopper_kernels import hopper_product

    weight = among_nan(64, 1024, dtype=torch.bfloat16, scale=1 / 32).repeat(1600, 1)
    x = among_nan(rows, 1024, dtype=torch.bfloat16)
    out = poisoned(1, rows, len(weight))
    hopper_product(weight, x, out, together=together)
    tiles = out[0].unflatten(1, (1600, 64))
    assert torch.equal(tiles, tiles[:, :1].expand_as(tiles))
    assert_close(tiles[:, 0], x.double() @ weight[:64].double().T, torch.bfloat16)
    assert out.isfinite().all()


class Chain:
    """norm, product in parts | norm, product with SiLU, product in parts | norm, and so on."""

    def __init__(self, rows, dtype, layers=6):
        size, mlp_size = 1024, 3072
        self.embedding = normal(64, size, dtype=dtype)
        self.gain = (1 + 0.1 * normal(size)).to(dtype)
        self.weights = [
            tuple(
                (normal(*shape) * shape[1] ** -0.5).to(dtype)
                for shape in ((size, size), (2 * mlp_size, size), (size, mlp_size))
            )
            for _ in range(layers)
        ]
        self.totals = [poisoned(rows, size) for _ in range(2)]
        self.normed = poisoned(rows, size, dtype=dtype)
        self.first, self.last = poisoned(4, rows, size), poisoned(6, rows, size)
        self.act = poisoned(1, rows, mlp_size, dtype=dtype)

    def __call__(self, ids, dependent):
        from minivllm.engine.skinny_hopper_kernels import hopper_product

        product = partial(hopper_product, dependent=dependent)
        stream = Stream(self.embedding, ids)
        for first, gate_up, last in self.weights:
            stream = self._norm(stream, 0, dependent)
            product(first, self.normed, self.first)
            stream = self._norm(replace(stream, parts=self.first), 1, dependent)
            product(gate_up, self.normed, self.act, silu=True)
            product(last, self.act[0], self.last)
            stream = replace(stream, parts=self.last)
        self._norm(stream, 0, dependent)
        return self.normed

    def _norm(self, stream, at, dependent):
        # The first waits for all in front of it.
        overlap = dependent and stream.parts is not None
        sum_and_norm(stream, self.gain, self.totals[at], self.normed, eps=1e-6, dependent=overlap)
        return Stream(self.totals[at], stream.ids, stream.parts)

    def twin(self, ids):
        def norm(x):
            return rms_norm(x, self.gain.double(), 1e-6)

        x = self.embedding.double()[ids]
        for first, gate_up, last in self.weights:
            x = x + norm(x) @ first.double().T
            gate, up = (norm(x) @ gate_up.double().T).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ last.double().T
        return norm(x)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 8, 32, 100, 128, 256])
def test_a_chain_that_overlaps_never_changes(rows, dtype):
    """50 replays, every other one of other rows: what a kernel took too early would be old."""
    chain = Chain(rows, dtype)
    ids = [torch.randint(64, (rows,), device=DEVICE) for _ in range(2)]
    expected = [chain.twin(mine) for mine in ids]
    alone = [chain(mine, dependent=False).clone() for mine in ids]
    for got, mine in zip(alone, expected, strict=True):
        assert_close(got, mine, torch.bfloat16)
    assert not torch.equal(*alone)
    now = ids[0].clone()
    chain(now, dependent=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain(now, dependent=True)
    seen = []
    for turn in range(50):
        now.copy_(ids[turn % 2])
        graph.replay()
        seen.append(result.clone())
    different = [turn for turn in range(50) if not torch.equal(seen[turn], alone[turn % 2])]
    assert not different, f"replays {different} differ from launches that do not overlap"


def check_step(rows, **changes):
    """bfloat16, ragged contexts, a row of padding, replayed: a race would change the result."""
    lengths = [1 + 97 * i % 700 for i in range(rows)]
    lengths[0] = 1500
    if rows > 2:
        lengths[2] = 0
    real = [i for i, length in enumerate(lengths) if length]
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
        seen.append(logits[real])
    assert all(torch.equal(seen[0], other) for other in seen)

    def error(x, expected):
        return ((x.float() - expected).norm() / expected.norm()).item()

    assert error(seen[0], exact) <= 1.5 * error(plain, exact)
    # New tokens at the same addresses: nothing of the first ones was kept.
    step.ids.copy_((step.ids + 1) % LAYERS.vocab_size)
    exact, _ = step.by_model(wide, torch.float32)
    plain, _ = step.by_model(model, torch.bfloat16)
    graph.replay()
    assert error(logits[real], exact) <= 1.5 * error(plain, exact)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("own_attention", [True, False])
@pytest.mark.parametrize("rows", [2, 5, 8, 17, 32, 64, 100, 128])
def test_a_step_on_hopper_in_a_graph(rows, own_attention):
    check_step(rows, own_attention=own_attention)


# ------------------------------------------------------------------ norms that are divided late


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("parts", "size", "blocks"), [(0, 48, 1), (2, 300, 2), (3, 512, 4)])
def test_sum_and_gain(dtype, parts, size, blocks):
    """Two programs for 300 columns, which are no power of two."""
    gain = normal(size, dtype=dtype)
    ids = torch.tensor([2, 0, 6], device=DEVICE)
    if parts:
        stream = Stream(normal(3, size), ids, normal(parts, 3, size))
        expected = stream.total + stream.parts.sum(dim=0)
    else:
        stream = Stream(normal(7, size, dtype=dtype), ids)
        expected = stream.total[ids].float()
    total, out = poisoned(3, size), poisoned(3, size, dtype=dtype)
    squares = poisoned(blocks, 3)
    sum_and_gain(stream, gain, total, out, squares)
    assert_close(total, expected, torch.float32)
    assert_close(out, expected.double() * gain.double(), dtype)
    assert_close(squares.sum(dim=0), expected.double().square().sum(dim=1), torch.float32)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 9, 33, 100, 200, 256])
@pytest.mark.parametrize(("blocks", "parts", "silu"), [(1, 1, True), (4, 2, False), (20, 1, False)])
def test_product_divides_late(rows, dtype, blocks, parts, silu):
    from minivllm.engine.skinny_hopper_kernels import hopper_product

    size, width, eps = 768, 72, 0.5
    weight = among_nan(2 * width if silu else width, size, dtype=dtype, scale=size**-0.5)
    x = among_nan(rows, size, dtype=dtype)
    # As if each row had been multiplied by a number of its own: rows must not be mixed up.
    squares = among_nan(blocks, rows, dtype=torch.float32)
    squares.copy_(torch.rand(blocks, rows, device=DEVICE) * size / blocks * 4)
    out_dtype = dtype if silu else torch.float32
    out = poisoned(parts, rows, width, dtype=out_dtype)
    hopper_product(weight, x, out, silu=silu, squares=squares, eps=eps)
    scale = (squares.double().sum(dim=0) / size + eps).rsqrt()
    expected = (scale[:, None] * x.double()) @ weight.double().T
    if silu:
        gate, up = expected.chunk(2, dim=-1)
        expected = F.silu(gate) * up
    assert out.isfinite().all(), "something was not written, or NaN was read"
    error = (out.double().sum(dim=0) - expected).abs().max() / expected.abs().max()
    assert error.item() <= ROUNDING[out_dtype]


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("rows", [2, 32, 128])
def test_a_step_that_divides_at_once(rows):
    check_step(rows, late=False)
