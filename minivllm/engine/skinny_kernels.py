"""Matrix products for a handful of rows: the weights are read once, and everything else waits.

With one row in flight a layer is a chain of five products of a matrix and a vector. Reading the
matrices takes the time; what is left to win lies between the kernels. So each kernel loads its
piece of the weights BEFORE it waits for the kernel in front ("programmatic dependent launch"):
while one kernel finishes, the registers of the next are already full.

    kernel n     |- load weights -|- wait -|- read x, multiply, write -|
    kernel n+1         |- load weights -|-------- wait --------|- read x, multiply, write -|

The weights [N, K] of a product, and who owns what. A program of ``gemv_kernel`` (one row) takes
BLOCK_N rows over the whole K, or over one of K_PARTS parts of it when N alone gives too few
programs; where there are more tiles than programs, it goes on to tile + number of programs.

               K ->    part 0        part 1
    N     tile 0   [ (0, 0) ]    [ (0, 1) ]        program (tile, part)
    |     tile 1   [ (1, 0) ]    [ (1, 1) ]
    v     tile 2   [ (2, 0) ]    [ (2, 1) ]        the parts are summed by whoever reads them

``skinny_kernel`` (2 to 64 rows) has the same tiles. Within a program, SLICES of K are multiplied
side by side, one by each warp, and added at the end: a warp alone would have to go through a long
chain of small tensor-core products. On Hopper ``skinny_hopper_kernels.py`` has a better way.

Sources: NVIDIA, "Programmatic Dependent Launch and Synchronization" (CUDA programming guide);
Osama et al., "Stream-K" (2023), for splitting K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.attention.flash_kernels import precision_of
from minivllm.engine.skinny_gemv_kernels import (
    Stream,
    residual_sum,
    weight_rows,
)
from minivllm.engine.skinny_split_kernels import launch_options


@triton.jit
def load_slices(
    weight_ptr,
    tile,
    start,
    end,
    K: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OUT: tl.constexpr,
    SILU: tl.constexpr,
):
    """Weights of ``tile`` from ``start`` on, SLICES stretches of K: [SLICES, BLOCK_N, BLOCK_K]."""
    rows, row_mask = weight_rows(tile, BLOCK_N, OUT, SILU)
    cols = start + tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    at = rows[None, :, None] * K + cols[:, None, :]
    mask = row_mask[None, :, None] & (cols < end)[:, None, :]
    return tl.load(weight_ptr + at, mask=mask, other=0.0)


@triton.jit
def load_x_slices(
    x_ptr,
    rows,
    start,
    end,
    K: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All rows of x over the same stretches of K: [SLICES, ROWS, BLOCK_K]."""
    lanes = tl.arange(0, ROWS)
    cols = start + tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    mask = (lanes < rows)[None, :, None] & (cols < end)[:, None, :]
    return tl.load(x_ptr + lanes[None, :, None] * K + cols[:, None, :], mask=mask, other=0.0)


@triton.jit
def tile_product(w, x, WEIGHTS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """x [SLICES, ROWS, BLOCK_K] times w [SLICES, BLOCK_N, BLOCK_K], summed: [ROWS, BLOCK_N].

    Each warp multiplies a slice. The tensor cores take 16 rows of the first factor at least, but 8
    of the second; and the compiler puts the first into shared memory, the second into registers.
    """
    if WEIGHTS_FIRST:
        sums = tl.trans(tl.sum(tl.dot(w, tl.permute(x, (0, 2, 1)), input_precision=PRECISION), 0))
    else:
        sums = tl.sum(tl.dot(x, tl.permute(w, (0, 2, 1)), input_precision=PRECISION), 0)
    return sums


# The number of rows is no part of what is compiled: one kernel serves 2, 4 and 8.
@triton.jit(do_not_specialize=["rows"])
def skinny_kernel(
    weight_ptr,
    x_ptr,
    out_ptr,
    rows,
    K: tl.constexpr,
    K_PART: tl.constexpr,
    OUT: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,  # rows, padded to a power of two of at least 8
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [K_PARTS, rows, OUT] = x [rows, K] @ weight [N, K].T; see the module for the tiles.

    SILU: N = 2 * OUT, gate rows then up rows; out = silu(gate) * up.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    start = part * K_PART
    end = start + K_PART
    STEP: tl.constexpr = SLICES * BLOCK_K
    if DEPENDENT:
        gdc_launch_dependents()
    # The compiler brings the weights into the tensor cores' order at once, which waits for them; so
    # the kernel behind is let in first.
    w = load_slices(weight_ptr, tile, start, end, K, SLICES, BLOCK_N, BLOCK_K, OUT, SILU)
    if DEPENDENT:
        gdc_wait()

    x = load_x_slices(x_ptr, rows, start, end, K, SLICES, ROWS, BLOCK_K)
    sums = tile_product(w, x, WEIGHTS_FIRST, PRECISION)
    if K_PART > STEP:
        for step in tl.range(start + STEP, end, STEP, num_stages=1):
            w = load_slices(weight_ptr, tile, step, end, K, SLICES, BLOCK_N, BLOCK_K, OUT, SILU)
            x = load_x_slices(x_ptr, rows, step, end, K, SLICES, ROWS, BLOCK_K)
            sums += tile_product(w, x, WEIGHTS_FIRST, PRECISION)

    TILE_OUT: tl.constexpr = BLOCK_N // 2 if SILU else BLOCK_N
    if SILU:
        gate, up = tl.split(tl.reshape(sums, (ROWS, BLOCK_N // 2, 2)))
        sums = gate / (1.0 + tl.exp(-gate)) * up
    out = tile * TILE_OUT + tl.arange(0, TILE_OUT)
    lanes = tl.arange(0, ROWS)
    out_at = (part * rows + lanes)[:, None] * OUT + out[None, :]
    out_mask = (lanes < rows)[:, None] & (out < OUT)[None, :]
    tl.store(out_ptr + out_at, sums.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["rows"])
def sum_and_norm_kernel(
    parts_ptr,
    residual_ptr,
    total_ptr,
    ids_ptr,
    gain_ptr,
    out_ptr,
    rows,
    eps,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a row: the residual stream and the parts of what is added; its norm for the next.

    residual, total: float32 [rows, E] (PARTS = 0: residual is the embedding, read at ids); parts:
    float32 [PARTS, rows, E]; out: [rows, E].
    """
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < E
    gain = tl.load(gain_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = residual_sum(residual_ptr, ids_ptr, parts_ptr, row, rows, cols, mask, E, PARTS)
    tl.store(total_ptr + row * E + cols, total, mask=mask)
    inverse_rms = tl.rsqrt(tl.sum(total * total, axis=0) / E + eps)
    out = (total * inverse_rms * gain).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * E + cols, out, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def sum_and_gain_kernel(
    parts_ptr,
    residual_ptr,
    total_ptr,
    ids_ptr,
    gain_ptr,
    out_ptr,
    squares_ptr,
    rows,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Columns ``program_id(1)`` * BLOCK and on of row ``program_id(0)``: as sum_and_norm_kernel,

    but the norm is not divided out: out = total * gain, and squares [programs of a row, rows] has
    what each program's squares add up to.
    """
    row = tl.program_id(0)
    block = tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = cols < E
    gain = tl.load(gain_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = residual_sum(residual_ptr, ids_ptr, parts_ptr, row, rows, cols, mask, E, PARTS)
    tl.store(total_ptr + row * E + cols, total, mask=mask)
    out = (total * gain).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * E + cols, out, mask=mask)
    tl.store(squares_ptr + block * rows + row, tl.sum(total * total, axis=0))


def skinny_product(
    weight: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    silu: bool = False,
    block_n: int = 16,
    block_k: int = 128,
    slices: int = 8,
    weights_first: int = 16,
    dependent: bool = False,
) -> None:
    """out = x @ weight.T for up to 64 rows; its parts, where out has several.

    Args:
        weight: [N, K], contiguous.
        x: [P, K], contiguous, in the weight's dtype.
        out: [parts, P, N], N / 2 with ``silu``; K a multiple of parts.
        silu: weight holds gate rows and then up rows; out = silu(gate) * up.
        block_n, block_k, slices: a tile, see the module; a program has ``slices`` warps. Smaller
            parts of K get a smaller block_k.
        weights_first: up to this many rows, the weights are the first factor of the product.
    """
    parts, rows, width = out.shape
    size = weight.shape[1]
    tiles = triton.cdiv(width, block_n // 2 if silu else block_n)
    if weight.element_size() == 4:
        # Tiles of float32 go through shared memory: 32 rows of both factors must fit into 99 KiB.
        block_k = max(16, block_k // 4)
    block_k = min(block_k, max(16, triton.next_power_of_2(size // parts) // slices))
    skinny_kernel[(tiles, parts)](
        weight,
        x,
        out,
        rows,
        K=size,
        K_PART=size // parts,
        OUT=width,
        SILU=silu,
        ROWS=max(8 if rows <= weights_first else 16, triton.next_power_of_2(rows)),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SLICES=slices,
        WEIGHTS_FIRST=rows <= weights_first,
        PRECISION=precision_of(weight.dtype),
        DEPENDENT=dependent,
        num_warps=slices,
        **launch_options(dependent),
    )


def sum_and_norm(
    stream: Stream,
    gain: torch.Tensor,
    total: torch.Tensor,
    out: torch.Tensor,
    *,
    eps: float,
    dependent: bool = False,
) -> None:
    """Store the stream's sum in ``total`` float32 [P, E] and its norm, times ``gain``, in ``out``.

    gain: [E]; out: [P, E].
    """
    rows, size = out.shape
    block = triton.next_power_of_2(size)
    sum_and_norm_kernel[(rows,)](
        stream.parts,
        stream.total,
        total,
        stream.ids,
        gain,
        out,
        rows,
        eps,
        E=size,
        BLOCK=block,
        PARTS=stream.num_parts,
        DEPENDENT=dependent,
        num_warps=min(max(block // 256, 1), 16),
        **launch_options(dependent),
    )


def sum_and_gain(
    stream: Stream,
    gain: torch.Tensor,
    total: torch.Tensor,
    out: torch.Tensor,
    squares: torch.Tensor,
    *,
    dependent: bool = False,
) -> None:
    """:func:`sum_and_norm` by many programs a row, which leave the division to who reads ``out``.

    A product is linear in x, so its sums can be divided as well: by the square root of the mean of
    the squares, which add up in ``squares`` float32 [n, P], one for each of n blocks of columns.
    out: [P, E] becomes the stream's sum times ``gain`` [E], which float16 might not hold.
    """
    rows, size = out.shape
    block = triton.next_power_of_2(triton.cdiv(size, len(squares)))
    sum_and_gain_kernel[(rows, len(squares))](
        stream.parts,
        stream.total,
        total,
        stream.ids,
        gain,
        out,
        squares,
        rows,
        E=size,
        BLOCK=block,
        PARTS=stream.num_parts,
        DEPENDENT=dependent,
        num_warps=min(max(block // 256, 1), 16),
        **launch_options(dependent),
    )
