"""The recorder sees every access of a kernel, counts it right, and catches what leaves a tensor."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has wheels for Linux only")
tl = pytest.importorskip("triton.language")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
recorder = importlib.import_module("recorder")
Recorder = recorder.Recorder

INTERPRETED = bool(triton.knobs.runtime.interpret)
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="kernels are compiled here; test_with_a_gpu runs these interpreted"
)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on in this process already")
def test_with_a_gpu():
    """Where a GPU makes the suite compile its kernels, run this file in an interpreted process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + y, mask=mask)


@triton.jit
def unmasked_kernel(x_ptr, out_ptr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets + SHIFT)
    tl.store(out_ptr + offsets, x)


@triton.jit
def copy_2d_kernel(x_ptr, out_ptr, rows, cols, xr, xc, BM: tl.constexpr, BN: tl.constexpr):
    r = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    c = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    mask = (r < rows) & (c < cols)
    tl.store(out_ptr + r * cols + c, tl.load(x_ptr + r * xr + c * xc, mask=mask), mask=mask)


@triton.jit
def row_softmax_kernel(x_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m_i = -float("inf")
    l_i = 0.0
    for start in range(0, cols, BLOCK):
        x = tl.load(x_ptr + row * cols + start + tl.arange(0, BLOCK))
        m_new = tl.maximum(m_i, tl.max(x, axis=0))
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(x - m_new), axis=0)
        m_i = m_new
    tl.store(out_ptr + row, m_i + tl.log(l_i))


@triton.jit
def whole_softmax_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    y = tl.softmax(tl.load(x_ptr + offsets))
    tl.store(out_ptr + offsets, y)


@triton.jit
def read_page(pages_ptr, page, S: tl.constexpr):
    return tl.load(pages_ptr + page * S + tl.arange(0, S))


@triton.jit
def paged_sum_kernel(pages_ptr, table_ptr, out_ptr, n_pages, S: tl.constexpr):
    total = 0.0
    for i in range(n_pages):
        total += tl.sum(read_page(pages_ptr, tl.load(table_ptr + i), S), axis=0)
    tl.atomic_add(out_ptr, total)


@triton.jit
def lock_kernel(lock_ptr, out_ptr):
    seen = tl.atomic_cas(lock_ptr, 0, 7)
    tl.store(out_ptr + tl.program_id(0), seen)


@triton.jit
def descriptor_kernel(x_ptr, out_ptr, rows, cols, BM: tl.constexpr, BN: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, cols], [cols, 1], [BM, BN])
    out = tl.make_tensor_descriptor(out_ptr, [rows, cols], [cols, 1], [BM, BN])
    r, c = tl.program_id(0) * BM, tl.program_id(1) * BN
    out.store([r, c], x.load([r, c]))


@triton.jit
def host_descriptor_kernel(x, out_ptr, BM: tl.constexpr, BN: tl.constexpr):
    tile = x.load([0, 0])
    place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(out_ptr + place, tile)


@triton.jit
def choosing_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    pointers = tl.where(offsets % 2 == 0, x_ptr + offsets, y_ptr + offsets)
    tl.store(out_ptr + offsets, tl.load(pointers, mask=offsets < 6))


@triton.jit
def pointer_table_kernel(table_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    row = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offsets, tl.load(row + offsets))


@triton.jit
def bits_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr.to(tl.pointer_type(tl.int64))))


def line_of(text: str) -> int:
    """Number of the only line of this file that holds the text (this search left out)."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    found = [i for i, line in enumerate(lines, 1) if text in line and "line_of(" not in line]
    assert len(found) == 1
    return found[0]


# ---- the canary ---------------------------------------------------------------------------------


@interpreted
def test_canary_triton_private_names_are_in_place():
    recorder.check_interpreter()


@interpreted
@pytest.mark.parametrize("name", ["GridExecutor", "_implicit_cvt", "TensorHandle"])
def test_a_moved_name_is_named(monkeypatch, name):
    monkeypatch.delattr(triton.runtime.interpreter, name)
    with pytest.raises(recorder.RecorderError, match=name):
        recorder.check_interpreter()


@interpreted
def test_a_changed_signature_is_named(monkeypatch):
    builder = triton.runtime.interpreter.interpreter_builder
    monkeypatch.setattr(type(builder), "create_masked_load", lambda self, mask, ptrs: None)
    with pytest.raises(recorder.RecorderError, match="create_masked_load"):
        recorder.check_interpreter()


# ---- what is recorded ---------------------------------------------------------------------------


@interpreted
def test_masked_add_records_each_access():
    x, y, out = torch.randn(70), torch.randn(70), torch.zeros(70)
    with Recorder({"x": x, "y": y, "out": out}) as rec:
        add_kernel[(3,)](x, y, out, 70, BLOCK=32)
    np.testing.assert_allclose(out, x + y)
    assert rec.programs == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert [event.order for event in rec.events] == list(range(9))
    assert [event.tensor for event in rec.events] == ["x", "y", "out"] * 3
    assert [event.kind for event in rec.events] == ["load", "load", "store"] * 3
    last = rec.select("x", "load", program=(2, 0, 0))
    assert len(last) == 1 and last[0].bytes == 6 * 4
    np.testing.assert_array_equal(last[0].offsets, np.arange(64, 96))
    np.testing.assert_array_equal(last[0].mask, np.arange(64, 96) < 70)
    np.testing.assert_array_equal(last[0].index[0], np.arange(64, 70))
    assert last[0].file == __file__ and last[0].kernel == "add_kernel"
    assert last[0].line == line_of("x = tl.load(x_ptr + offsets, mask=mask)")
    assert rec.bytes_read("x") == rec.bytes_written("out") == 280
    assert rec.bytes_read() == 560 and rec.bytes_written("x") == 0
    assert (rec.times_read("x") == 1).all() and (rec.times_written("out") == 1).all()
    assert [len(events) for events in rec.loads_by_program("y").values()] == [1, 1, 1]
    assert [len(events) for events in rec.stores_by_program("y").values()] == [0, 0, 0]


@interpreted
def test_strided_copy_recovers_both_indices():
    x, out = torch.randn(6, 10).T, torch.zeros(10, 6)  # (10, 6), column-major
    with Recorder({"x": x, "out": out}) as rec:
        copy_2d_kernel[(3, 2)](x, out, 10, 6, *x.stride(), BM=4, BN=4)
    assert torch.equal(out, x)
    assert (rec.times_read("x") == 1).all() and rec.times_read("x").shape == (10, 6)
    rows, cols = rec.select("x", program=(2, 1, 0))[0].index
    assert set(rows) == {8, 9} and set(cols) == {4, 5}
    first = rec.select("x", program=(0, 0, 0))[0]
    np.testing.assert_array_equal(first.offsets[:2, :2], [[0, 10], [1, 11]])


@interpreted
def test_gap_of_a_strided_view_is_out_of_bounds():
    whole, out = torch.zeros(8, 8), torch.zeros(8, 4)
    view = whole[:, :4]
    with Recorder({"x": view, "out": out}) as rec:
        copy_2d_kernel[(2, 1)](view, out, 8, 4, 8, 1, BM=4, BN=4)
    assert (rec.times_read("x") == 1).all()
    with pytest.raises(recorder.OutOfBoundsError, match=r"leave 'x'.*offset 4"):
        with Recorder({"x": view, "out": out}):  # treats the view as if it were packed
            copy_2d_kernel[(2, 1)](view, out, 8, 4, 4, 1, BM=4, BN=4)


@interpreted
def test_watched_variables_follow_the_online_softmax():
    x, out = torch.tensor([[1.0, 0, 3, 2, 9, 1, 4, 4], [5, 5, 5, 5, 5, 5, 5, 5]]), torch.zeros(2)
    with Recorder({"x": x, "out": out}, watch=("m_i", "l_i")) as rec:
        row_softmax_kernel[(2,)](x, out, 8, BLOCK=2)
    np.testing.assert_allclose(out, x.logsumexp(dim=1), rtol=1e-6)
    line = line_of("m_i = m_new")
    maxima = [
        float(s.value)
        for s in rec.snapshots
        if s.name == "m_i" and s.line == line and s.program == (0, 0, 0)
    ]
    assert maxima == [1, 3, 9, 9]
    sums = [s for s in rec.snapshots if s.name == "l_i" and s.program == (0, 0, 0)]
    assert len(sums) == 1 + 4 and sums[-1].value == pytest.approx(
        float((x[0] - 9).exp().sum()), rel=1e-6
    )
    assert sums[1].order == 1 and sums[-1].order == 4  # after the 1st and after the 4th load


@interpreted
def test_locals_of_tritons_own_helpers_are_not_watched():
    x, out = torch.randn(8), torch.zeros(8)
    with Recorder({"x": x, "out": out}, watch=("num", "y")) as rec:  # tl.softmax has a local num
        whole_softmax_kernel[(1,)](x, out, BLOCK=8)
    np.testing.assert_allclose(out, x.softmax(dim=0), rtol=1e-6)
    assert {shot.name for shot in rec.snapshots} == {"y"}


@interpreted
def test_patch_interpreter_serves_without_a_recorder_and_comes_out_again():
    interpreter = triton.runtime.interpreter
    before = interpreter._patch_lang_tensor
    first = recorder.patch_interpreter()
    second = recorder.patch_interpreter()
    pages, table, out = torch.randn(5, 4), torch.tensor([3, 1, 3]), torch.zeros(1)
    paged_sum_kernel[(1,)](pages, table, out, 3, S=4)
    np.testing.assert_allclose(out[0], pages[1].sum() + 2 * pages[3].sum(), rtol=1e-5)
    second()
    first()
    assert interpreter._patch_lang_tensor is before


@interpreted
def test_a_tensor_read_twice_is_counted_twice():
    x, out = torch.randn(16), torch.zeros(16)
    with Recorder({"x": x, "out": out}) as rec:
        add_kernel[(1,)](x, x, out, 16, BLOCK=16)
    assert (rec.times_read("x") == 2).all() and rec.bytes_read("x") == 2 * 16 * 4


@interpreted
def test_pages_helper_functions_and_atomics():
    pages, table, out = torch.randn(5, 4), torch.tensor([3, 1, 3]), torch.zeros(1)
    with Recorder({"pages": pages, "table": table, "out": out}) as rec:
        paged_sum_kernel[(2,)](pages, table, out, 3, S=4)
    np.testing.assert_allclose(out[0], 2 * (pages[1].sum() + 2 * pages[3].sum()), rtol=1e-5)
    np.testing.assert_array_equal(rec.times_read("pages")[:, 0], [0, 2, 0, 4, 0])
    line = line_of("return tl.load(pages_ptr + page * S + tl.arange(0, S))")
    assert {event.line for event in rec.select("pages")} == {line}
    assert {event.kernel for event in rec.select("pages")} == {"paged_sum_kernel"}
    atomics = rec.select("out")
    assert [event.kind for event in atomics] == ["atomic", "atomic"]
    assert rec.times_read("out") == rec.times_written("out") == 2
    assert rec.select("table")[0].element_bytes == 8


@interpreted
def test_compare_and_swap():
    lock, out = torch.zeros(1, dtype=torch.int32), torch.full((2,), -1, dtype=torch.int32)
    with Recorder({"lock": lock, "out": out}) as rec:
        lock_kernel[(2,)](lock, out)
    assert out.tolist() == [0, 7] and lock.item() == 7
    assert rec.times_written("lock").tolist() == [2]


@interpreted
def test_tensor_descriptors():
    x, out = torch.randn(6, 8), torch.zeros(6, 8)
    with Recorder({"x": x, "out": out}) as rec:
        descriptor_kernel[(2, 2)](x, out, 6, 8, BM=4, BN=4)
    assert torch.equal(out, x)
    assert (rec.times_read("x") == 1).all() and (rec.times_written("out") == 1).all()
    assert rec.select("x", program=(1, 0, 0))[0].mask.sum() == 2 * 4

    descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    with Recorder(register_arguments=True) as rec:
        host_descriptor_kernel[(1,)](descriptor.from_tensor(x, [4, 4]), out, BM=4, BN=4)
    assert rec.shapes == {"x": (6, 8), "out_ptr": (6, 8)}
    assert rec.times_read("x")[:4, :4].all() and rec.times_read("x").sum() == 16


@interpreted
def test_lanes_that_choose_between_tensors_are_split():
    x, y, out = torch.arange(8.0), -torch.arange(8.0), torch.zeros(8)
    with Recorder({"x": x, "y": y, "out": out}) as rec:
        choosing_kernel[(1,)](x, y, out, BLOCK=8)
    assert out.tolist() == [0, -1, 2, -3, 4, -5, 0, 0]
    assert rec.times_read("x").tolist() == [1, 0, 1, 0, 1, 0, 0, 0]
    assert rec.times_read("y").tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    assert [event.order for event in rec.events] == [0, 0, 1]


@interpreted
def test_pointers_loaded_from_memory_are_found_by_address():
    rows, out = torch.randn(2, 4), torch.zeros(2, 4)
    table = torch.tensor([rows[1].data_ptr(), rows[0].data_ptr()])
    with Recorder({"rows": rows, "table": table, "out": out}) as rec:
        pointer_table_kernel[(2,)](table, out, BLOCK=4)
    assert torch.equal(out, rows.flip(0))
    assert rec.select("rows", program=(0, 0, 0))[0].index[0].tolist() == [1] * 4
    with pytest.raises(recorder.OutOfBoundsError, match="in no named tensor"):
        with Recorder({"table": table, "out": out}):
            pointer_table_kernel[(2,)](table, out, BLOCK=4)


@interpreted
def test_an_expanded_tensor_counts_on_its_first_element():
    x, out = torch.randn(1, 4).expand(3, 4), torch.zeros(3, 4)
    with Recorder({"x": x, "out": out}) as rec:
        copy_2d_kernel[(1, 1)](x, out, 3, 4, *x.stride(), BM=4, BN=4)
    assert rec.times_read("x").tolist() == [[3] * 4, [0] * 4, [0] * 4]


@interpreted
def test_elements_of_another_size_are_refused():
    x, out = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(recorder.RecorderError, match="elements of 8 bytes, while those of 'x'"):
        with Recorder({"x": x, "out": out}):
            bits_kernel[(1,)](x, out)


# ---- bounds -------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("shift", "offset"), [(1, 16), (-3, -3), (1 << 20, 1 << 20)])
def test_out_of_bounds_load_is_caught_and_everything_restored(shift, offset):
    interpreter = triton.runtime.interpreter

    def state():
        private = interpreter.GridExecutor.__call__, interpreter._implicit_cvt
        return *private, interpreter._patch_lang_tensor, tl.load, sys.gettrace()

    before = state()
    x, out = torch.zeros(16), torch.zeros(16)
    with pytest.raises(recorder.OutOfBoundsError) as caught:
        with Recorder({"x": x, "out": out}, watch=("x",)):
            unmasked_kernel[(2,)](x, out, SHIFT=shift, BLOCK=8)
    message = str(caught.value)
    line = line_of("x = tl.load(x_ptr + offsets + SHIFT)")
    program = "(0, 0, 0)" if shift != 1 else "(1, 0, 0)"
    for part in ("unmasked_kernel", f"{__file__}:{line}", program, "'x'", f"offset {offset},"):
        assert part in message
    assert state() == before
    assert interpreter._patch_lang_tensor.__module__ == interpreter.__name__
    assert not {"create_masked_load", "set_grid_idx"} & set(vars(interpreter.interpreter_builder))
    add_kernel[(1,)](x, x, out, 16, BLOCK=16)  # and the interpreter still works


@interpreted
def test_running_into_the_neighbour_is_caught():
    """Two views of one storage: the address exists and has a name, yet is not x's."""
    both, out = torch.zeros(2, 16), torch.zeros(16)
    with pytest.raises(recorder.OutOfBoundsError, match="leave 'x'"):
        with Recorder({"x": both[0], "y": both[1], "out": out}):
            unmasked_kernel[(1,)](both[0], out, SHIFT=16, BLOCK=16)


# ---- names --------------------------------------------------------------------------------------


@interpreted
def test_views_count_under_the_named_tensor():
    cache, out = torch.randn(2, 16), torch.zeros(16)
    with Recorder({"cache": cache, "out": out}) as rec:
        add_kernel[(1,)](cache[1], cache[0], out, 16, BLOCK=16)
    assert (rec.times_read("cache") == 1).all()
    assert rec.select("cache")[0].index[0].tolist() == [1] * 16


@interpreted
def test_unnamed_arguments_are_refused_or_registered():
    x, y, out = torch.randn(8), torch.randn(8), torch.zeros(8)
    with pytest.raises(recorder.RecorderError, match="'y_ptr' of add_kernel"):
        with Recorder({"x": x, "out": out}):
            add_kernel[(1,)](x, y, out, 8, BLOCK=8)
    with Recorder({"first": x}, register_arguments=True) as rec:
        add_kernel[(1,)](x, y, out_ptr=out, n=8, BLOCK=8, num_warps=4)
        add_kernel[(1,)](x, torch.ones(8), out, 8, BLOCK=8)
        add_kernel[(1,)](x, torch.tensor(2.0), out, 1, BLOCK=8)
    ones, scalar = "add_kernel.y_ptr", "add_kernel.y_ptr.2"
    assert list(rec.shapes) == ["first", "y_ptr", "out_ptr", ones, scalar]
    assert rec.times_read(scalar) == 1 and rec.select(scalar)[0].index == ()
    assert [launch.kernel for launch in rec.launches] == ["add_kernel"] * 3
    assert (rec.times_read("first")[1:] == 2).all() and (rec.times_read("y_ptr") == 1).all()


# ---- misuse -------------------------------------------------------------------------------------


@interpreted
def test_misuse_is_refused_with_a_remedy():
    x = torch.zeros(4)
    with pytest.raises(recorder.RecorderError, match="float32 or float16"):
        Recorder({"x": x.bfloat16()})
    half = torch.zeros(4, dtype=torch.float16)
    with pytest.raises(recorder.RecorderError, match="'y_ptr' is bfloat16"):
        with Recorder({"x": half}):
            add_kernel[(1,)](half, half.view(torch.bfloat16), half, 4, BLOCK=4)
    with pytest.raises(recorder.RecorderError, match=r"torch\.Tensor"):
        Recorder({"x": [1.0]})
    with pytest.raises(recorder.RecorderError, match="pass a tuple"):
        Recorder({"x": x}, watch="m_i")
    with Recorder({"x": x}) as rec:
        with pytest.raises(recorder.RecorderError, match="another Recorder is active"):
            with Recorder({"x": x}):
                pass
        with pytest.raises(recorder.RecorderError, match="nothing was recorded"):
            rec.bytes_read("x")
        add_kernel[(1,)](x, x, x, 4, BLOCK=4)
    assert rec.bytes_read("x") == 32
    with pytest.raises(recorder.RecorderError, match="make a new one"):
        rec.__enter__()
    with pytest.raises(recorder.RecorderError, match=r"no tensor named 'y'.*'x'"):
        rec.times_read("y")
    with pytest.raises(recorder.RecorderError, match="load, store, atomic"):
        rec.select("x", "read")


@pytest.mark.parametrize(
    ("environment", "before", "message"),
    [
        ({}, "", "TRITON_INTERPRET"),
        ({}, "import triton.language, os; os.environ['TRITON_INTERPRET'] = '1'", "first cell"),
        ({"TRITON_INTERPRET": "1"}, "sys.modules['triton'] = None", "wheels for Linux"),
    ],
)
def test_without_the_interpreter_the_remedy_is_told(environment, before, message):
    code = f"import sys\n{before}\nfrom recorder import Recorder\nwith Recorder(): pass"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "notebooks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and message in done.stderr.strip().splitlines()[-1], done.stderr


# ---- pictures -----------------------------------------------------------------------------------


@pytest.fixture
def drawing(monkeypatch):
    mpl = pytest.importorskip("matplotlib")
    mpl.use("Agg")
    with mpl.rc_context():
        module = importlib.import_module("drawing")
        module.use_style()
        yield module
        importlib.import_module("matplotlib.pyplot").close("all")


@interpreted
def test_pictures_show_what_was_recorded(drawing):
    x, out = torch.randn(6, 10), torch.zeros(6, 10)
    with Recorder({"x": x, "out": out}) as rec:
        copy_2d_kernel[(2, 2)](x, out, 6, 10, 10, 1, BM=4, BN=8)
    ids = ["(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)"]
    ax = drawing.draw_tensor_accesses(rec, "x")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ids
    filled = ax.collections[1].get_facecolor()  # the first collection is the empty grid
    sizes = [int(n) for n in np.unique(filled, axis=0, return_counts=True)[1]]
    assert sorted(sizes) == [4, 8, 16, 32]
    ax = drawing.draw_tensor_accesses(rec, "x", by="times", program=(0, 0, 0))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1 time"]
    assert len(ax.collections[1].get_paths()) == 32
    ax = drawing.draw_programs(rec, "out")
    assert sorted(text.get_text() for text in ax.texts) == ids
    figure = drawing.draw_over_time(rec, ["x"], panels=3)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["loads 1–2", "load 3", "load 4"]
    for choice in ({"kind": "load"}, {"by": "lane"}, {"name": "z"}):
        with pytest.raises(ValueError, match=str(next(iter(choice.values())))):
            drawing.draw_tensor_accesses(rec, **{"name": "x", **choice})


@interpreted
def test_pages_are_drawn_apart(drawing):
    cache, table, out = torch.randn(5, 4, 2, 2), torch.tensor([3, 1, 3]), torch.zeros(1)
    with Recorder({"cache": cache, "table": table, "out": out}) as rec:
        paged_sum_kernel[(1,)](cache, table, out, 3, S=16)
    ax = drawing.draw_programs(rec, "cache", kind="read")
    pages = [f"page {n}" for n in range(5)]
    labels = [text.get_text() for text in ax.texts]
    assert labels[:5] == pages and labels[5:] == ["0"] * 4  # two heads of two pages
    ax = drawing.draw_tensor_accesses(rec, "cache", by="times")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1 time", "2 times"]


@interpreted
def test_snapshots_are_drawn_as_recorded(drawing):
    x, out = torch.tensor([[1.0, 0, 3, 2, 9, 1, 4, 4]]), torch.zeros(1)
    with Recorder({"x": x, "out": out}, watch=("m_i",)) as rec:
        row_softmax_kernel[(1,)](x, out, 8, BLOCK=2)
    line = line_of("m_i = m_new")
    (curve,) = drawing.draw_snapshots(rec, "m_i", line=line).get_lines()
    assert list(curve.get_ydata()) == [1, 3, 9, 9]
    with pytest.raises(ValueError, match="no snapshot of 'l_i'"):
        drawing.draw_snapshots(rec, "l_i")
    with pytest.raises(ValueError, match="lane 1 is out of range"):
        drawing.draw_snapshots(rec, "m_i", lanes=[1])
