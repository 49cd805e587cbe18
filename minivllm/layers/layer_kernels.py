"""RMSNorm and SiLU-and-mul as Triton kernels: activations are read once and written once.

A kernel is run by many *programs*, all with the same code and each with a number of its own. Here
are 3 tokens (rows) of 6 numbers; `.` is a lane that the mask switches off.

The norms: a program owns a row, because the mean needs all of it. BLOCK = 8, the power of two that
holds a row.

    columns ->     0  1  2  3  4  5
    program 0    [ x  x  x  x  x  x  .  . ]      row 0
    program 1    [ x  x  x  x  x  x  .  . ]      row 1
    program 2    [ x  x  x  x  x  x  .  . ]      row 2

SiLU-and-mul: no number depends on its neighbours, so a row can be cut into tiles of BLOCK = 4, and
the grid has two axes. Program (row, tile) reads the same columns from both halves of its row.

    columns ->            gate 0 .. 5                       up 0 .. 5
                  [ g  g  g  g ][ g  g  .  . ]   [ u  u  u  u ][ u  u  .  . ]     row 0
    program           (0, 0)        (0, 1)           (0, 0)        (0, 1)

All arithmetic is in float32, whatever the tensors hold; a result is rounded when it is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_ROW = 65536  # a program of the norms holds a whole row in its registers
LARGEST_TILE = 1024


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, x_stride, out_stride, size, eps, BLOCK: tl.constexpr
):
    """Normalise row ``program_id(0)`` of x into the same row of out.

    x, out: rows of ``size`` numbers, ``x_stride`` and ``out_stride`` numbers apart; weight: [size].
    """
    row = tl.program_id(0).to(tl.int64)  # row * stride can pass 2^31
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    # A masked lane gets 0, which adds nothing to the sum of squares. (The weight's masked lanes
    # may hold anything: they are never stored.)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    weight = tl.load(weight_ptr + cols, mask=mask)
    tl.store(out_ptr + row * out_stride + cols, x * inverse_rms * weight, mask=mask)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    out_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
):
    """Store x + residual into total and its norm into out, for row ``program_id(0)``.

    x, residual: rows of ``size`` numbers, ``x_stride`` and ``residual_stride`` numbers apart;
    out, total: rows ``out_stride`` numbers apart; weight: [size].
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
    total = x + residual
    tl.store(total_ptr + row * out_stride + cols, total, mask=mask)
    # The sum is still in registers: normalising it costs no further trip to memory.
    inverse_rms = tl.rsqrt(tl.sum(total * total, axis=0) / size + eps)
    weight = tl.load(weight_ptr + cols, mask=mask)
    tl.store(out_ptr + row * out_stride + cols, total * inverse_rms * weight, mask=mask)


@triton.jit
def silu_and_mul_kernel(x_ptr, out_ptr, x_stride, out_stride, size, BLOCK: tl.constexpr):
    """Store silu(gate) * up into one tile of BLOCK columns of one row of out.

    x: rows of 2 * ``size`` numbers, gate then up, ``x_stride`` numbers apart; out: rows of
    ``size`` numbers, ``out_stride`` apart. Row ``program_id(0)``, tile ``program_id(1)``.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    gate_ptr = x_ptr + row * x_stride
    gate = tl.load(gate_ptr + cols, mask=mask).to(tl.float32)
    up = tl.load(gate_ptr + size + cols, mask=mask)
    silu = gate / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + row * out_stride + cols, silu * up, mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """:func:`minivllm.layers.layernorm.rms_norm` in one launch.

    x: [..., E]; weight: [E], in the dtype of ``x``. Returns [..., E], contiguous.
    Raises ValueError if shapes, dtypes or devices do not fit together.
    """
    _check("x", x)
    size = x.shape[-1]
    _check_like("weight", weight, x, (size,))
    rows = _as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        block = _row_block(size)
        rms_norm_kernel[(len(rows),)](
            rows,
            weight.contiguous(),
            out,
            rows.stride(0),
            size,
            size,
            eps,
            BLOCK=block,
            num_warps=_num_warps(block),
        )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`minivllm.layers.layernorm.add_rms_norm` in one launch.

    x, residual: [..., E]; weight: [E], all of one dtype. Returns (normalised sum, sum), both
    [..., E] and contiguous. The norm is that of the sum before it is rounded to be stored.
    Raises ValueError if shapes, dtypes or devices do not fit together.
    """
    _check("x", x)
    size = x.shape[-1]
    _check_like("residual", residual, x, tuple(x.shape))
    _check_like("weight", weight, x, (size,))
    x_rows, residual_rows = _as_rows(x), _as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    if len(x_rows):
        block = _row_block(size)
        add_rms_norm_kernel[(len(x_rows),)](
            x_rows,
            residual_rows,
            weight.contiguous(),
            out,
            total,
            x_rows.stride(0),
            residual_rows.stride(0),
            size,
            size,
            eps,
            BLOCK=block,
            num_warps=_num_warps(block),
        )
    return out, total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """:func:`minivllm.layers.activation.silu_and_mul` in one launch.

    x: [..., 2 * F], the gate in the first half. Returns [..., F], contiguous.
    Raises ValueError if the last dimension is odd or the dtype is not a float of 16 or 32 bits.
    """
    _check("x", x)
    size, odd = divmod(x.shape[-1], 2)
    if odd:
        raise ValueError(f"x has rows of {x.shape[-1]} numbers; gate and up need an even count")
    rows = _as_rows(x)
    out = torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
    if len(rows):
        block = min(triton.next_power_of_2(size), LARGEST_TILE)
        grid = (len(rows), triton.cdiv(size, block))
        silu_and_mul_kernel[grid](
            rows, out, rows.stride(0), size, size, BLOCK=block, num_warps=_num_warps(block)
        )
    return out


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """x: [..., E] -> [rows, E] whose rows lie in one piece; a view if ``x`` allows it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _row_block(size: int) -> int:
    if size > LARGEST_ROW:
        raise ValueError(
            f"rows of {size} numbers do not fit into one program; up to {LARGEST_ROW} do: "
            "use the PyTorch form"
        )
    return triton.next_power_of_2(size)


def _num_warps(block: int) -> int:
    """How many warps run a program: enough that a thread of the GPU holds about 8 numbers."""
    return min(max(block // 256, 1), 16)


def _check(name: str, x: torch.Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; its last dimension needs numbers")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}; use float32, float16 or bfloat16")


def _check_like(name: str, tensor: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; beside x it must have {shape}")
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name} is {tensor.dtype} but x is {x.dtype}; cast one of them")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x on {x.device}; move one of them")
