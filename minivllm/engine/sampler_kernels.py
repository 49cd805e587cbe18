"""Sampling in one pass over the logits: the Gumbel-max of ``layers.sampler``, fused.

A row of logits is cut into shares, one program each, and a share is walked in tiles. Every lane
keeps the best score it has met and the tile it met it in, so that lanes need not talk to each other
before the end. A second, tiny kernel takes the best of the shares:

    row of V logits   [ tile | tile | tile ][ tile | tile | tile ][ tile | tile | . ]
    program           |-------- 0 ---------|-------- 1 ---------|-------- 2 --------|
    partial                (score, token)       (score, token)      (score, token)
    merge                  |------------------------ token -----------------------|

Noise costs more than the memory does: a hash and two logarithms for each of 39 million logits of a
batch of 256. Hence three savings:

- A tile whose largest logit, with the largest noise there is, stays below the best so far needs no
  noise at all. Where a model is sure of itself, and where a row is greedy, that is nearly all.
- The logarithms are the hardware's own, but for -log(u) near u = 1, where they are too coarse: it
  is the sum of a series there. The noise differs from the PyTorch form's by about 1e-6, and is the
  same wherever a token lies and whoever shares its batch.
- Only the winning tile of a lane is searched for the winning token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

# The largest noise is that of u = 1 - 2^-24; a little more, for rounding.
MOST_NOISE = tl.constexpr(16.65)
LOG_2 = tl.constexpr(0.6931471805599453)

WIDTH = tl.constexpr(8)  # logits that lie side by side in one lane: 16 bytes of bfloat16
# Few rows are cut into many shares of one warp each, which never wait for one another. Where the
# rows alone fill a GPU, a row is one program: its warps then know the best of the whole row early.
PROGRAMS = 2048
ROWS_THAT_FILL = 192
WARPS_OF_A_ROW = 16


@triton.jit
def mix32(h):
    """:func:`minivllm.layers.sampler.mix32` on uint32."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def row_keys(seed, step):
    """What the hash needs of a row, from int64 ``seed`` and ``step``: two uint32 numbers."""
    first = mix32(seed.to(tl.uint32) ^ 0x9E3779B9)
    first = mix32(first + step.to(tl.uint32))
    second = mix32(first ^ (seed >> 32).to(tl.uint32) ^ 0x85157AF5)
    return first, second


@triton.jit
def log2(x, FAST: tl.constexpr):
    """The hardware's base-2 logarithm if FAST; the interpreter has only the exact one."""
    if FAST:
        y = libdevice.fast_log2f(x)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def log2_of_noise(token, first, second, FAST: tl.constexpr):
    """log2(-log(u)), of which Gumbel noise is -log(2) times: float32, as ``token``."""
    h = mix32(token.to(tl.uint32) + first) ^ second
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    # The upper 23 bits of the last line of mix32, made the mantissa of a float from 1 to 2.
    bits = ((h >> 9) ^ (h >> 25)) | 0x3F800000
    whole = bits.to(tl.float32, bitcast=True)
    # Neither difference needs rounding.
    u = whole - (1.0 - 1.0 / 16777216)
    rest = 1.0 - u
    # -log(1 - rest) = rest + rest^2 / 2 + rest^3 / 3 + ...
    series = tl.fma(rest, 1.0 / 6, 1.0 / 5)
    series = tl.fma(rest, series, 1.0 / 4)
    series = tl.fma(rest, series, 1.0 / 3)
    series = tl.fma(rest, series, 1.0 / 2)
    series = tl.fma(rest, series, 1.0) * rest
    minus_log_u = tl.where(rest < 0.125, series, log2(u, FAST) * -LOG_2)
    return log2(minus_log_u, FAST)


@triton.jit
def ordered(bits):
    """From a float's bits to an integer that is larger when the float is, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def best_of_share_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    step_ptr,
    score_ptr,
    token_ptr,
    stride,
    V,
    share,
    first_token,
    LANES: tl.constexpr,
    FAST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The best score and its token, of share ``program_id(0)`` of row ``program_id(1)``.

    score, token: [B, shares]. Column 0 of the logits is token ``first_token`` for the noise; here
    tokens are columns. Of equal scores the lowest token wins, as it does in torch.argmax.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    first, second = row_keys(tl.load(seed_ptr + row), tl.load(step_ptr + row))
    greedy = temperature == 0.0
    # A greedy row goes by its untouched logits: times 1, with noise times 0.
    inverse = 1.0 / tl.where(greedy, 1.0, temperature)
    noise_scale = tl.where(greedy, 0.0, -LOG_2)
    most_noise = tl.where(greedy, 0.0, MOST_NOISE)

    TILE: tl.constexpr = LANES * WIDTH
    begin = part * share
    end = tl.minimum(begin + share, V)
    row_ptr = logits_ptr + row * stride
    lowest = float("-inf")
    offset = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    ahead = tl.load(row_ptr + begin + offset, mask=begin + offset < end, other=lowest)
    best = tl.full([LANES], lowest, tl.float32)
    best_start = tl.full([LANES], 0, tl.int32) + begin
    floor = lowest
    for start in tl.range(begin, end, TILE):
        token = start + offset
        scaled = ahead.to(tl.float32) * inverse
        # On its way while this tile is worked on.
        ahead = tl.load(row_ptr + token + TILE, mask=token + TILE < end, other=lowest)
        hope = tl.max(scaled, axis=1) + most_noise >= floor
        if tl.max(hope.to(tl.int32), axis=0) > 0:
            noise = log2_of_noise(token + first_token, first, second, FAST)
            score = tl.max(tl.fma(noise, noise_scale, scaled), axis=1)
            best_start = tl.where(score > best, start, best_start)
            best = tl.maximum(best, score)
            # Lanes compare integers faster than floats: there is one instruction for it.
            floor = ordered(tl.max(ordered(best.to(tl.int32, bitcast=True)), axis=0))
            floor = floor.to(tl.float32, bitcast=True)
    # Which of its tile's tokens was it? Every lane scores that tile once more.
    token = best_start[:, None] + offset
    logit = tl.load(row_ptr + token, mask=token < end, other=lowest).to(tl.float32)
    noise = log2_of_noise(token + first_token, first, second, FAST)
    score = tl.fma(noise, noise_scale, logit * inverse)
    top = tl.max(tl.max(score, axis=1), axis=0)
    token = tl.where(score == top, token, V)
    at = row * tl.num_programs(0) + part
    tl.store(score_ptr + at, top)
    tl.store(token_ptr + at, tl.min(tl.min(token, axis=1), axis=0))


# One kernel for all batches, though the number of shares depends on theirs.
@triton.jit(do_not_specialize=["shares"])
def best_of_row_kernel(
    score_ptr,
    token_ptr,
    out_ptr,
    best_score_ptr,
    shares,
    V,
    first_token,
    BLOCK: tl.constexpr,
    SCORE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The token of row ``program_id(0)``, and if SCORE what it scored."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < shares
    score = tl.load(score_ptr + row * shares + cols, mask=mask, other=float("-inf"))
    token = tl.load(token_ptr + row * shares + cols, mask=mask, other=V)
    best = tl.min(tl.where(score == tl.max(score, axis=0), token, V), axis=0)
    best = tl.minimum(best, V - 1)  # a row of NaN has no best, but must name a token
    best += first_token
    if SCORE:
        tl.store(best_score_ptr + row, tl.max(score, axis=0))
    tl.store(out_ptr + row, best.to(out_ptr.dtype.element_ty))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    first_token: int = 0,
    score: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """One token a row, as :class:`minivllm.layers.sampler.Sampler` without filters draws it.

    Args:
        logits: [B, V], float32, float16 or bfloat16; the numbers of a row lie in one piece.
        temperature: float32 [B]; 0 is greedy, by the untouched logits.
        seed, step: int64 [B], the hash's input beside the token.
        out: int64 or int32 [B], written; by default a new int64 tensor.
        first_token: the token of column 0, where the logits are a part of a row.
        score: float32 [B], receives the chosen tokens' scores, by which parts can be compared.
        pdl: launch before the kernel in front has ended (see ``step_kernels``).

    Returns:
        ``out``. The grid depends on the shape alone, so a CUDA graph can hold it.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
    """
    batch, vocab_size = logits.shape
    if logits.stride(1) != 1:
        raise ValueError(f"logits has strides {logits.stride()}; its rows must lie in one piece")
    for name, given, dtype in (
        ("temperature", temperature, torch.float32),
        ("seed", seed, torch.int64),
        ("step", step, torch.int64),
    ):
        if given.shape != (batch,) or given.dtype != dtype or not given.is_contiguous():
            raise ValueError(
                f"{name} is {given.dtype} {tuple(given.shape)}; give contiguous {dtype} [{batch}]"
            )
    if out is None:
        out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    elif out.shape != (batch,) or out.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; give int64 or int32 [{batch}]")
    if score is not None and (score.shape != (batch,) or score.dtype != torch.float32):
        raise ValueError(f"score is {score.dtype} {tuple(score.shape)}; give float32 [{batch}]")
    if batch == 0:
        return out
    share, warps = _share_of_a_program(batch, vocab_size)
    shares = triton.cdiv(vocab_size, share)
    scores = torch.empty(batch, shares, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(batch, shares, dtype=torch.int32, device=logits.device)
    # PyTorch rounds every product: so must the noise.
    options = {"enable_fp_fusion": False, **({"launch_pdl": True} if pdl else {})}
    best_of_share_kernel[(shares, batch)](
        logits,
        temperature,
        seed,
        step,
        scores,
        tokens,
        logits.stride(0),
        vocab_size,
        share,
        first_token,
        LANES=32 * warps,
        FAST=not triton.knobs.runtime.interpret,
        DEPENDENT=pdl,
        num_warps=warps,
        **options,
    )
    block = triton.next_power_of_2(_most_shares(vocab_size))
    best_of_row_kernel[(batch,)](
        scores,
        tokens,
        out,
        score,
        shares,
        vocab_size,
        first_token,
        BLOCK=block,
        SCORE=score is not None,
        DEPENDENT=pdl,
        num_warps=max(1, block // 256),
        **options,
    )
    return out


def _most_shares(vocab_size: int) -> int:
    """Into how many shares a row is cut at most, whatever the batch."""
    return min(PROGRAMS, triton.cdiv(vocab_size, 32 * WIDTH.value))


def _share_of_a_program(batch: int, vocab_size: int) -> tuple[int, int]:
    """How many tokens of a row a program takes, in whole tiles, and how many warps run it."""
    fill = batch >= ROWS_THAT_FILL
    warps = WARPS_OF_A_ROW if fill else 1
    tile = 32 * warps * WIDTH.value
    tiles = triton.cdiv(vocab_size, tile)
    shares = 1 if fill else min(tiles, max(1, PROGRAMS // batch))
    return triton.cdiv(tiles, shares) * tile, warps
