"""The product of a weight matrix and one vector, with what stands in front of it and behind it.

The weights [N, K], and who owns what. A program takes BLOCK_N rows over the whole K, or over one of
K_PARTS parts of it where N alone gives too few programs. Large matrices have many more tiles than
the chip has room for; walking over them in fewer, longer programs was slower (0.80 of the bandwidth
against 0.91 for the sizes of an 8B model), for a program's own steps wait for each other.

               K ->    part 0        part 1
    N     tile 0   [ (0, 0) ]    [ (0, 1) ]        program (tile, part)
    |     tile 1   [ (1, 0) ]    [ (1, 1) ]
    v     tile 2   [ (2, 0) ]    [ (2, 1) ]        the parts are summed by whoever reads them

With one vector there is no use for tensor cores: every weight is multiplied once, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.engine.skinny_split_kernels import launch_options, merged_splits


@triton.jit
def residual_sum(
    residual_ptr, ids_ptr, parts_ptr, row, rows, cols, mask, E: tl.constexpr, PARTS: tl.constexpr
):
    """One row of the residual stream in float32: what was there, and the parts of what is added.

    Without parts the row is that of token ids[row] in the embedding ``residual``.
    """
    if PARTS == 0:
        token = tl.load(ids_ptr + row).to(tl.int64)
        total = tl.load(residual_ptr + token * E + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        total = tl.load(residual_ptr + row * E + cols, mask=mask, other=0.0)
        for part in tl.static_range(PARTS):
            total += tl.load(parts_ptr + (part * rows + row) * E + cols, mask=mask, other=0.0)
    return total


@triton.jit
def weight_rows(tile, BLOCK_N: tl.constexpr, OUT: tl.constexpr, SILU: tl.constexpr):
    """Rows of the weights that ``tile`` owns. With SILU they alternate: gate 0, up 0, gate 1 ..."""
    lanes = tl.arange(0, BLOCK_N)
    if SILU:
        out = tile * (BLOCK_N // 2) + lanes // 2
        return out + (lanes % 2) * OUT, out < OUT
    out = tile * BLOCK_N + lanes
    return out, out < OUT


@triton.jit
def load_rows(
    weight_ptr,
    tile,
    cols,
    mask,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OUT: tl.constexpr,
    SILU: tl.constexpr,
):
    """The weights of ``tile`` at ``cols``: [BLOCK_N, BLOCK_K]; nothing is read past the last."""
    rows, row_mask = weight_rows(tile, BLOCK_N, OUT, SILU)
    at = rows[:, None] * K + cols[None, :]
    return tl.load(weight_ptr + at, mask=row_mask[:, None] & mask[None, :], other=0.0)


@triton.jit
def store_rows(
    out_ptr, w, x, scale, tile, BLOCK_N: tl.constexpr, OUT: tl.constexpr, SILU: tl.constexpr
):
    """Multiply a tile of weights with x and store the BLOCK_N sums (half as many with SILU)."""
    sums = tl.sum(w.to(tl.float32) * x[None, :], axis=1) * scale
    if SILU:
        gate, up = tl.split(tl.reshape(sums, (BLOCK_N // 2, 2)))
        out = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        product = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out_ptr + out, product.to(out_ptr.dtype.element_ty), mask=out < OUT)
    else:
        out = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + out, sums.to(out_ptr.dtype.element_ty), mask=out < OUT)


@triton.jit
def gemv_kernel(
    weight_ptr,
    x_ptr,
    out_ptr,
    gain_ptr,
    residual_ptr,
    total_ptr,
    ids_ptr,
    lse_ptr,
    context_ptr,
    squares_ptr,
    eps,
    SOURCE: tl.constexpr,
    PARTS: tl.constexpr,
    SQUARES: tl.constexpr,
    SQUARES_BLOCK: tl.constexpr,  # SQUARES, padded to a power of two
    K: tl.constexpr,
    K_PART: tl.constexpr,
    OUT: tl.constexpr,
    SILU: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out [K_PARTS, OUT] = weight [N, K] @ x [K] for one row; see the module for the tiles.

    x is made on the way in, by SOURCE:
        "plain"  x_ptr [K] as it is; or, with the SQUARES parts of a sum of squares, divided by
                 the root of their mean over K
        "norm"   RMSNorm, with ``gain``, of residual + the PARTS parts of x_ptr [PARTS, K]; the sum
                 is stored in ``total`` (PARTS = 0: the embedding of ids[0])
        "merge"  attention, from its splits in x_ptr and lse_ptr
    SILU: N = 2 * OUT, gate rows then up rows; out = silu(gate) * up.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    places = tl.arange(0, BLOCK_K)
    cols = part * K_PART + places
    mask = places < K_PART
    w = load_rows(weight_ptr, tile, cols, mask, K, BLOCK_N, OUT, SILU)
    if SOURCE == "norm":
        gain = tl.load(gain_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()

    scale = 1.0
    if SOURCE == "norm":
        total = residual_sum(residual_ptr, ids_ptr, x_ptr, 0, 1, cols, mask, K, PARTS)
        if tile == 0:
            tl.store(total_ptr + cols, total, mask=mask)
        # Every product is linear in x, so the root mean square can be divided out at the end.
        scale = tl.rsqrt(tl.sum(total * total, axis=0) / K + eps)
        x = total * gain
    elif SOURCE == "merge":
        HEADS: tl.constexpr = BLOCK_K // D
        x = merged_splits(
            x_ptr,
            lse_ptr,
            context_ptr,
            0,
            1,
            part * (K_PART // D),
            SPLITS,
            H,
            D,
            HEADS,
            MIN_SPLIT,
        )
        x = tl.where(mask, tl.reshape(x, (BLOCK_K,)), 0.0)
    else:
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if SQUARES:
            lanes = tl.arange(0, SQUARES_BLOCK)
            squares = tl.load(squares_ptr + lanes, mask=lanes < SQUARES, other=0.0)
            scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)

    store_rows(out_ptr + part * OUT, w, x, scale, tile, BLOCK_N, OUT, SILU)


@dataclass(frozen=True)
class Stream:
    """The residual stream of P rows: what it was, and what has to be added to it.

    total: float32 [P, E]; where parts is None, the embedding [V, E], read at ids.
    ids: int64 [P], None where there are parts. parts: float32 [parts, P, E].
    """

    total: torch.Tensor
    ids: torch.Tensor | None
    parts: torch.Tensor | None = None

    @property
    def num_parts(self) -> int:
        return 0 if self.parts is None else self.parts.shape[0]


def gemv(
    weight: torch.Tensor,
    x: torch.Tensor | Stream,
    out: torch.Tensor,
    *,
    gain: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    eps: float = 0.0,
    squares: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    context: torch.Tensor | None = None,
    min_split: int = 64,
    silu: bool = False,
    weights: int = 16384,
    num_warps: int = 4,
    dependent: bool = False,
) -> None:
    """out = weight @ x for one row; its parts, where out has several.

    Args:
        weight: [N, K], contiguous.
        x: [1, K]; or a Stream, whose sum is stored in ``total`` [1, K] and normalised with ``gain``
            [K] and ``eps``; or attention's splits, float32 [SPLITS, 1, H, D], with their ``lse``
            [SPLITS, 1, H] and ``context`` [1].
        out: [parts, 1, N], N / 2 with ``silu``; K a multiple of parts.
        squares: float32 [n], where x [1, K] is yet to be divided by the square root of their sum
            over K, plus ``eps``.
        silu: weight holds gate rows and then up rows; out = silu(gate) * up.
        weights: of a tile, N times K.
    """
    parts, _, width = out.shape
    size = weight.shape[1]
    part = size // parts
    block_k = triton.next_power_of_2(part)
    block_n = max(2, min(weights // block_k, triton.next_power_of_2(weight.shape[0])))
    tiles = triton.cdiv(width, block_n // 2 if silu else block_n)
    stream = x if isinstance(x, Stream) else None
    splits = x if isinstance(x, torch.Tensor) and lse is not None else None
    source = "norm" if stream else "plain" if splits is None else "merge"
    data = x if stream is None else stream.total if stream.parts is None else stream.parts
    gemv_kernel[(tiles, parts)](
        weight,
        data,
        out,
        gain,
        stream.total if stream else None,
        total,
        stream.ids if stream else None,
        lse,
        context,
        squares,
        eps,
        SOURCE=source,
        PARTS=stream.num_parts if stream else 0,
        SQUARES=0 if squares is None else len(squares),
        SQUARES_BLOCK=1 if squares is None else triton.next_power_of_2(len(squares)),
        K=size,
        K_PART=part,
        OUT=width,
        SILU=silu,
        H=splits.shape[2] if splits is not None else 1,
        D=splits.shape[3] if splits is not None else 1,
        SPLITS=splits.shape[0] if splits is not None else 1,
        MIN_SPLIT=min_split,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        DEPENDENT=dependent,
        num_warps=num_warps,
        **launch_options(dependent),
    )
