"""Chapter 8: the skinny chain's tunings and buffers, and where it runs."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
from skinny_helpers import LAYERS, SMALL_TILES, TINY

from minivllm.engine import skinny_forward, step_forms
from minivllm.engine.skinny_buffers import Scratch, SkinnyBuffers
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.engine.skinny_tuning import OWN_ATTENTION, SkinnyTuning
from minivllm.models.qwen3 import Qwen3ForCausalLM

PROCESSORS = 132  # multiprocessors of an H100 or H200
CPU, META = torch.device("cpu"), torch.device("meta")


# ------------------------------------------------------------------ into how many parts


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


@pytest.mark.parametrize(
    "size, mlp_size, parts", [(1024, 3072, 1), (2048, 6144, 1), (4096, 12288, 2), (5120, 25600, 4)]
)
def test_a_program_of_one_row_keeps_its_weights_in_registers(size, mlp_size, parts):
    """Qwen3's sizes 0.6B, 1.7B, 8B and 32B: down_proj, whose rows are the longest."""
    tuning = SkinnyTuning.for_rows(1)
    assert tuning.parts(1, size, mlp_size, 16, PROCESSORS) == parts
    padded = 1 << (mlp_size // parts - 1).bit_length()
    assert 2 * padded <= tuning.gemv_weights


# ------------------------------------------------------------------ the memory between kernels


def test_scratch_is_shared_by_name_and_dtype():
    scratch = Scratch(CPU)
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
    """A graph that was captured with it goes on using it."""
    scratch = Scratch(CPU)
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


@pytest.fixture
def model_of_nothing():
    """A layer of 0.6B; memory that is not there will do."""
    return Qwen3ForCausalLM(replace(LAYERS, num_layers=1), dtype=torch.bfloat16, device=META)


def test_buffers_on_hopper(model_of_nothing):
    tuning = SkinnyTuning.for_rows(32)
    buffers = buffers_of(model_of_nothing, 32, tuning, Scratch(META))
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
    buffers = buffers_of(model_of_nothing, 32, chosen, Scratch(META))
    assert [len(x) for x in (buffers.qkv, buffers.o_parts, buffers.down_parts)] == [2, 8, 3]


def test_buffers_elsewhere(model_of_nothing):
    model = model_of_nothing
    for rows in (1, 8, 32):
        tuning = SkinnyTuning.for_rows(rows)
        buffers = buffers_of(model, rows, tuning, Scratch(META), hopper=False)
        qkv_parts = tuning.parts(rows, 4096, 1024, 16, PROCESSORS)
        assert len(buffers.qkv) == (1 if rows == 1 else qkv_parts)
        assert len(buffers.o_parts) == tuning.parts(rows, 1024, 2048, 128, PROCESSORS)
        assert len(buffers.down_parts) == tuning.parts(rows, 1024, 3072, 16, PROCESSORS)
    buffers = buffers_of(model, 1, tuning, Scratch(META), hopper=False, merge_inside=True)
    assert len(buffers.o_parts) == 4 and not buffers.direct


def test_buffers_of_fewer_rows_lie_in_those_of_more():
    model = Qwen3ForCausalLM(TINY, dtype=torch.float16, device=CPU)
    scratch = Scratch(CPU)
    tuning = replace(SMALL_TILES, qkv_parts=1)
    many = buffers_of(model, 16, tuning, scratch)
    few = buffers_of(model, 3, tuning, scratch)
    for buffers in (many, few):
        tensors = [x for x in vars(buffers).values() if isinstance(x, torch.Tensor)]
        assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)
        places = [x.data_ptr() for x in (*tensors, *buffers.totals)]
        assert len(set(places)) == len(places), "two buffers share memory"
    # Attention's need not: fewer rows have more splits, and one split is kept in another dtype.
    assert few.normed.data_ptr() == many.normed.data_ptr()
    assert few.o_parts.data_ptr() == many.o_parts.data_ptr()
    assert [x.data_ptr() for x in few.totals] == [x.data_ptr() for x in many.totals]


# ------------------------------------------------------------------ where all of this runs


WIDE = replace(TINY, hidden_size=4096)


def test_where_the_chain_runs_without_hopper():
    for dtype in (torch.float32, torch.bfloat16):
        assert step_forms.skinny_places(TINY, dtype, CPU) == 32
        assert step_forms.skinny_places(WIDE, dtype, CPU) == 1
        assert "rows=65 must be 1 to 64" in SkinnyForward.why_not(TINY, 65, CPU, dtype)
    assert "rows=0" in SkinnyForward.why_not(TINY, 0, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU that is here")
def test_the_interpreter_takes_64_rows(monkeypatch):
    assert SkinnyForward.fits(TINY, 64, CPU)
    assert SkinnyForward.fits(TINY, 64, CPU, torch.float16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "need Triton and a GPU" in SkinnyForward.why_not(TINY, 64, CPU)


def test_where_the_chain_runs_on_hopper(monkeypatch):
    def pretend(device, dtype, head_size):
        return dtype != torch.float32 and head_size in (64, 128)

    for module in (skinny_forward, step_forms):
        monkeypatch.setattr(module, "runs_on_hopper", pretend)
    monkeypatch.setattr(skinny_forward, "triton_runs_on", lambda device: True)
    for dtype in (torch.bfloat16, torch.float16):
        assert step_forms.skinny_places(TINY, dtype, CPU) == 128
        assert step_forms.skinny_places(WIDE, dtype, CPU) == 32
        assert SkinnyForward.fits(TINY, 256, CPU, dtype)
        assert "must be 1 to 256" in SkinnyForward.why_not(TINY, 257, CPU, dtype)
    assert step_forms.skinny_places(TINY, torch.float32, CPU) == 32
    assert not SkinnyForward.fits(TINY, 65, CPU, torch.float32)


def test_whose_attention_by_rows():
    for rows in (1, 2, 4, 5, 16, 17, 128):
        tuning = SkinnyTuning.for_rows(rows)
        assert tuning.hopper
        assert tuning.own_attention == (rows <= OWN_ATTENTION)
