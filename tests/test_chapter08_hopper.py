"""Chapter 8: the products for 2 to 256 rows on Hopper.

What a matrix unit of Hopper does, no interpreter imitates. Without such a GPU the kernel is
compiled for one and its instructions are read; the numbers are for the GPU.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
from skinny_helpers import (
    DEVICE,
    assert_close,
    hopper_only,
    normal,
    poisoned,
    silu_and_mul,
)

from minivllm.engine.skinny_gemv_kernels import Stream
from minivllm.engine.skinny_sum_kernels import sum_and_norm
from minivllm.engine.skinny_tuning import HOPPER_BLOCK_N
from minivllm.layers.layernorm import rms_norm

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

try:
    assert knobs.nvidia.ptxas.path
except Exception as error:
    print(json.dumps({"missing": f"{type(error).__name__}: {error}"}))
    sys.exit()

import claimed_gpu
from minivllm.engine.compile_ahead import compile_ahead
from minivllm.engine.skinny_hopper_kernels import hopper_product, hopper_product_kernel

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
    assert not claimed_gpu.launched
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


def assert_rounded(got, expected, dtype):
    """``expected`` is in float64, ``got`` was rounded to ``dtype``."""
    assert got.isfinite().all(), "something was not written, or NaN was read"
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error.item() <= ROUNDING[dtype]


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
    assert_rounded(out, silu_and_mul(expected) if silu else expected, out_dtype)
    assert flat[numel:].isnan().all(), "something behind the result was written"
    before = out.clone()
    hopper_product(weight, x, out, silu=silu, stages=stages)
    assert torch.equal(out, before)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 9, 33, 100, 200, 256])
@pytest.mark.parametrize(("blocks", "parts", "silu"), [(1, 1, True), (4, 2, False), (20, 1, False)])
def test_product_divides_late(rows, dtype, blocks, parts, silu):
    """Each row by a number of its own, which rows must not mix up."""
    from minivllm.engine.skinny_hopper_kernels import hopper_product

    size, width, eps = 768, 72, 0.5
    weight = among_nan(2 * width if silu else width, size, dtype=dtype, scale=size**-0.5)
    x = among_nan(rows, size, dtype=dtype)
    squares = among_nan(blocks, rows, dtype=torch.float32)
    squares.copy_(torch.rand(blocks, rows, device=DEVICE) * size / blocks * 4)
    out_dtype = dtype if silu else torch.float32
    out = poisoned(parts, rows, width, dtype=out_dtype)
    hopper_product(weight, x, out, silu=silu, squares=squares, eps=eps)
    scale = (squares.double().sum(dim=0) / size + eps).rsqrt()
    expected = (scale[:, None] * x.double()) @ weight.double().T
    expected = silu_and_mul(expected) if silu else expected
    assert_rounded(out.double().sum(dim=0), expected, out_dtype)


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


# ------------------------------------------------------------------ launches that overlap


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
            x = x + silu_and_mul(norm(x) @ gate_up.double().T) @ last.double().T
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
