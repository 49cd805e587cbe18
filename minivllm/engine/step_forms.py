"""How each part of a step is computed: in our kernels on a GPU, in PyTorch anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.engine import device_rows
from minivllm.engine.device_rows import DeviceRows, StepInputs
from minivllm.layers.sampler import Sampler, SamplingTensors

if TYPE_CHECKING:
    from minivllm.engine.model_runner import ModelRunner


@dataclass(frozen=True)
class StepForms:
    """The parts of a step; see :mod:`minivllm.engine.device_rows` for those on the rows.

    forward: (runner, batch, cache) -> hidden [T, E]. logits: hidden [P, E] -> into logits [P, V].
    sample: logits [P, V] and the step's inputs -> into tokens int64 [P].
    """

    begin_step: Callable[[DeviceRows, torch.Tensor, StepInputs, int], None]
    finish_step: Callable[[DeviceRows, torch.Tensor, StepInputs, torch.Tensor], None]
    apply_updates: Callable[[torch.Tensor, torch.Tensor], None]
    forward: Callable[[ModelRunner, PagedBatch, PagedKVCache], torch.Tensor]
    logits: Callable[[nn.Module, torch.Tensor, torch.Tensor], None]
    sample: Callable[[torch.Tensor, StepInputs, torch.Tensor], None]


def choose_forms(model: nn.Module, device: torch.device) -> StepForms:
    """Kernels where Triton compiles for ``device``, else PyTorch."""
    if device.type != "cuda":
        return StepForms(
            begin_step=device_rows.begin_step,
            finish_step=device_rows.finish_step,
            apply_updates=device_rows.apply_updates,
            forward=_plain_forward,
            logits=_plain_logits,
            sample=_plain_sample,
        )
    # Here, for they import Triton, which has no wheel for every machine.
    from minivllm.engine import sampler_kernels, step_kernels
    from minivllm.engine.fused_forward import FusedForward

    fused = FusedForward(model)

    def forward(runner: ModelRunner, batch: PagedBatch, cache: PagedKVCache) -> torch.Tensor:
        bound = runner.bind_attention(cache, batch, runner.scale)
        return fused(
            batch.input_ids, batch.positions, batch.slot_mapping, cache, bound.attend_stored
        )

    def sample(logits: torch.Tensor, inputs: StepInputs, tokens: torch.Tensor) -> None:
        sampler_kernels.sample(logits, inputs.temperature, inputs.seed, inputs.step, out=tokens)

    return StepForms(
        begin_step=step_kernels.begin_step,
        finish_step=step_kernels.finish_step,
        apply_updates=step_kernels.apply_updates,
        forward=forward,
        logits=_logits_in_place,
        sample=sample,
    )


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


def _plain_logits(model: nn.Module, hidden: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(model.compute_logits(hidden))


def _logits_in_place(model: nn.Module, hidden: torch.Tensor, out: torch.Tensor) -> None:
    # Without a tensor in between: at batch 256 a copy would move 156 MB more.
    torch.mm(hidden, model.lm_head.weight.t(), out=out)


def _plain_sample(logits: torch.Tensor, inputs: StepInputs, tokens: torch.Tensor) -> None:
    params = SamplingTensors(inputs.temperature, inputs.seed, inputs.step)
    tokens.copy_(Sampler()(logits, params))
