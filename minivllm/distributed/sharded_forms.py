"""The parts of a step, see ``engine/step_forms.py``, in which ranks have to speak to each other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.distributed.exchange import Exchange
from minivllm.distributed.one_shot import OneShot
from minivllm.distributed.sampling import Vocabulary
from minivllm.engine.device_rows import StepInputs
from minivllm.engine.fused_forward import AttendStored, FusedForward
from minivllm.engine.model_runner import ModelRunner
from minivllm.engine.skinny_buffers import Scratch
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.engine.skinny_links import StepTables
from minivllm.engine.skinny_tuning import SkinnyTuning
from minivllm.engine.step_forms import Draw, StepForms, decode_batch, run_chain, skinny_places
from minivllm.layers.layernorm import RMSNorm
from minivllm.models.config import ModelConfig

if TYPE_CHECKING:
    from minivllm.engine.skinny_gemv_kernels import Stream


def shard_forms(
    forms: StepForms,
    model: nn.Module,
    device: torch.device,
    vocabulary: Vocabulary,
    exchange: Exchange | None,
) -> StepForms:
    """``forms`` with those parts of a step in which ranks have to speak to each other.

    model: this rank's share. exchange: how, on a GPU; None where layers do it themselves.
    """
    if exchange is None:

        def sample(logits: torch.Tensor, draw: Draw, tokens: torch.Tensor) -> None:
            vocabulary.sample(logits, draw, tokens, vocabulary.find_best)

        return replace(forms, sample=sample)
    # Here, for it imports Triton, which has no wheel for every machine.
    from minivllm.engine import sampler_kernels

    fused = ShardedForward(model, exchange)
    skinny: dict[int, SkinnyShard] = {}
    scratch = Scratch(device)

    def forward(runner: ModelRunner, batch: PagedBatch, cache: PagedKVCache) -> torch.Tensor:
        bound = runner.bind_attention(cache, batch, runner.scale)
        attend = partial(bound.attend_stored, pdl=exchange.pdl)
        return fused(batch.input_ids, batch.positions, batch.slot_mapping, cache, attend)

    def decode(runner: ModelRunner, inputs: StepInputs, logits: torch.Tensor) -> None:
        places, dtype = len(logits), logits.dtype
        many = places > chain_places(model.config, dtype, device)
        if many or not SkinnyForward.fits(model.config, places, device, dtype):
            hidden = forward(runner, decode_batch(inputs), runner.cache)
            forms.head(model, hidden, logits)
            return
        if places not in skinny:
            skinny[places] = SkinnyShard(
                model, runner.cache, places, exchange=exchange, logits=logits, scratch=scratch
            )
        run_chain(skinny[places], runner, inputs)

    def find_best(logits: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        score = torch.empty(len(logits), dtype=torch.float32, device=device)
        first = vocabulary.owned.start
        token = sampler_kernels.sample(
            logits, draw.temperature, draw.seed, draw.step, first_token=first, score=score
        )
        return score, token

    def sample_on_gpu(logits: torch.Tensor, draw: Draw, tokens: torch.Tensor) -> None:
        if isinstance(exchange, OneShot):
            exchange.best(*find_best(logits[:, : len(vocabulary.owned)], draw), tokens)
        else:
            vocabulary.sample(logits, draw, tokens, find_best)

    return replace(forms, forward=forward, sample=sample_on_gpu, decode=decode)


class ShardedForward(FusedForward):
    """:class:`FusedForward` on one rank's share of a model: what is summed, is normalised at once.

    A layer, in as many launches as there, where the ranks share memory:

        qkv | q/k-norm + RoPE + store of K, V | attention | o | sum over the ranks + add + norm |
        gate and up | SiLU-and-mul | down | sum over the ranks + add + norm
    """

    def __init__(self, model: nn.Module, exchange: Exchange) -> None:
        super().__init__(model, pdl=exchange.pdl)
        self.exchange = exchange

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: PagedKVCache,
        attend: AttendStored,
    ) -> torch.Tensor:
        """See :class:`FusedForward`; every rank gets the same hidden states [T, E]."""
        kernels, exchange, pdl = self.kernels, self.exchange, self.pdl
        decoder = self.model.model
        layers = list(decoder.layers)
        # The norm in front of each layer belongs to the sum behind the one before.
        norms = [layer.input_layernorm for layer in layers[1:]] + [decoder.norm]
        first = layers[0].input_layernorm
        x, residual = exchange.embed(decoder.embed_tokens, input_ids, first)
        for index, (layer, next_norm) in enumerate(zip(layers, norms, strict=True)):
            mlp = layer.mlp
            q = self.queries(index, x, positions, slot_mapping, cache)
            x = exchange.summand(layer.self_attn.o_proj, attend(index, q).flatten(1))
            x, residual = exchange.add_norm(x, residual, layer.post_attention_layernorm)
            x = kernels.silu_and_mul(mlp.gate_up_proj(x), pdl=pdl)
            x, residual = exchange.add_norm(exchange.summand(mlp.down_proj, x), residual, next_norm)
        return x


def chain_places(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """As :func:`skinny_places`, but no more than has been measured on several ranks."""
    return min(32, skinny_places(config, dtype, device))


# Up to this width a single row is summed by one program, which makes its norm as well; a wider one
# by many. (A step on 2 H200s, by one and by many: 0.6B 0.54 and 0.58 ms, 8B 2.50 and 2.35.)
WHOLE_ROWS = 2048


class SkinnyShard(SkinnyForward):
    """The chain of small batches on one rank, whose sums, of embeddings too, are the ranks'."""

    def __init__(
        self,
        model: nn.Module,
        cache: PagedKVCache,
        rows: int,
        *,
        exchange: Exchange,
        logits: torch.Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """See :class:`SkinnyForward`; logits are those of this rank's tokens."""
        size = model.config.hidden_size
        # Sums over the ranks have kernels of their own in any case, which make the norm as well.
        tuning = replace(SkinnyTuning.for_rows(rows), norm_inside=0, merge_inside=size)
        if rows == 1 and size <= WHOLE_ROWS:
            tuning = replace(tuning, late=False)
        super().__init__(model, cache, rows, tuning=tuning, logits=logits, scratch=scratch)
        self.exchange = exchange
        # The chain reads an embedding at ids: here one of P vectors, in their order.
        self.places = torch.arange(rows, device=cache.k.device)

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        context: torch.Tensor,
        attend: AttendStored | None = None,
    ) -> torch.Tensor:
        """See :class:`SkinnyForward`; the logits are those of this rank's tokens."""
        from minivllm.engine.skinny_gemv_kernels import Stream

        tables = StepTables(positions, slot_mapping, block_tables, context)
        self._check(input_ids, tables)
        with torch.inference_mode():
            vectors, _ = self.exchange.embed(self.model.model.embed_tokens, input_ids, None)
            stream = Stream(vectors, self.places)
            if self.rows == 1:
                return self._one_row(stream, tables)
            return self._more_rows(stream, tables, attend)

    def _sum_and_gain(self, norm: RMSNorm, stream: Stream, total: torch.Tensor) -> torch.Tensor:
        if stream.parts is None:
            return super()._sum_and_gain(norm, stream, total)
        return self.exchange.add_gain_of_parts(
            stream.parts, stream.total, norm.weight, total, self.buffers.normed
        )

    def _sum_and_norm(self, norm: RMSNorm, stream: Stream) -> torch.Tensor:
        if stream.parts is None:
            return super()._sum_and_norm(norm, stream)
        total = self._other_total(stream)
        self.exchange.add_norm_of_parts(
            stream.parts, stream.total, norm, total, self.buffers.normed
        )
        return total
