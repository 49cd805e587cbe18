"""The decode step's bookkeeping on the device, one launch each: see ``device_rows``.

``begin_step`` has one program a place, because a place copies a block table. Place 1 of 3, whose
row is 5, with S = 16 tokens a block and 18 tokens, of which the newest is to be computed:

    active        [ 2   5  -1 ]
                        |
    rows         length[5] = 18     last_token[5] = 311     block_tables[5] = [ 7  4  .  . ]
                        |                   |                                   |  |
    out          context = 18       input_ids = 311         block_tables[1] = [ 7  4  .  . ]
                 positions = 17     slot_mapping = 4 * 16 + 1 = 65

``finish_step`` and ``apply_updates`` have one lane a place or pair, BLOCK of them a program.

With ``pdl=True`` a kernel is launched while the one in front still runs (programmatic dependent
launch) and waits for its results inside; that needs compute capability 9 or later.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.engine.device_rows import DeviceRows, StepInputs

LARGEST_TABLE_TILE = 1024
LANES = 128


@triton.jit
def begin_step_kernel(
    active_ptr,
    last_token_ptr,
    length_ptr,
    num_outputs_ptr,
    seed_ptr,
    temperature_ptr,
    tables_ptr,
    input_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    context_ptr,
    step_ptr,
    out_seed_ptr,
    out_temperature_ptr,
    out_tables_ptr,
    M,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Gather the inputs of place ``program_id(0)``. BLOCK table entries are copied at a time."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0).to(tl.int64)
    named = tl.load(active_ptr + place).to(tl.int64)
    real = named >= 0
    row = tl.maximum(named, 0)  # padding reads row 0 and drops what it finds
    cols = tl.arange(0, BLOCK)
    length = tl.where(real, tl.load(length_ptr + row), 0)
    token = tl.where(real, tl.load(last_token_ptr + row), 0)
    num_outputs = tl.where(real, tl.load(num_outputs_ptr + row), 0)
    seed = tl.where(real, tl.load(seed_ptr + row), 0)
    temperature = tl.where(real, tl.load(temperature_ptr + row), 0.0)
    # The first tile is on its way before it is known how much of it is in use.
    table = tl.load(tables_ptr + row * M + cols, mask=cols < M)

    position = tl.maximum(length - 1, 0)
    block = tl.load(tables_ptr + row * M + position // S).to(tl.int64)
    slot = tl.where(real, block * S + position % S, -1)
    used = tl.cdiv(length, S)
    tl.store(out_tables_ptr + place * M + cols, table, mask=cols < used)
    for start in tl.range(BLOCK, used, BLOCK):
        at = start + cols
        table = tl.load(tables_ptr + row * M + at, mask=at < used)
        tl.store(out_tables_ptr + place * M + at, table, mask=at < used)
    tl.store(input_ids_ptr + place, token.to(tl.int64))
    tl.store(positions_ptr + place, position.to(tl.int64))
    tl.store(slot_mapping_ptr + place, slot)
    tl.store(context_ptr + place, length)
    tl.store(step_ptr + place, num_outputs.to(tl.int64))
    tl.store(out_seed_ptr + place, seed)
    tl.store(out_temperature_ptr + place, temperature)


@triton.jit(do_not_specialize=["P", "R"])
def finish_step_kernel(
    active_ptr,
    tokens_ptr,
    context_ptr,
    step_ptr,
    last_token_ptr,
    length_ptr,
    num_outputs_ptr,
    posted_ptr,
    P,
    R,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Put the tokens of BLOCK places into their rows, and post them to the host."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < P
    row = tl.load(active_ptr + place, mask=inside, other=-1).to(tl.int64)
    token = tl.load(tokens_ptr + place, mask=inside, other=0)
    context = tl.load(context_ptr + place, mask=inside, other=0)
    step = tl.load(step_ptr + place, mask=inside, other=0)
    real = row >= 0
    tl.store(last_token_ptr + row, token.to(tl.int32), mask=real)
    tl.store(posted_ptr + step % 2 * R + row, token.to(tl.int64), mask=real)
    tl.store(length_ptr + row, context + 1, mask=real)
    tl.store(num_outputs_ptr + row, (step + 1).to(tl.int32), mask=real)


@triton.jit(do_not_specialize=["U"])
def apply_updates_kernel(flat_ptr, updates_ptr, U, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """Set the words that BLOCK pairs name."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < U
    word = tl.load(updates_ptr + 2 * pair, mask=inside, other=-1).to(tl.int64)
    value = tl.load(updates_ptr + 2 * pair + 1, mask=inside, other=0)
    tl.store(flat_ptr + word, value, mask=word >= 0)


def begin_step(
    rows: DeviceRows,
    active: torch.Tensor,
    out: StepInputs,
    block_size: int,
    *,
    pdl: bool = False,
) -> None:
    """:func:`minivllm.engine.device_rows.begin_step` in one launch of P programs."""
    places, max_blocks = out.block_tables.shape
    _check("active", active, places, (torch.int32,))
    if max_blocks != rows.block_tables.shape[1]:
        raise ValueError(
            f"out.block_tables has {max_blocks} columns but rows.block_tables "
            f"{rows.block_tables.shape[1]}; allocate both with the same max_blocks"
        )
    block = min(triton.next_power_of_2(max_blocks), LARGEST_TABLE_TILE)
    begin_step_kernel[(places,)](
        active,
        rows.last_token,
        rows.length,
        rows.num_outputs,
        rows.seed,
        rows.temperature,
        rows.block_tables,
        out.input_ids,
        out.positions,
        out.slot_mapping,
        out.context,
        out.step,
        out.seed,
        out.temperature,
        out.block_tables,
        max_blocks,
        S=block_size,
        BLOCK=block,
        DEPENDENT=pdl,
        num_warps=1 if block <= 128 else 4,
        **_launch(pdl),
    )


def finish_step(
    rows: DeviceRows,
    active: torch.Tensor,
    out: StepInputs,
    tokens: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """``finish_step`` and ``post_tokens`` of :mod:`minivllm.engine.device_rows` in one launch."""
    places = len(out.context)
    _check("active", active, places, (torch.int32,))
    _check("tokens", tokens, places, (torch.int32, torch.int64))
    finish_step_kernel[(triton.cdiv(places, LANES),)](
        active,
        tokens,
        out.context,
        out.step,
        rows.last_token,
        rows.length,
        rows.num_outputs,
        rows.posted,
        places,
        rows.posted.shape[1],
        BLOCK=LANES,
        DEPENDENT=pdl,
        **_launch(pdl),
    )


def apply_updates(flat: torch.Tensor, updates: torch.Tensor, *, pdl: bool = False) -> None:
    """:func:`minivllm.engine.device_rows.apply_updates` in one launch."""
    if updates.dtype != torch.int32 or updates.dim() != 2 or updates.shape[1] != 2:
        raise ValueError(
            f"updates is {updates.dtype} {tuple(updates.shape)}; give int32 [U, 2], word and value"
        )
    if not updates.is_contiguous():
        raise ValueError(f"updates must be contiguous, its strides are {updates.stride()}")
    if len(updates):
        apply_updates_kernel[(triton.cdiv(len(updates), LANES),)](
            flat, updates, len(updates), BLOCK=LANES, DEPENDENT=pdl, **_launch(pdl)
        )


def _launch(pdl: bool) -> dict[str, bool]:
    """A CPU's interpreter does not know the option, so it is named only where it is wanted."""
    return {"launch_pdl": True} if pdl else {}


def _check(name: str, x: torch.Tensor, places: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.shape != (places,) or x.dtype not in dtypes or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)}; give a contiguous "
            f"{' or '.join(map(str, dtypes))} [{places}], one for each place of out"
        )
