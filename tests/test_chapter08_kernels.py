"""Chapter 8's Triton kernels, each against its PyTorch twin.

On a machine without a GPU they run in Triton's interpreter, in float32 and float16.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")
import triton.language as tl  # noqa: E402

from minivllm.attention import paged  # noqa: E402
from minivllm.engine import (  # noqa: E402
    device_rows,
    fused_heads_kernels,
    fused_kernels,
    sampler_kernels,
    step_kernels,
)
from minivllm.engine.device_rows import DeviceRows, RowUpdates, StepInputs  # noqa: E402
from minivllm.layers import activation, layernorm  # noqa: E402
from minivllm.layers.rotary_embedding import RotaryEmbedding  # noqa: E402
from minivllm.layers.sampler import Sampler, SamplingTensors, gumbel_noise  # noqa: E402

NOTEBOOKS = str(Path(__file__).resolve().parents[1] / "notebooks")
if NOTEBOOKS not in sys.path:
    sys.path.insert(0, NOTEBOOKS)
Recorder = importlib.import_module("recorder").Recorder

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
# Dependent launch exists from compute capability 9 on, and not in the interpreter.
HAS_PDL = not INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)
PDL = [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_PDL, reason="needs sm_90"))]


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """Check every address of every kernel: interpreted, a wrong store would crash the process."""
    if INTERPRETED:
        with Recorder(register_arguments=True):
            yield
    else:
        yield


# ------------------------------------------------------------------ the decode step's bookkeeping


def filled_rows(lengths: list[int], block_size: int, max_blocks: int, seed: int = 0) -> DeviceRows:
    """Rows of sequences of ``lengths``; a table entry that is not in use holds nonsense."""
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, dtype=dtype)

    count = len(lengths)
    rows = DeviceRows.allocate(count, max_blocks, "cpu")
    rows.last_token.copy_(random(151_936, count))
    rows.length.copy_(torch.tensor(lengths))
    rows.num_outputs.copy_(random(1000, count))
    rows.seed.copy_(random(2**62, count, dtype=torch.int64) * 2 - 2**62)
    rows.temperature.copy_(torch.rand(count, generator=generator) * 2)
    rows.block_tables.fill_(-12345)
    for row, length in enumerate(lengths):
        used = -(-length // block_size)
        rows.block_tables[row, :used] = random(100_000, used)
    return moved(rows)


def views_of(rows: DeviceRows) -> list[torch.Tensor]:
    return [getattr(rows, part.name) for part in fields(rows)]


def moved(rows: DeviceRows) -> DeviceRows:
    """The same rows in a buffer of their own, on the device under test."""
    there = DeviceRows.allocate(*rows.block_tables.shape, DEVICE)
    there.flat.copy_(rows.flat)
    return there


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_same(ours: StepInputs, expected: StepInputs) -> None:
    for part in fields(ours):
        mine, theirs = getattr(ours, part.name), getattr(expected, part.name)
        assert torch.equal(mine, theirs), f"{part.name}: {mine.tolist()} not {theirs.tolist()}"


def test_rows_lie_in_one_buffer_and_do_not_overlap() -> None:
    rows = DeviceRows.allocate(3, 5, "cpu")
    for number, part in enumerate(views_of(rows)[1:], 1):
        assert not part.any(), "an earlier part reaches into this one"
        part.fill_(number)
    assert rows.flat.data_ptr() == rows.seed.data_ptr()
    assert rows.flat.ne(0).sum() == rows.flat.numel() - 3  # the seeds' upper halves
    with pytest.raises(ValueError, match="max_blocks=0"):
        DeviceRows.allocate(3, 0, "cpu")


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345, 2**64 - 1, -1, -(2**63)])
def test_updates_say_what_a_row_holds(seed: int) -> None:
    rows = DeviceRows.allocate(3, 5, "cpu")
    updates = RowUpdates(3, 5)
    updates.set_row(
        1, last_token=311, length=18, num_outputs=4, seed=seed, temperature=0.6, blocks=[7, 4]
    )
    updates.set_blocks(1, 1, [8, 9])  # the later of two changes of one word is sent
    pairs = torch.tensor(list(updates.words.items()), dtype=torch.int32)
    device_rows.apply_updates(rows.flat, pairs)
    assert rows.last_token.tolist() == [0, 311, 0]
    assert rows.length.tolist() == [0, 18, 0]
    assert rows.num_outputs.tolist() == [0, 4, 0]
    assert rows.seed.tolist() == [0, (seed + 2**63) % 2**64 - 2**63, 0]
    assert torch.equal(rows.temperature, torch.tensor([0.0, 0.6, 0.0]))
    assert rows.block_tables.tolist() == [[0] * 5, [7, 8, 9, 0, 0], [0] * 5]


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("count", [1, 5, 300])
def test_apply_updates(count: int, pdl: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    words = torch.randperm(400, generator=generator)[:count]
    words[:: max(count // 4, 2)] = -1  # padding
    values = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    updates = torch.stack((words, values), dim=1).to(DEVICE, torch.int32)
    ours, expected = (torch.full((400,), 7, dtype=torch.int32, device=DEVICE) for _ in range(2))
    step_kernels.apply_updates(ours, updates, pdl=pdl)
    device_rows.apply_updates(expected, updates)
    assert torch.equal(ours, expected)
    assert expected.ne(7).sum() == words.ge(0).sum()


LENGTHS = [1, 16, 17, 18, 32, 33, 80, 79, 48]


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("tile", [1024, 4, 2])
def test_begin_step(tile: int, pdl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 5 blocks, in one tile and in several."""
    monkeypatch.setattr(step_kernels, "LARGEST_TABLE_TILE", tile)
    rows = filled_rows(LENGTHS, 16, 5)
    active = int32([3, 8, -1, 0, 5, 6, 1, -1, 7, 2, 4])
    ours, expected = (StepInputs.allocate(len(active), 5, DEVICE) for _ in range(2))
    for out in (ours, expected):
        for part in fields(out):
            getattr(out, part.name).fill_(99)  # a step before this one
    step_kernels.begin_step(rows, active, ours, 16, pdl=pdl)
    device_rows.begin_step(rows, active, expected, 16)
    assert_same(ours, expected)


def test_begin_step_by_hand() -> None:
    """The example at the top of ``step_kernels``, beside padding."""
    rows = DeviceRows.allocate(6, 4, DEVICE)
    rows.length[5], rows.last_token[5], rows.num_outputs[5] = 18, 311, 6
    rows.seed[5], rows.temperature[5] = -7, 0.5
    rows.block_tables[5] = int32([7, 4, 1234, 1234])
    for begin in (step_kernels.begin_step, device_rows.begin_step):
        out = StepInputs.allocate(2, 4, DEVICE)
        begin(rows, int32([5, -1]), out, 16)
        assert out.input_ids.tolist() == [311, 0]
        assert out.positions.tolist() == [17, 0]
        assert out.slot_mapping.tolist() == [65, -1]
        assert out.context.tolist() == [18, 0]
        assert out.step.tolist() == [6, 0]
        assert out.seed.tolist() == [-7, 0]
        assert out.temperature.tolist() == [0.5, 0.0]
        assert out.block_tables.tolist() == [[7, 4, -1, -1], [-1] * 4]


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_finish_step(dtype: torch.dtype, pdl: bool) -> None:
    """Run twice, as a replayed graph is: the second run's tokens hold, counts rise once."""
    active = int32([3, 8, -1, 0, 5, 6, 1, -1, 7, 2])  # row 4 has no place, and stays
    rows = filled_rows(LENGTHS, 16, 5)
    expected = moved(rows)
    before = moved(rows)
    out = StepInputs.allocate(len(active), 5, DEVICE)
    device_rows.begin_step(rows, active, out, 16)
    for shift in (0, 1000):
        tokens = torch.arange(shift, shift + len(active), dtype=dtype, device=DEVICE)
        step_kernels.finish_step(rows, active, out, tokens, pdl=pdl)
        device_rows.finish_step(expected, active, out, tokens)
        device_rows.post_tokens(expected, active, out, tokens)
        assert torch.equal(rows.flat, expected.flat)
        assert torch.equal(posted(rows), posted(expected))
    assert rows.last_token.tolist() == [
        *(1003, 1006, 1009, 1000, before.last_token[4].item(), 1004, 1005, 1008, 1001)
    ]
    ran = torch.ones(9, dtype=torch.int32, device=DEVICE)
    ran[4] = 0
    assert torch.equal(rows.length, before.length + ran)
    assert torch.equal(rows.num_outputs, before.num_outputs + ran)
    # The host finds them by their number; those of the step before are still there.
    found = posted(rows).view(-1)
    for place, row in enumerate(active.tolist()):
        if row >= 0:
            number = int(before.num_outputs[row])
            this, other = rows.places_of([row, row], [number, number + 1])
            assert (found[this], found[other]) == (1000 + place, 0)


def posted(rows: DeviceRows) -> torch.Tensor:
    """What the host reads once the device has come so far."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return rows.posted.clone()


def test_step_arguments_that_do_not_fit_are_refused() -> None:
    rows = filled_rows(LENGTHS, 16, 5)
    out = StepInputs.allocate(3, 5, DEVICE)
    tokens = torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"active is torch.int64 \(3,\); give"):
        step_kernels.begin_step(rows, int32([0, 1, 2]).long(), out, 16)
    with pytest.raises(ValueError, match="same max_blocks"):
        step_kernels.begin_step(rows, int32([0]), StepInputs.allocate(1, 4, DEVICE), 16)
    with pytest.raises(ValueError, match=r"tokens is torch.float32"):
        step_kernels.finish_step(rows, int32([0, 1, 2]), out, tokens)
    with pytest.raises(ValueError, match=r"give int32 \[U, 2\]"):
        step_kernels.apply_updates(rows.flat, int32([0, 1]))


def test_first_places_share_memory() -> None:
    out = StepInputs.allocate(4, 2, DEVICE)
    for part in fields(out):
        view = getattr(out.first(2), part.name)
        assert len(view) == 2 and view.is_contiguous()
        assert view.data_ptr() == getattr(out, part.name).data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", PDL)
def test_steps_at_full_size(pdl: bool) -> None:
    """256 places, tables of 2,560 blocks; three steps in a row."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 16 * 2550, (256,), generator=generator).tolist()
    rows = filled_rows(lengths, 16, 2560)
    expected = moved(rows)
    active = torch.randperm(256, generator=generator).to(DEVICE, torch.int32)
    active[::9] = -1
    ours, theirs = (StepInputs.allocate(256, 2560, DEVICE) for _ in range(2))
    for step in range(3):
        tokens = torch.randint(151_936, (256,), generator=generator).to(DEVICE)
        step_kernels.begin_step(rows, active, ours, 16, pdl=pdl)
        step_kernels.finish_step(rows, active, ours, tokens, pdl=pdl)
        device_rows.begin_step(expected, active, theirs, 16)
        device_rows.finish_step(expected, active, theirs, tokens)
        device_rows.post_tokens(expected, active, theirs, tokens)
        assert_same(ours, theirs)
        assert torch.equal(rows.flat, expected.flat), f"step {step}"
        assert torch.equal(posted(rows), posted(expected)), f"step {step}"


# ------------------------------------------------------------------ norms, RoPE, store, SiLU

INTERPRETED_DTYPES = [torch.float32, torch.float16]
GPU_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def assert_close(ours: torch.Tensor, twin: torch.Tensor, what: str) -> None:
    """Equal but for a last bit here and there, where the mean's order of summing tipped a rounding.

    In float32, where every sum is such a rounding, all may be off by a few bits.
    """
    assert ours.shape == twin.shape and ours.dtype == twin.dtype
    assert not ours.isnan().any(), f"{what} was not written everywhere, or from NaN"
    error = (ours.double() - twin.double()).abs()
    allowed = 4 * torch.finfo(twin.dtype).eps * (twin.double().abs() + 1)
    assert bool((error <= allowed).all()), f"{what} is off by {error.max():.3g}"
    if twin.dtype != torch.float32:
        share = float(ours.ne(twin).double().mean())
        assert share < 0.01, f"{share:.1%} of {what} differ: not rounded where the twin rounds"


class Heads:
    """A fused projection of T tokens, and all that belongs to it."""

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        *,
        norm: bool = True,
        block_size: int = 4,
    ) -> None:
        self.sizes = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_size": head_size,
        }
        width = (num_heads + 2 * num_kv_heads) * head_size
        # Rows that lie apart, as a slice of a larger product's do.
        self.qkv = randn(num_tokens, width + 16, dtype=dtype)[:, :width]
        self.weights = [None, None]
        if norm:
            self.weights = [1 + randn(head_size, dtype=dtype, seed=s, scale=0.3) for s in (1, 2)]
        self.eps = 1e-6
        self.rotary = RotaryEmbedding(head_size, 4096, 1e6, device=DEVICE)
        generator = torch.Generator().manual_seed(3)
        self.positions = torch.randint(4096, (num_tokens,), generator=generator).to(DEVICE)
        num_blocks = -(-num_tokens // block_size) + 2
        slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
        slots[1::3] = -1  # padding, which is written nowhere
        self.slots = slots.to(DEVICE)
        self.cache_shape = (num_blocks, block_size, num_kv_heads, head_size)

    def caches(self) -> list[torch.Tensor]:
        return [
            torch.full(self.cache_shape, float("nan"), dtype=self.qkv.dtype, device=DEVICE)
            for _ in range(2)
        ]

    def ours(self, **options: bool) -> list[torch.Tensor]:
        caches = self.caches()
        q = fused_heads_kernels.qk_norm_rope_store(
            self.qkv,
            *self.weights,
            self.eps,
            self.rotary.table,
            self.positions,
            self.slots,
            *caches,
            **self.sizes,
            **options,
        )
        return [q, *caches]

    def twin(self) -> list[torch.Tensor]:
        heads, kv_heads, size = self.sizes.values()
        q, k, v = self.qkv.unflatten(1, (-1, size)).split((heads, kv_heads, kv_heads), dim=1)
        if self.weights[0] is not None:
            q = layernorm.rms_norm(q, self.weights[0], self.eps)
            k = layernorm.rms_norm(k, self.weights[1], self.eps)
        q, k = self.rotary(self.positions, q, k)
        caches = self.caches()
        paged.store_kv(k, v, *caches, self.slots)
        return [q, *caches]


def check_heads(heads: Heads, **options: bool) -> None:
    q, k_cache, v_cache = heads.ours(**options)
    expected_q, expected_k, expected_v = heads.twin()
    assert_close(q, expected_q, "q")
    written = torch.zeros(k_cache.shape[:2].numel(), dtype=torch.bool, device=DEVICE)
    written[heads.slots[heads.slots >= 0]] = True
    for cache in (k_cache, v_cache):
        assert cache.flatten(0, 1)[~written].isnan().all(), "a slot of nobody was written"
    assert_close(k_cache.flatten(0, 1)[written], expected_k.flatten(0, 1)[written], "k")
    assert torch.equal(v_cache.flatten(0, 1)[written], expected_v.flatten(0, 1)[written])


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@pytest.mark.parametrize("sizes", [(4, 2, 32), (3, 1, 80), (2, 2, 6)])
def test_heads_are_normed_turned_and_stored(
    sizes: tuple[int, int, int], dtype: torch.dtype, pdl: bool
) -> None:
    check_heads(Heads(5, *sizes, dtype), pdl=pdl)


def test_heads_without_norms() -> None:
    """Llama."""
    check_heads(Heads(3, 4, 2, 16, torch.float32, norm=False))


def test_many_tokens_take_larger_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_heads_kernels, "MANY_TOKENS", 2)
    check_heads(Heads(3, 11, 4, 32, torch.float16))


def test_no_tokens() -> None:
    heads = Heads(0, 4, 2, 16, torch.float32)
    assert heads.ours()[0].shape == (0, 4, 16)
    empty = torch.empty(0, 8, device=DEVICE)
    assert fused_kernels.rms_norm(empty, torch.ones(8, device=DEVICE), 1e-6).shape == (0, 8)
    assert fused_kernels.silu_and_mul(empty).shape == (0, 4)


def test_heads_that_do_not_fit_are_refused() -> None:
    heads = Heads(2, 4, 2, 16, torch.float32)
    wide = heads.qkv
    heads.qkv = wide[:, 1:]
    with pytest.raises(ValueError, match="need rows of 128 in one piece"):
        heads.ours()
    heads.qkv = wide.half()
    with pytest.raises(ValueError, match=r"qkv is torch\.float16 but k_cache") as caught:
        fused_heads_kernels.qk_norm_rope_store(
            heads.qkv,
            *heads.weights,
            1e-6,
            heads.rotary.table,
            heads.positions,
            heads.slots,
            *(cache.float() for cache in heads.caches()),
            **heads.sizes,
        )
    assert "they must be equal" in str(caught.value)
    heads.weights[1] = None
    with pytest.raises(ValueError, match="give both of q_norm_weight"):
        heads.ours()


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("size, dtype", [(48, torch.float32), (64, torch.float16)])
def test_norms(size: int, dtype: torch.dtype, pdl: bool) -> None:
    x = randn(3, size + 16, dtype=dtype)[:, :size]
    residual = randn(3, size, dtype=dtype, seed=1, scale=3)
    weight = 1 + randn(size, dtype=dtype, seed=2, scale=0.3)
    ours = fused_kernels.rms_norm(x, weight, 1e-6, pdl=pdl)
    assert_close(ours, layernorm.rms_norm(x, weight, 1e-6), "norm")
    before = x.clone(), residual.clone()
    normed, total = fused_kernels.add_rms_norm(x, residual, weight, 1e-6, pdl=pdl)
    expected_normed, expected_total = layernorm.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected_normed, "norm of the sum")
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("size, dtype", [(40, torch.float32), (1500, torch.float16)])
def test_silu_and_mul(size: int, dtype: torch.dtype, pdl: bool) -> None:
    x = randn(2, 2 * size, dtype=dtype, scale=4)
    assert_close(fused_kernels.silu_and_mul(x, pdl=pdl), activation.silu_and_mul(x), "silu * up")


def test_rows_that_do_not_fit_are_refused() -> None:
    x = randn(2, 8, dtype=torch.float32)
    weight = torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match="rows in one piece"):
        fused_kernels.rms_norm(x.T, weight, 1e-6)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(7,\)"):
        fused_kernels.rms_norm(x, weight[:7], 1e-6)
    with pytest.raises(ValueError, match=r"residual is torch\.float16"):
        fused_kernels.add_rms_norm(x, x.half(), weight, 1e-6)
    with pytest.raises(ValueError, match="even count"):
        fused_kernels.silu_and_mul(x[:, :7])


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 256, 1000])
def test_fused_kernels_at_the_sizes_of_real_models(
    tokens: int, dtype: torch.dtype, pdl: bool
) -> None:
    """Qwen3-0.6B, Qwen3-8B, and a rank's share of the latter."""
    for num_heads, num_kv_heads in ((16, 8), (32, 8), (8, 2)):
        check_heads(Heads(tokens, num_heads, num_kv_heads, 128, dtype, block_size=16), pdl=pdl)
    for size in (1024, 2560, 4096):
        x, residual = (randn(tokens, size, dtype=dtype, seed=s) for s in (0, 1))
        weight = 1 + randn(size, dtype=dtype, seed=2, scale=0.3)
        ours = fused_kernels.add_rms_norm(x, residual, weight, 1e-6, pdl=pdl)
        twin = layernorm.add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(ours[1], twin[1])
        assert_close(ours[0], twin[0], "norm of the sum")
    for size in (3072, 9728):
        x = randn(tokens, 2 * size, dtype=dtype, scale=3)
        ours = fused_kernels.silu_and_mul(x, pdl=pdl)
        assert_close(ours, activation.silu_and_mul(x), "silu * up")


# ------------------------------------------------------------------ the sampler


@triton.jit
def noise_kernel(seed_ptr, step_ptr, noise_ptr, BLOCK: tl.constexpr, FAST: tl.constexpr):
    """What the sampler takes for the noise of BLOCK tokens."""
    token = tl.arange(0, BLOCK)
    first, second = sampler_kernels.row_keys(tl.load(seed_ptr), tl.load(step_ptr))
    noise = sampler_kernels.log2_of_noise(token, first, second, FAST) * -sampler_kernels.LOG_2
    tl.store(noise_ptr + token, noise)


@pytest.mark.parametrize("seed, step", [(0, 0), (12345, 7), (-1, 1000), (2**62 + 99, 2**31 + 5)])
def test_noise_is_the_twins(seed: int, step: int) -> None:
    """The same bits go into the logarithms; those of a GPU are its hardware's."""
    count = 1 << 16
    seeds, steps = (torch.tensor([value], device=DEVICE) for value in (seed, step))
    noise = torch.full((count,), float("nan"), device=DEVICE)
    noise_kernel[(1,)](seeds, steps, noise, BLOCK=count, FAST=not INTERPRETED)
    expected = gumbel_noise(seeds, steps, count)[0]
    error = (noise - expected).abs().max().item()
    assert error < 5e-6, f"noise is off by {error:.3g}"
    assert noise.max() < sampler_kernels.MOST_NOISE.value


def test_no_noise_is_larger_than_the_largest() -> None:
    """A tile is skipped by it."""
    u = torch.tensor(1 - 2.0**-24)
    assert -(-u.log()).log() < sampler_kernels.MOST_NOISE.value < 17


def params(
    temperatures: list[float], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = len(temperatures)
    seeds = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    steps = torch.randint(5000, (count,), generator=generator)
    temperature = torch.tensor(temperatures, dtype=torch.float32)
    return temperature.to(DEVICE), seeds.to(DEVICE), steps.to(DEVICE)


def check_sample(
    logits: torch.Tensor, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **options: bool
) -> None:
    """The twin's tokens; where another is chosen, it scores the same but for rounding."""
    tokens = sampler_kernels.sample(logits, *given, **options)
    assert tokens.dtype == torch.int64
    temperature, seed, step = given
    expected = Sampler()(logits, SamplingTensors(temperature, seed, step))
    greedy = temperature == 0
    divisor = temperature.masked_fill(greedy, 1.0)[:, None]
    scores = logits.float() / divisor + gumbel_noise(seed, step, logits.shape[1])
    wrong = (tokens != expected).nonzero()[:, 0].tolist()
    for row in wrong:
        assert not greedy[row], f"greedy row {row}: {tokens[row]}, not {expected[row]}"
        ours, best = scores[row, tokens[row]].item(), scores[row, expected[row]].item()
        assert abs(ours - best) <= 1e-5 * max(abs(best), 1.0), f"row {row}: {ours}, best {best}"
    assert len(wrong) <= 1 + len(tokens) // 100


@pytest.fixture(params=[(1024, 192), (8, 192), (1024, 1)])
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile of 256 tokens a program; several; one program of larger tiles a row."""
    monkeypatch.setattr(sampler_kernels, "PROGRAMS", request.param[0])
    monkeypatch.setattr(sampler_kernels, "ROWS_THAT_FILL", request.param[1])
    monkeypatch.setattr(sampler_kernels, "WARPS_OF_A_ROW", 2)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize(
    "spread, dtype", [(0.0, torch.float32), (1.0, torch.float16), (12.0, torch.float32)]
)
def test_sampled_tokens_are_the_twins(
    spread: float, dtype: torch.dtype, pdl: bool, shares: None
) -> None:
    """No preference among tokens, a slight one and a strong one."""
    logits = randn(3, 700 + 8, dtype=dtype, scale=spread)[:, :700]
    check_sample(logits, params([1.0, 0.6, 0.0]), pdl=pdl)


def test_of_equal_logits_greedy_takes_the_lowest(shares: None) -> None:
    logits = torch.zeros(3, 700, device=DEVICE)
    logits[0, [270, 271, 275, 600, 699]] = 2.5
    logits[1] = float("-inf")
    logits[1, [530, 699]] = -7
    assert sampler_kernels.sample(logits, *params([0.0] * 3)).tolist() == [270, 530, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_without_a_best_name_a_token(shares: None) -> None:
    """What fills them is an error elsewhere, but no look-up may leave the embedding for it."""
    logits = torch.zeros(4, 300, device=DEVICE)
    for row, value in enumerate(("nan", "-inf", "inf", "nan")):
        logits[row] = float(value)
    tokens = sampler_kernels.sample(logits, *params([0.0, 0.7, 1.0, 1.0]))
    assert bool(((tokens >= 0) & (tokens < 300)).all())


def test_a_rows_token_does_not_depend_on_its_neighbours(shares: None) -> None:
    logits = randn(3, 500, dtype=torch.float32, scale=2)
    temperature, seed, step = params([0.7, 0.0, 1.6])
    together = sampler_kernels.sample(logits, temperature, seed, step)
    for row in (2, 0):
        one = slice(row, row + 1)
        alone = sampler_kernels.sample(logits[one], temperature[one], seed[one], step[one])
        assert alone.item() == together[row].item()


def test_sampling_follows_the_distribution() -> None:
    """4,000 draws from 8 tokens; every count within 4.5 standard deviations."""
    probability = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01])
    draws = 1 << 12
    logits = (probability.log() * 0.7).expand(draws, -1).contiguous()
    temperature = torch.full((draws,), 0.7)
    seed, step = torch.full((draws,), 77), torch.arange(draws)
    if INTERPRETED:  # the kernel takes a row a program there, which is slow
        scores = logits / 0.7 + gumbel_noise(seed, step, 8)
        chosen = torch.arange(0, draws, 512)
        ours = sampler_kernels.sample(
            logits[chosen], temperature[chosen], seed[chosen], step[chosen]
        )
        assert torch.equal(ours, scores.argmax(dim=1)[chosen])
        tokens = scores.argmax(dim=1)
    else:
        given = (x.to(DEVICE) for x in (logits, temperature, seed, step))
        tokens = sampler_kernels.sample(*given).cpu()
    counts = torch.bincount(tokens, minlength=8)
    expected = draws * probability
    deviation = (expected * (1 - probability)).sqrt()
    assert bool(((counts - expected).abs() < 4.5 * deviation).all()), counts.tolist()


def test_the_merge_is_the_same_kernel_for_every_batch() -> None:
    """Its block fits any number of shares, from one (a batch that fills the GPU) on."""
    vocab_size = 32 * sampler_kernels.WIDTH.value * 5 + 3
    for batch in (1, 2, 200):
        check_sample(
            randn(batch, vocab_size, dtype=torch.float32), params([0.7] * batch, seed=batch)
        )


def test_sampler_arguments_that_do_not_fit_are_refused() -> None:
    logits = randn(2, 50, dtype=torch.float32)
    temperature, seed, step = params([1.0, 1.0])
    with pytest.raises(ValueError, match="rows must lie in one piece"):
        sampler_kernels.sample(logits.T, temperature, seed, step)
    with pytest.raises(ValueError, match=r"temperature is torch\.float64"):
        sampler_kernels.sample(logits, temperature.double(), seed, step)
    with pytest.raises(ValueError, match=r"step is torch\.int32"):
        sampler_kernels.sample(logits, temperature, seed, step.int())
    with pytest.raises(ValueError, match=r"out is torch\.float32"):
        sampler_kernels.sample(logits, temperature, seed, step, out=temperature)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("batch", [1, 7, 32, 256])
def test_sampling_from_a_real_vocabulary(batch: int, dtype: torch.dtype, pdl: bool) -> None:
    for spread in (0.3, 2.0, 10.0):
        logits = randn(batch, 151_936, dtype=dtype, scale=spread)
        temperatures = [(0.6, 1.0, 0.0, 1.7)[row % 4] for row in range(batch)]
        check_sample(logits, params(temperatures, seed=batch), pdl=pdl)
