"""Chapter 1's Triton kernels: values against float64, counts from the recorder.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from minivllm.layers import activation, layer_kernels, layernorm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "notebooks")) if path not in sys.path]
toy = importlib.import_module("chapters.chapter01_layers.toy")
Recorder = importlib.import_module("recorder").Recorder

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the recorder needs the interpreter")
# Row lengths below, at and above a power of two, and the sizes of a head and of a small model.
SIZES = [1, 2, 6, 8, 9, 100, 128, 1000]
DTYPES = [torch.float32, torch.float16]
POISON = 777.0


@pytest.fixture
def own_recorder() -> None:
    """A test that records for itself asks for this; there can be one recorder at a time."""


@pytest.fixture(autouse=True)
def bounds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check every address of every kernel: interpreted, a wrong store would crash the process."""
    if INTERPRETED and "own_recorder" not in request.fixturenames:
        with Recorder(register_arguments=True):
            yield
    else:
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


def exact_silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def assert_close(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal but for a few roundings of the largest number in the dtype of ``ours``.

    A GPU's float32 division, root and exponential are each off by up to 2 units.
    """
    assert ours.shape == expected.shape, (
        f"{what} has shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    )
    missing = int(ours.isnan().sum())
    assert not missing, f"{what}: {missing} of {ours.numel()} numbers are NaN"
    error = (ours.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-30)
    units = 8 if ours.dtype == torch.float32 else 4
    allowed = units * torch.finfo(ours.dtype).eps * scale
    assert error <= allowed, f"{what} is off by {error:.3g} where the largest value is {scale:.3g}"


def add_by_kernel(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """add_rms_norm by its kernel, after checking what only a kernel can get wrong."""
    before = x.clone(), residual.clone()
    out, total = layer_kernels.add_rms_norm(x, residual, weight, eps)
    assert out.dtype == total.dtype == x.dtype, f"the results are {out.dtype} and {total.dtype}"
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1]), (
        "the kernel must not change x or residual: store into total and out"
    )
    return out, total


# ---------------------------------------------------------------------------- RMSNorm, as given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_kernel(size: int, dtype: torch.dtype) -> None:
    x, weight = randn(3, size, dtype=dtype) * 3, randn(size, seed=1, dtype=dtype)
    ours = layer_kernels.rms_norm(x, weight, 1e-6)
    assert ours.dtype == dtype
    assert_close(ours, exact_rms_norm(x, weight, 1e-6), f"rms_norm of rows of {size}")


def test_rms_norm_kernel_of_heads() -> None:
    """The norm of every query head: a view of the fused projection, [T, H, D] with gaps."""
    heads = randn(2, 5, 16)[:, :3]
    weight = randn(16, seed=1)
    assert not heads.is_contiguous()
    ours = layer_kernels.rms_norm(heads, weight, 1e-6)
    assert_close(ours, exact_rms_norm(heads, weight, 1e-6), "rms_norm of [2, 3, 16] with gaps")


# ---------------------------------------------------------------------------- add + RMSNorm


def test_add_rms_norm_kernel_on_the_toy() -> None:
    """3 tokens of 6 numbers whose sums have root mean square 1, 2 and 3."""
    x, residual, weight = (t.to(DEVICE) for t in (toy.X, toy.RESIDUAL, toy.WEIGHT))
    out, total = add_by_kernel(x, residual, weight, toy.EPS)
    for token in range(3):
        ours, expected = total[token].tolist(), toy.TOTAL[token].tolist()
        assert ours == expected, f"token {token}: total is {ours}, and x + residual {expected}"
        shown = [round(number, 3) for number in out[token].tolist()]
        what = f"token {token}: out is {shown},\nexpected {toy.NORMED[token].tolist()};\nit"
        assert_close(out[token].cpu(), toy.NORMED[token], what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm_kernel(size: int, dtype: torch.dtype) -> None:
    x, residual = randn(3, size, dtype=dtype), randn(3, size, seed=1, dtype=dtype)
    weight = randn(size, seed=2, dtype=dtype)
    out, total = add_by_kernel(x, residual, weight, 1e-6)
    expected = x.double() + residual.double()
    assert_close(total, expected, f"total, rows of {size}: x + residual")
    assert_close(out, exact_rms_norm(expected, weight, 1e-6), f"out, rows of {size}: the norm")


def test_add_rms_norm_kernel_adds_eps_inside_the_root() -> None:
    x, weight = torch.full((2, 6), 0.1, device=DEVICE), torch.ones(6, device=DEVICE)
    out, _ = add_by_kernel(x, torch.zeros_like(x), weight, 0.03)
    assert_close(out, exact_rms_norm(x, weight, 0.03), "add_rms_norm with eps=0.03")
    zeros, _ = add_by_kernel(torch.zeros_like(x), torch.zeros_like(x), weight, 1e-6)
    assert torch.equal(zeros, torch.zeros_like(x)), "a row of zeros must stay zeros, not NaN"


def test_add_rms_norm_kernel_computes_in_float32() -> None:
    # The square of 300 is past the largest float16.
    x = torch.full((1, 64), 300.0, device=DEVICE, dtype=torch.float16)
    out, _ = add_by_kernel(x, x, torch.ones_like(x[0]), 1e-6)
    assert_close(out, torch.ones(1, 64, device=DEVICE), "the norm of float16 numbers of 600")


def test_add_rms_norm_kernel_of_strided_rows() -> None:
    """Rows that are a piece of longer rows: a stride is not the row's length."""
    x, residual = randn(4, 20)[:, 3:9], randn(4, 11, seed=1)[:, 5:]
    assert (x.stride(), residual.stride()) == ((20, 1), (11, 1))
    weight = randn(6, seed=2)
    out, total = add_by_kernel(x, residual, weight, 1e-6)
    assert_close(total, x.double() + residual.double(), "total of strided rows")
    expected = exact_rms_norm(x.double() + residual.double(), weight, 1e-6)
    assert_close(out, expected, "out of strided rows")


def test_add_rms_norm_kernel_leaves_the_neighbours_alone() -> None:
    """Rows of 6 in a block of 8 lanes: what lies between the rows must stay as it is."""
    x, residual, weight = randn(3, 6), randn(3, 6, seed=1), randn(6, seed=2)
    out, total = (torch.full((3, 10), POISON, device=DEVICE) for _ in range(2))
    arguments = (x, residual, weight, out, total, 6, 6, 10, 6, 1e-6)
    layer_kernels.add_rms_norm_kernel[(3,)](*arguments, BLOCK=8)
    assert_close(total[:, :6], x.double() + residual.double(), "total, rows 10 apart")
    for name, tensor in (("out", out), ("total", total)):
        assert (tensor[:, 6:] == POISON).all(), f"a store into {name} went past the row's end"


@interpreted
def test_add_rms_norm_kernel_reads_and_writes_everything_once(own_recorder: None) -> None:
    """What fusion is for. The toy: 18 numbers of 4 bytes in each tensor, 3 programs."""
    names = dict(x=toy.X, residual=toy.RESIDUAL, weight=toy.WEIGHT)
    with Recorder(names, register_arguments=True) as rec:
        layer_kernels.add_rms_norm(toy.X, toy.RESIDUAL, toy.WEIGHT, toy.EPS)
    assert rec.programs == [(0, 0, 0), (1, 0, 0), (2, 0, 0)], "one program a row"
    for name in ("x", "residual"):
        times = rec.times_read(name)
        assert (times == 1).all(), f"{name} must be read once, not {times.max()} times"
    assert (rec.times_read("weight") == 3).all(), "every program reads the weight once"
    for name in ("out_ptr", "total_ptr"):
        times = rec.times_written(name)
        assert (times == 1).all(), f"{name} must be written once, not {times.max()} times"
        assert rec.bytes_read(name) == 0, f"{name} is read back; the numbers are in registers"
    assert (rec.bytes_read(), rec.bytes_written()) == (3 * 72, 2 * 72)


# ---------------------------------------------------------------------------- SiLU-and-mul


def test_silu_and_mul_kernel_on_the_toy() -> None:
    out = layer_kernels.silu_and_mul(toy.GATE_UP.to(DEVICE))
    assert_close(out.cpu(), exact_silu_and_mul(toy.GATE_UP), "silu_and_mul of the toy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, 1025])
def test_silu_and_mul_kernel(size: int, dtype: torch.dtype) -> None:
    x = randn(3, 2 * size, dtype=dtype) * 2
    ours = layer_kernels.silu_and_mul(x)
    assert ours.dtype == dtype
    assert_close(ours, exact_silu_and_mul(x), f"silu_and_mul, gate and up of {size}")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_silu_and_mul_kernel_at_the_ends() -> None:
    """exp(100) is past the largest float32: the result must be 0 or the gate itself, not NaN."""
    gate = torch.tensor([[-100.0, -20.0, 0.0, 20.0, 100.0]], device=DEVICE)
    x = torch.cat((gate, torch.ones_like(gate)), dim=-1)
    assert_close(layer_kernels.silu_and_mul(x), exact_silu_and_mul(x), "silu of -100 to 100")


def test_silu_and_mul_kernel_of_strided_rows() -> None:
    x = randn(4, 31)[:, 5:17]
    assert x.stride() == (31, 1)
    assert_close(layer_kernels.silu_and_mul(x), exact_silu_and_mul(x), "rows 31 numbers apart")


def test_silu_and_mul_kernel_leaves_the_neighbours_alone() -> None:
    x, out = randn(3, 12), torch.full((3, 10), POISON, device=DEVICE)
    layer_kernels.silu_and_mul_kernel[(3, 2)](x, out, 12, 10, 6, BLOCK=4)
    assert_close(out[:, :6], exact_silu_and_mul(x), "out, rows 10 apart, in tiles of 4")
    assert (out[:, 6:] == POISON).all(), "a store into out went past the row's end"


@interpreted
def test_silu_and_mul_kernel_cuts_rows_into_tiles(own_recorder: None) -> None:
    """Rows of 6 in tiles of 4: a grid of 3 x 2, and the second tile of a row has 2 numbers."""
    out = torch.empty(3, 6)
    with Recorder({"x": toy.GATE_UP, "out": out}) as rec:
        layer_kernels.silu_and_mul_kernel[(3, 2)](toy.GATE_UP, out, 12, 6, 6, BLOCK=toy.TILE)
    written = {
        program: sum(int(store.mask.sum()) for store in stores)
        for program, stores in rec.stores_by_program("out").items()
    }
    expected = {(row, tile, 0): (4, 2)[tile] for row in range(3) for tile in range(2)}
    assert written == expected, f"numbers stored by each program (row, tile, 0): {written}"
    assert (rec.times_read("x") == 1).all(), "gate and up must be read once each"
    assert (rec.times_written("out") == 1).all(), "every result must be written once"
    assert_close(out, exact_silu_and_mul(toy.GATE_UP), "silu_and_mul of the toy in tiles of 4")


# ---------------------------------------------------------------------------- the launchers


def test_layer_kernels_of_columns() -> None:
    """A transposed tensor, whose rows do not lie in one piece."""
    x, weight = randn(12, 4).t(), randn(12, seed=1)
    assert x.stride() == (1, 4)
    expected = exact_rms_norm(x, weight, 1e-6)
    assert_close(layer_kernels.rms_norm(x, weight, 1e-6), expected, "rms_norm of a transpose")
    out, total = add_by_kernel(x, x, weight, 1e-6)
    assert_close(total, 2 * x.double(), "x + x of a transpose")
    assert_close(out, exact_rms_norm(2 * x, weight, 1e-6), "add_rms_norm of a transpose")
    assert_close(layer_kernels.silu_and_mul(x), exact_silu_and_mul(x), "silu_and_mul of one")


@interpreted
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_layer_kernels_of_no_tokens(shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.ones(6)
    assert layer_kernels.rms_norm(x, weight, 1e-6).shape == shape
    assert layer_kernels.add_rms_norm(x, x, weight, 1e-6)[1].shape == shape
    assert layer_kernels.silu_and_mul(x).shape == (*shape[:-1], 3)


BAD_CALLS = [
    (lambda: layer_kernels.rms_norm(torch.ones(2, 6), torch.ones(5), 0.0), r"weight.*\(5,\).*\(6,"),
    (lambda: layer_kernels.rms_norm(torch.ones(2, 6).int(), torch.ones(6), 0.0), "x is.*int32"),
    (lambda: layer_kernels.rms_norm(torch.ones(2, 0), torch.ones(0), 0.0), r"x has shape \(2, 0\)"),
    (lambda: layer_kernels.rms_norm(torch.ones(2, 6), torch.ones(6).half(), 0.0), "weight.*cast"),
    (lambda: layer_kernels.rms_norm(torch.ones(1, 70000), torch.ones(70000), 0.0), "70000.*65536"),
    (
        lambda: layer_kernels.add_rms_norm(torch.ones(2, 6), torch.ones(3, 6), torch.ones(6), 0.0),
        r"residual.*\(3, 6\).*\(2, 6\)",
    ),
    (
        lambda: layer_kernels.add_rms_norm(
            torch.ones(2, 6), torch.ones(2, 6, device="meta"), torch.ones(6), 0.0
        ),
        "residual is on meta but x on cpu",
    ),
    (lambda: layer_kernels.silu_and_mul(torch.ones(2, 7)), "7 numbers.*even"),
    (lambda: layer_kernels.silu_and_mul(torch.ones(2, 6).double()), "x is.*float64"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_layer_kernels_refuse_what_does_not_fit(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes bfloat16 wrongly")
class TestOnAGpu:
    """bfloat16, the dtype of real models, against the PyTorch twins; sizes of real models."""

    @pytest.mark.parametrize("size", [6, 128, 1024, 1536, 5120, 8192, 65536])
    @pytest.mark.parametrize("tokens", [1, 257])
    def test_norm_kernels_on_a_gpu(self, tokens: int, size: int) -> None:
        x = randn(tokens, size, dtype=torch.bfloat16)
        residual, weight = randn(tokens, size, seed=1).bfloat16(), randn(size, seed=2).bfloat16()
        ours = layer_kernels.rms_norm(x, weight, 1e-6)
        assert_close(ours, layernorm.rms_norm(x, weight, 1e-6), "rms_norm in bfloat16")
        out, total = add_by_kernel(x, residual, weight, 1e-6)
        normed, summed = layernorm.add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(total, summed), "the sum must be PyTorch's, bit for bit"
        assert_close(out, normed, "add_rms_norm in bfloat16")

    @pytest.mark.parametrize("size", [6, 1024, 3072, 12288, 25600])
    @pytest.mark.parametrize("tokens", [1, 257])
    def test_silu_and_mul_kernel_on_a_gpu(self, tokens: int, size: int) -> None:
        x = randn(tokens, 2 * size, dtype=torch.bfloat16) * 2
        ours = layer_kernels.silu_and_mul(x)
        assert_close(ours, activation.silu_and_mul(x), "silu_and_mul in bfloat16")

    def test_row_offsets_past_2_31_on_a_gpu(self) -> None:
        """Three rows 2^30 + 7 numbers apart: the last begins where 32 bits overflow."""
        stride = 2**30 + 7
        if torch.cuda.mem_get_info()[0] < 6 * 2**30:
            pytest.skip("needs 6 GiB of GPU memory")
        storage = torch.empty(2 * stride + 12, dtype=torch.bfloat16, device=DEVICE)
        x = storage.as_strided((3, 12), (stride, 1))
        x.copy_(randn(3, 12))
        small, weight = x.contiguous(), randn(12, seed=1).bfloat16()
        for ours, expected in (
            (layer_kernels.rms_norm(x, weight, 1e-6), layernorm.rms_norm(small, weight, 1e-6)),
            (
                add_by_kernel(x, x, weight, 1e-6)[0],
                layernorm.add_rms_norm(small, small, weight, 1e-6)[0],
            ),
            (layer_kernels.silu_and_mul(x), activation.silu_and_mul(small)),
        ):
            assert_close(ours, expected, "rows far apart")
