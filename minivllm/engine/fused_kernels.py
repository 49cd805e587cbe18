"""The norms and SiLU of a decoder layer, one launch each.

What stands between two matrix products of a layer, attention aside, and what does it here:

    PyTorch, launch by launch                                               here, one launch
    add, square, mean, rsqrt, multiply, round, multiply                     add_rms_norm
    two norms, look-up in the table, two turns, two stores to the pages     qk_norm_rope_store
    silu, multiply                                                          silu_and_mul

The second one takes heads, not whole rows: it is in ``fused_heads_kernels.py``. What follows goes
for all three. At one token such a kernel is all latency, so it asks for everything at once and runs
as a handful of small programs. At thousands of tokens it is all bandwidth: every number is read
once and written once.

Arithmetic is float32. It is rounded where the PyTorch forms in ``layers`` round, so that both
choose the same tokens: a norm is rounded before its weight multiplies it, SiLU before ``up`` does.

A norm can also be left to those behind it (``norm_of``, see ``folded_forward.py``): the product was
then taken of rows that are not normalised, and what reads its result scales each row of it.

With ``pdl=True`` a kernel is launched while the one in front still runs (programmatic dependent
launch, compute capability 9 or later). It loads what that one cannot have written (weights,
positions, slots, the stream) and only then waits for it; it lets its own successor start at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def inverse_rms_of(x_ptr, size, eps, BLOCK: tl.constexpr):
    """1 / the root mean square of the ``size`` numbers at ``x_ptr``."""
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < size, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)


@triton.jit
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Row ``program_id(0)``: norm(x), or total = x + residual and norm(total)."""
    if DEPENDENT:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    weight = tl.load(weight_ptr + cols, mask=mask).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * size + cols, total, mask=mask)
        x = total.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    normed = (x * inverse_rms).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + cols, (normed * weight).to(dtype), mask=mask)


@triton.jit
def silu_kernel(
    x_ptr,
    out_ptr,
    norm_of_ptr,
    x_stride,
    size,
    norm_size,
    norm_eps,
    BLOCK: tl.constexpr,
    NORM_BLOCK: tl.constexpr,  # the size of a row of norm_of, padded; 0 without one
    DEPENDENT: tl.constexpr,
):
    """Columns ``program_id(1)`` * BLOCK and on of row ``program_id(0)``: silu(gate) * up."""
    if DEPENDENT:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    if NORM_BLOCK:
        scale = inverse_rms_of(norm_of_ptr + row * norm_size, norm_size, norm_eps, NORM_BLOCK)
    if DEPENDENT:
        gdc_wait()
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + cols, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if NORM_BLOCK:
        gate *= scale
        up *= scale
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + cols, (silu * up).to(dtype), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, pdl: bool = False
) -> torch.Tensor:
    """:func:`minivllm.layers.layernorm.rms_norm` in one launch.

    x: [T, E]; weight: [E], in the dtype of ``x``. Returns [T, E], contiguous.
    Raises ValueError if the arguments do not fit together.
    """
    _check_rows("x", x)
    _check_weight(weight, x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, x, weight, eps, out, out, add=False, pdl=pdl)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`minivllm.layers.layernorm.add_rms_norm` in one launch.

    x, residual: [T, E]; weight: [E], all of one dtype. Returns (normalised sum, sum), both [T, E]
    and contiguous. Raises ValueError if the arguments do not fit together.
    """
    _check_rows("x", x)
    _check_rows("residual", residual)
    _check_weight(weight, x)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)} but x {x.dtype} "
            f"{tuple(x.shape)}; they must be equal"
        )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    _launch_norm(x, residual, weight, eps, out, total, add=True, pdl=pdl)
    return out, total


def silu_and_mul(
    x: torch.Tensor,
    *,
    norm_of: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    pdl: bool = False,
) -> torch.Tensor:
    """:func:`minivllm.layers.activation.silu_and_mul` in one launch.

    x: [T, 2 * F], the gate in the first half. norm_of: [T, E], contiguous, if ``x`` is the product
    of these rows themselves: each row of ``x`` is then divided by the root mean square of its row
    here, with ``norm_eps``. pdl: launch before the kernel in front has ended; whoever wrote
    ``norm_of`` must have ended before that one began. Returns [T, F], contiguous.
    Raises ValueError if the rows have an odd length or do not lie in one piece.
    """
    _check_rows("x", x)
    if norm_of is not None:
        check_norm_of(norm_of, x)
    rows, width = x.shape
    if width % 2:
        raise ValueError(f"x has rows of {width} numbers; gate and up need an even count")
    size = width // 2
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    if rows:
        block = min(triton.next_power_of_2(size), 1024)
        silu_kernel[(rows, triton.cdiv(size, block))](
            x,
            out,
            norm_of,
            x.stride(0),
            size,
            0 if norm_of is None else norm_of.shape[1],
            norm_eps,
            BLOCK=block,
            NORM_BLOCK=norm_block(norm_of),
            DEPENDENT=pdl,
            num_warps=max(block // 256, 1),
            **launch_options(pdl),
        )
    return out


def _launch_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor,
    *,
    add: bool,
    pdl: bool,
) -> None:
    rows, size = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(size)
    norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        total,
        x.stride(0),
        residual.stride(0),
        size,
        eps,
        BLOCK=block,
        ADD=add,
        DEPENDENT=pdl,
        # 8 numbers a thread: one access of 16 bytes.
        num_warps=min(max(block // 256, 1), 16),
        **launch_options(pdl),
    )


def launch_options(pdl: bool) -> dict[str, bool]:
    """Triton's options for each launch of these kernels.

    PyTorch rounds every product, so products and sums are not to be fused into one rounding.
    """
    options = {"enable_fp_fusion": False}
    return {**options, "launch_pdl": True} if pdl else options


def norm_block(norm_of: torch.Tensor | None) -> int:
    """NORM_BLOCK: the size of a row of ``norm_of``, padded to a power of two; 0 without one."""
    return 0 if norm_of is None else triton.next_power_of_2(norm_of.shape[1])


def check_norm_of(norm_of: torch.Tensor, x: torch.Tensor) -> None:
    """ValueError unless ``norm_of`` is [T, E] for the T rows of ``x``, contiguous, in its dtype."""
    fits = norm_of.dim() == 2 and len(norm_of) == len(x) and norm_of.dtype == x.dtype
    if not fits or not norm_of.is_contiguous():
        raise ValueError(
            f"norm_of is {norm_of.dtype} {tuple(norm_of.shape)}; beside {len(x)} rows of {x.dtype} "
            "it must have as many, contiguous and of that dtype"
        )


def _check_rows(name: str, x: torch.Tensor) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; give [T, numbers] with "
            "rows in one piece"
        )


def _check_weight(weight: torch.Tensor, x: torch.Tensor) -> None:
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}; beside x it must be {x.dtype} "
            f"[{x.shape[1]}]"
        )
