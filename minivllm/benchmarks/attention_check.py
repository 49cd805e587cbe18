"""Every attention kernel against float64, on fresh random inputs.

For each case: the relative error may be 1.5 times what PyTorch's own attention makes on the same
input (but see below); the output holds NaN before and none after;
pages of nobody hold NaN and are neither read nor written; rows in front of and behind the output
stay as they were. On a CPU the kernels run in Triton's interpreter, which wants TRITON_INTERPRET=1
in the environment, on very small cases.

A decode kernel that adds up float32 products in float32 may leave two roundings, 2.4e-7: that is
``paged_decode_whole``, and on GPUs without a fast float64 also ``paged_decode``. There ``tl.dot``
adds one product after the other, while PyTorch's decode adds in a tree: on an H200 up to 2e-7 and
5e-8. It is the order of additions and nothing else: an exact exp2 gave the same digits, sums in
float64 (``attend_in_float64``) 5e-8. A product that is not float32 is far above the bound (tf32:
3e-4), and prefill, where PyTorch adds as we do, needs no such grace.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from minivllm.benchmarks.attention_cases import prefix_sums
from minivllm.benchmarks.harness import Call, format_table
from minivllm.engine.compile_ahead import compile_ahead

MARGIN = 1.5
TWO_ROUNDINGS = 2 * torch.finfo(torch.float32).eps
GUARD = 64  # rows before and after an output that must not change


@dataclass(frozen=True)
class Case:
    """Heads, sizes and lengths of one check; query_lens are the newest tokens of each sequence."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    query_lens: tuple[int, ...]

    def __str__(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads} x {self.head_size}"
        return f"{heads}, pages {self.block_size}, {str(self.dtype).removeprefix('torch.')}"


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Head sizes 32 to 256, groups of 1 to 24, pages of 16 to 256, ragged lengths."""
    lengths: tuple[int, ...] = (1, 300, 0, 64, 129, 2049, 33)
    query_lens: tuple[int, ...] = (1, 100, 0, 64, 1, 700, 5)
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    if small:
        lengths, query_lens = (1, 130, 0, 64), (1, 40, 0, 64)
    if device.type == "cpu":
        lengths, query_lens = (1, 40, 0, 16), (1, 18, 0, 16)
        dtypes = [torch.float16, torch.float32]  # the interpreter gets bfloat16 wrong
    shapes = [(16, 8, 128, 64), (32, 8, 128, 16), (8, 2, 64, 32), (4, 4, 80, 128)]
    if not small and device.type == "cuda":
        shapes += [(6, 2, 96, 256), (4, 2, 256, 64), (24, 1, 32, 16), (8, 1, 128, 256)]
    if device.type == "cpu":
        shapes = [(2, 1, 128, 16), (2, 2, 80, 64)]
    for shape in shapes:
        for dtype in dtypes:
            yield Case(*shape, dtype, lengths, query_lens)


class Inputs:
    """Random tensors of one case, with pages in random order between pages of NaN."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        lengths, size = case.lengths, case.block_size
        shape = (sum(lengths), case.num_kv_heads, case.head_size)
        self.k, self.v = (torch.randn(shape, device=device).to(case.dtype) for _ in range(2))
        blocks = [-(-length // size) for length in lengths]
        num_blocks = 2 * sum(blocks) + 1
        order = torch.randperm(num_blocks, device=device)
        self.tables = torch.full((len(lengths), max(blocks) + 1), -1, dtype=torch.int32)
        self.tables = self.tables.to(device)
        slots = []
        for row, (mine, length) in enumerate(
            zip(order[: sum(blocks)].split(blocks), lengths, strict=True)
        ):
            self.tables[row, : len(mine)] = mine.int()
            token = torch.arange(length, device=device)
            slots.append(mine[token // size] * size + token % size)
        self.slots = torch.cat(slots)
        cache = (num_blocks, size, *shape[1:])
        self.k_cache = torch.full(cache, float("nan"), dtype=case.dtype, device=device)
        self.v_cache = self.k_cache.clone()
        self.context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.ones = (1,) * len(lengths)
        self.q_whole, self.q_chunk, self.q_decode = (
            torch.randn(sum(n), case.num_heads, case.head_size, device=device).to(case.dtype)
            for n in (lengths, case.query_lens, self.ones)
        )
        self.scale = case.head_size**-0.5

    def expected(self, q: torch.Tensor, query_lens: tuple[int, ...]) -> torch.Tensor:
        """In float64, [T, H, D]: zeros for a sequence without tokens."""
        return self._each(q.double(), query_lens, self.k.double(), self.v.double(), _exact)

    def pytorch(self, q: torch.Tensor, query_lens: tuple[int, ...]) -> torch.Tensor:
        """By PyTorch's own attention, in the case's dtype."""
        return self._each(q, query_lens, self.k, self.v, _sdpa)

    def _each(
        self,
        q: torch.Tensor,
        query_lens: tuple[int, ...],
        k: torch.Tensor,
        v: torch.Tensor,
        attend: Any,
    ) -> torch.Tensor:
        out = torch.zeros_like(q)
        row = token = 0
        for count, length in zip(query_lens, self.case.lengths, strict=True):
            rows, tokens = slice(row, row + count), slice(token, token + length)
            if length and count:
                out[rows] = attend(q[rows], k[tokens], v[tokens], self.scale)
            row, token = row + count, token + length
        return out


def _mask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    position = torch.arange(len(k) - len(q), len(k), device=q.device)
    return torch.arange(len(k), device=q.device) <= position[:, None]


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~_mask(q, k), float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    whole = len(q) == len(k)
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=None if whole else _mask(q, k),
        is_causal=whole,
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1)


def _forms(inputs: Inputs, out: torch.Tensor) -> dict[str, tuple[str, Call]]:
    """Name -> (which queries, call that writes to the first rows of ``out``)."""
    from minivllm.attention import flash_kernels, paged_kernels

    case, scale = inputs.case, inputs.scale
    device = out.device
    tables = (inputs.tables, inputs.context_lens)
    caches = (inputs.k_cache, inputs.v_cache)
    whole = (inputs.q_whole, inputs.k, inputs.v, prefix_sums(case.lengths, device))
    longest = {"scale": scale, "max_seqlen": max(case.lengths)}
    chunk = (inputs.q_chunk, *caches, inputs.tables)
    chunk = (*chunk, prefix_sums(case.query_lens, device), inputs.context_lens)
    most = {"scale": scale, "max_query_len": max(case.query_lens)}
    cut, wide = (
        paged_kernels.PagedDecodePlan(
            *inputs.tables.shape,
            case.block_size,
            case.num_heads,
            case.num_kv_heads,
            case.head_size,
            dtype=case.dtype,
            device=device,
            min_share=1,
            wide_from=first,
        )
        for first in (len(case.lengths) + 1, 1)
    )
    cut.prepare(*tables)
    wide.prepare(*tables)
    decode = (inputs.q_decode, *caches, *tables)
    flash, paged = flash_kernels, paged_kernels
    return {
        "flash_attention": ("whole", lambda: flash.flash_attention(*whole, **longest, out=out)),
        "flash_attention_tiled": (
            "whole",
            lambda: flash.flash_attention_tiled(*whole, **longest, out=out),
        ),
        "paged_prefill": ("chunk", lambda: paged.paged_prefill(*chunk, **most, out=out)),
        "paged_prefill_tiled": (
            "chunk",
            lambda: paged.paged_prefill_tiled(*chunk, **most, out=out),
        ),
        "paged_decode": ("decode", lambda: paged.paged_decode(*decode, scale=scale, out=out)),
        "paged_decode, all cut": (
            "decode",
            lambda: paged.paged_decode(*decode, scale=scale, plan=cut, out=out),
        ),
        "paged_decode, two KV heads": (
            "decode",
            lambda: paged.paged_decode(*decode, scale=scale, plan=wide, out=out, pdl=True),
        ),
        "paged_decode_whole": (
            "decode",
            lambda: out.copy_(paged.paged_decode_whole(*decode, scale=scale)),
        ),
    }


def check_attention(
    device: torch.device, *, small: bool = False
) -> tuple[str, list[dict[str, Any]]]:
    """Run all cases; returns a table of the worst of each kernel and a record for each check."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("on a CPU the kernels need Triton's interpreter: set TRITON_INTERPRET=1")
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    records = []
    if device.type == "cuda":
        # Side by side, or a check of all cases would spend minutes waiting for the compiler.
        compile_ahead(lambda: _rehearse(device, small), device)
        torch.manual_seed(seed)
    for case in cases(device, small):
        records += [{"seed": seed, **record} for record in _check_case(case, device)]
    rows = []
    for name in dict.fromkeys(record["kernel"] for record in records):
        mine = [record for record in records if record["kernel"] == name]
        worst = max(mine, key=lambda record: record["ratio"])
        bad = sum(not record["good"] for record in mine)
        ratio, error = f"{worst['ratio']:.2f}", f"{worst['error']:.1e}"
        rows.append([name, len(mine), bad, ratio, error, worst["case"]])
    headers = ["kernel", "cases", "bad", "worst / PyTorch's", "error", "there"]
    return f"seed {seed}\n{format_table(headers, rows)}", records


def _rehearse(device: torch.device, small: bool) -> None:
    for case in cases(device, small):
        for _ in _check_case(case, device):
            pass


def _check_case(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    from minivllm.attention.paged_kernels import store_kv
    from minivllm.attention.paged_split_kernels import sums_in_float64

    inputs = Inputs(case, device)
    store_kv(inputs.k, inputs.v, inputs.k_cache, inputs.v_cache, inputs.slots)
    kept = inputs.k_cache.clone(), inputs.v_cache.clone()
    stored = torch.equal(kept[0].flatten(0, 1)[inputs.slots], inputs.k)
    stored &= torch.equal(kept[1].flatten(0, 1)[inputs.slots], inputs.v)
    stored &= int(kept[0].isnan().sum()) == kept[0].numel() - inputs.k.numel()
    yield {"kernel": "store_kv", "case": str(case), "error": 0.0, "ratio": 0.0, "good": stored}

    queries = {
        "whole": (inputs.q_whole, case.lengths),
        "chunk": (inputs.q_chunk, case.query_lens),
        "decode": (inputs.q_decode, inputs.ones),
    }
    known = {}
    for which, (q, query_lens) in queries.items():
        expected = inputs.expected(q, query_lens)
        theirs = (inputs.pytorch(q, query_lens).double() - expected).norm()
        known[which] = expected, (theirs / expected.norm()).item()
    names = list(_forms(inputs, torch.empty_like(inputs.q_whole)))
    for name in names:
        which = _forms(inputs, torch.empty_like(inputs.q_whole))[name][0]
        q = queries[which][0]
        room = torch.full((len(q) + 2 * GUARD, *q.shape[1:]), float("nan"), device=device)
        room = room.to(case.dtype)
        out = room[GUARD:-GUARD]
        _forms(inputs, out)[name][1]()
        expected, theirs = known[which]
        error = ((out.double() - expected).norm() / expected.norm()).item()
        untouched = bool(room[:GUARD].isnan().all() and room[-GUARD:].isnan().all())
        for cache, before in zip((inputs.k_cache, inputs.v_cache), kept, strict=True):
            untouched &= torch.equal(cache.view(torch.uint8), before.view(torch.uint8))
        limit = MARGIN * theirs
        if which == "decode" and case.dtype == torch.float32:
            if name == "paged_decode_whole" or not sums_in_float64(case.dtype, device):
                limit = max(limit, TWO_ROUNDINGS)
        good = error <= limit and untouched  # a NaN left over fails the comparison
        ratio = error / theirs
        yield {"kernel": name, "case": str(case), "error": error, "ratio": ratio, "good": good}
