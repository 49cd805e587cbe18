"""The parts of a step, see ``engine/step_forms.py``, in which ranks have to speak to each other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from minivllm.distributed.sampling import Vocabulary
from minivllm.engine.device_rows import StepInputs
from minivllm.engine.model_runner import ModelRunner
from minivllm.engine.skinny_forward import SkinnyForward, StepTables
from minivllm.engine.step_forms import Draw, StepForms, decode_batch, skinny_places

if TYPE_CHECKING:
    from minivllm.engine.skinny_gemv_kernels import Stream

MOST_BYTES_IN_PARTS = 1 << 16


def shard_forms(forms: StepForms, device: torch.device, vocabulary: Vocabulary) -> StepForms:
    """``forms`` with those parts of a step in which ranks have to speak to each other."""
    if device.type != "cuda":

        def sample(logits: torch.Tensor, draw: Draw, tokens: torch.Tensor) -> None:
            vocabulary.sample(logits, draw, tokens, vocabulary.find_best)

        return replace(forms, sample=sample)
    # Here, for it imports Triton, which has no wheel for every machine.
    from minivllm.engine import sampler_kernels

    skinny: dict[int, SkinnyShard] = {}

    def find_best(logits: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        score = torch.empty(len(logits), dtype=torch.float32, device=device)
        first = vocabulary.owned.start
        token = sampler_kernels.sample(
            logits, draw.temperature, draw.seed, draw.step, first_token=first, score=score
        )
        return score, token

    def sample_on_gpu(logits: torch.Tensor, draw: Draw, tokens: torch.Tensor) -> None:
        vocabulary.sample(logits, draw, tokens, find_best)

    def decode(runner: ModelRunner, inputs: StepInputs, logits: torch.Tensor) -> None:
        places, model = len(logits), runner.model
        many = places > skinny_places(model.config)
        if many or not SkinnyForward.fits(model.config, places, device):
            hidden = forms.forward(runner, decode_batch(inputs), runner.cache)
            forms.head(model, hidden, logits)
            return
        if places not in skinny:
            skinny[places] = SkinnyShard(
                model,
                runner.cache,
                places,
                reduce=vocabulary.group.all_reduce,
                logits=logits,
            )
        skinny[places](
            inputs.input_ids,
            inputs.positions,
            inputs.slot_mapping,
            inputs.block_tables,
            inputs.context,
        )

    return replace(forms, sample=sample_on_gpu, decode=decode)


class SkinnyShard(SkinnyForward):
    """The chain of small batches on one rank, which embeds tokens with the others' help."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        context: torch.Tensor,
    ) -> torch.Tensor:
        """See :class:`SkinnyForward`; the logits are those of this rank's tokens."""
        from minivllm.engine.skinny_gemv_kernels import Stream

        tables = StepTables(positions, slot_mapping, block_tables, context)
        self._check(input_ids, tables)
        # The chain reads an embedding at ids: here one of P vectors, in their order.
        vectors = self.model.model.embed_tokens(input_ids)
        places = torch.arange(self.rows, device=input_ids.device)
        run = self._one_row if self.rows == 1 else self._more_rows
        with torch.inference_mode():
            return run(Stream(vectors, places), tables)

    def _stream(self, stream: Stream, total: torch.Tensor, parts: torch.Tensor) -> Stream:
        from minivllm.engine.skinny_gemv_kernels import Stream

        # The kernel behind adds up parts in any case. Few bytes travel as fast as fewer, so a
        # kernel that added them up here would only cost its launch.
        if parts.nbytes > MOST_BYTES_IN_PARTS:
            parts = parts.sum(dim=0)[None]
        assert self.reduce is not None
        return Stream(total, stream.ids, self.reduce(parts))
