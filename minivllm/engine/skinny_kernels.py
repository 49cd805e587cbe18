"""Matrix products for a handful of rows: the weights are read once, and everything else waits.

With one row in flight a layer is four products of a matrix and a vector, and attention. Reading
the matrices takes the time; what is left to win lies between the kernels. So each kernel loads its
piece of the weights BEFORE it waits for the kernel in front ("programmatic dependent launch"):
while one kernel finishes, the registers of the next are already full.

    kernel n     |- load weights -|- wait -|- read x, multiply, write -|
    kernel n+1         |- load weights -|-------- wait --------|- read x, multiply, write -|

The weights [N, K] of a product, and who owns what. A program of ``gemv_kernel`` (one row, see
``skinny_gemv_kernels.py``) takes BLOCK_N rows over the whole K, or over one of K_PARTS parts of it
when N alone gives too few programs.

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
from minivllm.engine.skinny_gemv_kernels import weight_rows
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
