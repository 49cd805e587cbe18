"""Between two products of the chain: parts are added to the residual stream, and its norm is made.

What a product for few rows leaves in parts (see ``skinny_kernels.py``) is summed by whoever reads
it next. With several rows, or a wide one, that is one of these kernels:

    sum_and_norm    one program a row            x = norm(total)
    sum_and_gain    a program a block of a row   x = total * gain, and the squares of each block

The second leaves the division by the root mean square to the product that reads x, which is linear
in it; so no program has to see a whole row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.engine.skinny_gemv_kernels import Stream, residual_sum
from minivllm.engine.skinny_split_kernels import launch_options


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
    """Columns ``program_id(1)`` * BLOCK and on of row ``program_id(0)``, as above, but not divided.

    out: total * gain; squares [programs of a row, rows]: what each program's squares
    add up to.
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
