"""How each part of a step is computed: in our kernels on a GPU, in PyTorch anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from minivllm.attention.flash_hopper import runs_on_hopper
from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.engine import device_rows
from minivllm.engine.device_rows import DeviceRows, StepInputs
from minivllm.engine.fused_forward import AttendStored
from minivllm.engine.skinny_buffers import Scratch
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.layers.sampler import Sampler, SamplingTensors
from minivllm.models.config import ModelConfig

if TYPE_CHECKING:
    from minivllm.engine.model_runner import ModelRunner
# Whatever says how to draw a token for each row.
Draw = StepInputs | SamplingTensors


def skinny_places(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Up to how many places a decode step runs as a chain of our own kernels (``skinny_forward``).

    Reading weights takes nearly all of such a step. With narrow layers a kernel is over so soon
    that the gaps between kernels count, and our chain has none. With wide ones our products read as
    fast as cuBLAS up to 32 rows on Hopper, elsewhere for one row. ``benchmarks/skinny.py`` and
    ``forward.py`` measure the chain; where between 1024 wide (the shapes of 0.6B) and 4096 (8B) it
    turns has not been measured.
    """
    narrow = config.hidden_size <= 1536
    if runs_on_hopper(device, dtype, config.head_size):
        return 128 if narrow else 32
    return 32 if narrow else 1


@dataclass(frozen=True)
class StepForms:
    """The parts of a step; see :mod:`minivllm.engine.device_rows` for those on the rows.

    forward: (runner, batch, cache) -> hidden [T, E]. decode: the same for the P places of a step's
    inputs, all the way into logits [P, V].
    head: hidden [P, E] -> into logits [P, V]. sample: logits [P, V], and temperature, seed and step
    of each -> into tokens int64 [P]. finish_step also posts the tokens to the host.
    """

    begin_step: Callable[[DeviceRows, torch.Tensor, StepInputs, int], None]
    finish_step: Callable[[DeviceRows, torch.Tensor, StepInputs, torch.Tensor], None]
    apply_updates: Callable[[torch.Tensor, torch.Tensor], None]
    forward: Callable[[ModelRunner, PagedBatch, PagedKVCache], torch.Tensor]
    decode: Callable[[ModelRunner, StepInputs, torch.Tensor], None]
    head: Callable[[nn.Module, torch.Tensor, torch.Tensor], None]
    sample: Callable[[torch.Tensor, Draw, torch.Tensor], None]


def choose_forms(model: nn.Module, device: torch.device) -> StepForms:
    """Kernels where Triton compiles for ``device``, else PyTorch."""
    if device.type != "cuda":
        return StepForms(
            begin_step=device_rows.begin_step,
            finish_step=_plain_finish_step,
            apply_updates=device_rows.apply_updates,
            forward=_plain_forward,
            decode=_plain_decode,
            head=_plain_head,
            sample=_plain_sample,
        )
    # Here, for they import Triton, which has no wheel for every machine.
    from minivllm.engine import sampler_kernels, step_kernels
    from minivllm.engine.folded_forward import FoldedForward, can_fold
    from minivllm.engine.fused_forward import FusedForward

    pdl = torch.cuda.get_device_capability(device) >= (9, 0)
    fused = (FoldedForward if can_fold(model) else FusedForward)(model, pdl=pdl)
    skinny: dict[int, SkinnyForward] = {}
    scratch = Scratch(device)

    def forward(runner: ModelRunner, batch: PagedBatch, cache: PagedKVCache) -> torch.Tensor:
        attend = partial(runner.bind_attention(cache, batch, runner.scale).attend_stored, pdl=pdl)
        return fused(batch.input_ids, batch.positions, batch.slot_mapping, cache, attend)

    def decode(runner: ModelRunner, inputs: StepInputs, logits: torch.Tensor) -> None:
        places = len(logits)
        few = places <= skinny_places(model.config, logits.dtype, device)
        if few and SkinnyForward.fits(model.config, places, device, logits.dtype):
            if places not in skinny:
                skinny[places] = SkinnyForward(
                    model, runner.cache, places, logits=logits, scratch=scratch
                )
            run_chain(skinny[places], runner, inputs)
        else:
            hidden = forward(runner, decode_batch(inputs), runner.cache)
            _head_in_place(model, hidden, logits)

    def sample(logits: torch.Tensor, draw: Draw, tokens: torch.Tensor) -> None:
        sampler_kernels.sample(logits, draw.temperature, draw.seed, draw.step, out=tokens)

    return StepForms(
        begin_step=step_kernels.begin_step,
        finish_step=step_kernels.finish_step,
        apply_updates=step_kernels.apply_updates,
        forward=forward,
        decode=decode,
        head=_head_in_place,
        sample=sample,
    )


def run_chain(chain: SkinnyForward, runner: ModelRunner, inputs: StepInputs) -> None:
    """A decode step by ``chain``, into its logits."""
    attend: AttendStored | None = None
    if not chain.tuning.own_attention:
        bound = runner.bind_attention(runner.cache, decode_batch(inputs), runner.scale)
        attend = partial(bound.attend_stored, pdl=chain.dependent)
    chain(
        inputs.input_ids,
        inputs.positions,
        inputs.slot_mapping,
        inputs.block_tables,
        inputs.context,
        attend=attend,
    )


def _plain_finish_step(
    rows: DeviceRows, active: torch.Tensor, out: StepInputs, tokens: torch.Tensor
) -> None:
    device_rows.finish_step(rows, active, out, tokens)
    device_rows.post_tokens(rows, active, out, tokens)


def _plain_forward(runner: ModelRunner, batch: PagedBatch, cache: PagedKVCache) -> torch.Tensor:
    if not batch.context_lens:
        # PyTorch's path loops over lengths on the host. Padding becomes a context of one token in
        # block 0, whose result nobody reads.
        context = batch.context.clamp(min=1)
        batch = replace(
            batch,
            context=context,
            context_lens=tuple(context.tolist()),
            block_tables=batch.block_tables.clamp(min=0),
        )
    attend = runner.bind_attention(cache, batch, runner.scale)
    return runner.model(batch.input_ids, batch.positions, attend)


def _plain_decode(runner: ModelRunner, inputs: StepInputs, logits: torch.Tensor) -> None:
    _plain_head(runner.model, _plain_forward(runner, decode_batch(inputs), runner.cache), logits)


def decode_batch(inputs: StepInputs) -> PagedBatch:
    """The batch of a decode step, on the same memory; its lengths are not known to the host."""
    return PagedBatch(
        input_ids=inputs.input_ids,
        positions=inputs.positions,
        slot_mapping=inputs.slot_mapping,
        # Nobody reads it where every sequence has one query.
        cu_query_lens=inputs.context[:0],
        context=inputs.context,
        block_tables=inputs.block_tables,
        query_lens=(1,) * len(inputs.context),
        context_lens=(),
    )


def _plain_head(model: nn.Module, hidden: torch.Tensor, logits: torch.Tensor) -> None:
    logits.copy_(model.compute_logits(hidden))


def _head_in_place(model: nn.Module, hidden: torch.Tensor, logits: torch.Tensor) -> None:
    # Without a tensor in between: at batch 256 a copy would move 156 MB more.
    torch.mm(hidden, model.lm_head.weight.t(), out=logits)


def _plain_sample(logits: torch.Tensor, draw: Draw, tokens: torch.Tensor) -> None:
    params = SamplingTensors(draw.temperature, draw.seed, draw.step)
    tokens.copy_(Sampler()(logits, params))
