"""Products of a matrix with up to 256 rows on Hopper: weights by the copy engine, before the wait.

The same products as in ``skinny_kernels.py``, cut into tiles and parts in the same way, but of
other sizes. There each program keeps its weights in registers, 16 rows of them, and multiplies them
by all rows of x: with more than 16 of those it reads more of x than of weights. Here the copy
engine (TMA) brings both factors into shared memory in the order in which the matrix unit wants
them, and a program takes 64 rows of the weights:

    before the wait     weights  chunk 0, 1, 2, ...  of K      as many as there are buffers
    after it            x        chunk 0, 1, 2, ...
    for each chunk      wait for both; sums [64, ROWS] += weights [64, CHUNK] x [ROWS, CHUNK].T
                        and refill the buffers of the chunk before

Weights are the first factor: the instruction (wgmma) takes 64 rows of that one, always, and 8 to
256 of the second.

It is written in Gluon, as ``flash_hopper_kernels.py`` is: in Triton's own language a copy cannot be
started in one place and waited for in another.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.attention.flash_hopper_kernels import copy_in
from minivllm.engine.skinny_split_kernels import launch_options
from minivllm.engine.skinny_tuning import HOPPER_BLOCK_N

SHARED_BYTES = 220 << 10  # of a multiprocessor, for buffers
BLOCK_N = gl.constexpr(HOPPER_BLOCK_N)


@gluon.jit
def copy_weights(
    w_desc, tile, column, full, w_tile, OUT: gl.constexpr, SILU: gl.constexpr, CHUNK: gl.constexpr
):
    """Start the copy of CHUNK columns of a program's rows; of gate and up, half of them each."""
    mbarrier.expect(full, BLOCK_N * CHUNK * 2)
    if SILU:
        HALF: gl.constexpr = BLOCK_N // 2
        copy_in(w_desc, [tile * HALF, column], full, w_tile.slice(0, HALF))
        copy_in(w_desc, [OUT + tile * HALF, column], full, w_tile.slice(HALF, HALF))
    else:
        copy_in(w_desc, [tile * BLOCK_N, column], full, w_tile)


@gluon.jit
def copy_x(x_desc, column, full, x_tile, ROWS: gl.constexpr, CHUNK: gl.constexpr):
    """Start the copy of CHUNK columns of x; rows that it has not are zeros."""
    mbarrier.expect(full, ROWS * CHUNK * 2)
    copy_in(x_desc, [0, column], full, x_tile)


@gluon.jit
def inverse_rms(squares_ptr, rows, size, eps, ROWS: gl.constexpr, SQUARES: gl.constexpr):
    """For each row, 1 / the root of what squares [SQUARES, rows] add up to over ``size``: [ROWS].

    A thread takes a row.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lanes = gl.arange(0, ROWS, layout=layout)
    mask = lanes < rows
    total = gl.zeros([ROWS], gl.float32, layout)
    for i in gl.static_range(SQUARES):
        total += gl.load(squares_ptr + i * rows + lanes, mask=mask, other=1.0)
    return gl.rsqrt(total / size + eps)


@gluon.jit(do_not_specialize=["rows", "size"])
def hopper_product_kernel(
    w_desc,
    x_desc,
    out_ptr,
    squares_ptr,
    rows,
    size,
    eps,
    K_PART: gl.constexpr,
    OUT: gl.constexpr,
    SILU: gl.constexpr,
    ROWS: gl.constexpr,  # rows, padded to a power of two of at least 8
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    SQUARES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """Program (tile, part): out [parts, rows, OUT] = x [rows, K] @ weight [N, K].T.

    SILU: N = 2 * OUT, gate rows then up rows; out = silu(gate) * up. SQUARES: rows of x are divided
    by the root of what squares [SQUARES, rows] add up to over ``size``; 0 if they are not.
    """
    CHUNKS: gl.constexpr = (K_PART + CHUNK - 1) // CHUNK
    dtype: gl.constexpr = w_desc.dtype
    tile = gl.program_id(0)
    part = gl.program_id(1)
    start = part * K_PART
    w_tile = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, CHUNK], w_desc.layout)
    x_tile = gl.allocate_shared_memory(dtype, [STAGES, ROWS, CHUNK], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # one for the weights and one for x
    fence_async_shared()
    for i in gl.static_range(STAGES):
        copy_weights(
            w_desc, tile, start + i * CHUNK, full.index(i), w_tile.index(i), OUT, SILU, CHUNK
        )
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    for i in gl.static_range(STAGES):
        copy_x(x_desc, start + i * CHUNK, full.index(i), x_tile.index(i), ROWS, CHUNK)

    if SQUARES:
        scale = inverse_rms(squares_ptr, rows, size, eps, ROWS, SQUARES)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    sums = gl.zeros([BLOCK_N, ROWS], gl.float32, layout)
    for i in range(CHUNKS):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        sums = warpgroup_mma(
            w_tile.index(stage), x_tile.index(stage).permute((1, 0)), sums, is_async=True
        )
        # All but the newest product are over, so the buffers of the one before are free.
        sums = warpgroup_mma_wait(1, [sums])
        if (i > 0) & (i - 1 + STAGES < CHUNKS):
            free = (i - 1) % STAGES
            column = start + (i - 1 + STAGES) * CHUNK
            copy_weights(
                w_desc, tile, column, full.index(free), w_tile.index(free), OUT, SILU, CHUNK
            )
            copy_x(x_desc, column, full.index(free), x_tile.index(free), ROWS, CHUNK)
    sums = warpgroup_mma_wait(0, [sums])
    if SQUARES:
        scale = gl.convert_layout(scale, gl.SliceLayout(0, layout))
        sums = sums * scale[None, :]

    if SILU:
        HALF: gl.constexpr = BLOCK_N // 2
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
        both = gl.allocate_shared_memory(gl.float32, [BLOCK_N, ROWS], flat, sums)
        out_layout: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
        gate = both.slice(0, HALF).load(out_layout)
        up = both.slice(HALF, HALF).load(out_layout)
        result = gate / (1.0 + gl.exp(-gate)) * up
        at = tile * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, out_layout))
        lanes = gl.arange(0, ROWS, layout=gl.SliceLayout(0, out_layout))
    else:
        result = sums
        at = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
        lanes = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    out_at = (part * rows + lanes)[None, :] * OUT + at[:, None]
    mask = (lanes < rows)[None, :] & (at < OUT)[:, None]
    gl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=mask)


@cache
def _layout(box: int, chunk: int, dtype: torch.dtype) -> Any:
    """How ``box`` rows of a chunk lie in shared memory; finding it takes longer than a launch."""
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([box, chunk], element)


def _descriptor(matrix: torch.Tensor, box: int, chunk: int) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(
        matrix,
        list(matrix.shape),
        list(matrix.stride()),
        [box, chunk],
        _layout(box, chunk, matrix.dtype),
    )


def hopper_product(
    weight: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    silu: bool = False,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
    chunk: int = 128,
    stages: int = 8,
    processors: int = 132,
    together: int = 3,
    dependent: bool = False,
) -> None:
    """out = x @ weight.T for up to 256 rows; its parts, where out has several.

    Args:
        weight: bfloat16 or float16 [N, K], contiguous, K a multiple of 8.
        x: [P, K], contiguous, in the weight's dtype.
        out: [parts, P, N], N / 2 with ``silu``; with several parts, K a multiple of parts * chunk.
        silu: weight holds gate rows and then up rows; out = silu(gate) * up.
        squares: float32 [n, P], where rows of x are yet to be divided by the square root of their
            sum over K, plus ``eps``.
        chunk, stages: how much of K a copy brings, and how many buffers there are for them at most.
        processors, together: multiprocessors, and how many programs at most are to share one; what
            shared memory it has is divided among them.
        dependent: whether the kernel in front was launched to be overlapped.
    """
    parts, rows, width = out.shape
    block = BLOCK_N.value // 2 if silu else BLOCK_N.value
    tiles = triton.cdiv(width, block)
    k_part = weight.shape[1] // parts
    assert parts == 1 or weight.shape[1] % (parts * chunk) == 0, "parts would overlap"
    padded = max(8, triton.next_power_of_2(rows))
    share = SHARED_BYTES // min(together, triton.cdiv(tiles * parts, processors))
    # With a single buffer a product would wait for a copy that is started after it.
    most = max(2, share // (chunk * (BLOCK_N.value + padded) * weight.element_size()))
    hopper_product_kernel[(tiles, parts)](
        _descriptor(weight, block, chunk),
        _descriptor(x, padded, chunk),
        out,
        squares,
        rows,
        weight.shape[1],
        eps,
        K_PART=k_part,
        OUT=width,
        SILU=silu,
        ROWS=padded,
        CHUNK=chunk,
        STAGES=min(max(2, stages), most, triton.cdiv(k_part, chunk)),
        SQUARES=0 if squares is None else len(squares),
        DEPENDENT=dependent,
        num_warps=4,
        **launch_options(dependent),
    )
