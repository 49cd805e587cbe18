"""The links of the chain in ``skinny_forward.py``: each kernel with its operands and its tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minivllm.attention.paged import PagedKVCache
from minivllm.engine.skinny_buffers import SkinnyBuffers
from minivllm.engine.skinny_tuning import SkinnyTuning
from minivllm.layers.layernorm import RMSNorm
from minivllm.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM

if TYPE_CHECKING:
    from minivllm.engine.skinny_gemv_kernels import Stream


@dataclass(frozen=True)
class StepTables:
    """What attention has to know of P rows; see ``SkinnyForward.__call__``."""

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context: torch.Tensor


class SkinnyLinks:
    """What :class:`SkinnyForward` launches, between ``buffers``.

    Attributes:
        norm_inside, merge_inside: the products of one row make the norm of what they read, and
            merge attention's splits, themselves.
        hopper: several rows go through ``skinny_hopper_kernels``.
        divides_late: norms are divided out by the products behind them.
        dependent: a kernel is launched while the one in front of it still runs.
        processors: multiprocessors of the device.
    """

    model: Qwen3ForCausalLM
    cache: PagedKVCache
    tuning: SkinnyTuning
    buffers: SkinnyBuffers
    norm_inside: bool
    merge_inside: bool
    hopper: bool
    divides_late: bool
    dependent: bool
    processors: int

    def _gemv_norm(
        self,
        norm: RMSNorm,
        stream: Stream,
        weight: torch.Tensor,
        out: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """out = weight @ norm(stream); returns the stream's sum."""
        if self.norm_inside:
            total = self._other_total(stream)
            first = stream.parts is None
            into = {"gain": norm.weight, "eps": norm.eps, "total": total}
            self._gemv(weight, stream, out, first=first, **into, **options)
        else:
            total, late = self._norm(norm, stream)
            self._gemv(weight, self.buffers.normed, out, **late, **options)
        return total

    def _gemv_merge(self, weight: torch.Tensor, out: torch.Tensor, tables: StepTables) -> None:
        """out = weight @ what attention gave."""
        if self.merge_inside:
            split = self.tuning.attention_split
            splits = {"lse": self.buffers.lse, "context": tables.context, "min_split": split}
            self._gemv(weight, self.buffers.splits, out, **splits)
        else:
            self._gemv(weight, self._merged(tables), out)

    def _gemv(
        self,
        weight: torch.Tensor,
        x: torch.Tensor | Stream,
        out: torch.Tensor,
        *,
        first: bool = False,
        **options: Any,
    ) -> None:
        from minivllm.engine.skinny_gemv_kernels import gemv

        gemv(
            weight,
            x,
            out,
            weights=self.tuning.gemv_weights,
            num_warps=self.tuning.gemv_warps,
            # The first kernel of a step starts when all in front of it has ended. So what the ones
            # behind it load before they wait (tables, cached keys) is there.
            dependent=self.dependent and not first,
            **options,
        )

    def _sum_and_norm(self, norm: RMSNorm, stream: Stream) -> torch.Tensor:
        """normed = norm(stream); returns the stream's sum."""
        from minivllm.engine.skinny_sum_kernels import sum_and_norm

        total = self._other_total(stream)
        dependent = self.dependent and stream.parts is not None  # as above
        sum_and_norm(
            stream, norm.weight, total, self.buffers.normed, eps=norm.eps, dependent=dependent
        )
        return total

    def _norm(self, norm: RMSNorm, stream: Stream) -> tuple[torch.Tensor, dict[str, Any]]:
        """normed = norm(stream), but for what the product is told to divide by; and the sum."""
        if not self.divides_late:
            return self._sum_and_norm(norm, stream), {}
        total = self._other_total(stream)
        squares = self._sum_and_gain(norm, stream, total)
        return total, {"squares": squares, "eps": norm.eps}

    def _sum_and_gain(self, norm: RMSNorm, stream: Stream, total: torch.Tensor) -> torch.Tensor:
        """total = the stream's sum; normed = that times the norm's weight; returns its squares."""
        from minivllm.engine.skinny_sum_kernels import sum_and_gain

        buffers = self.buffers
        sum_and_gain(
            stream,
            norm.weight,
            total,
            buffers.normed,
            buffers.squares,
            dependent=self.dependent and stream.parts is not None,  # as above
        )
        return buffers.squares

    def _product(
        self,
        weight: torch.Tensor,
        x: torch.Tensor,
        out: torch.Tensor,
        *,
        silu: bool = False,
        block_n: int = 0,
        squares: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        from minivllm.engine.skinny_kernels import skinny_product

        tuning = self.tuning
        if self.hopper:
            from minivllm.engine.skinny_hopper_kernels import hopper_product

            hopper_product(
                weight,
                x,
                out,
                silu=silu,
                squares=squares,
                eps=eps,
                chunk=tuning.hopper_chunk,
                stages=tuning.hopper_stages,
                processors=self.processors,
                together=tuning.hopper_programs,
                dependent=self.dependent,
            )
            return
        skinny_product(
            weight,
            x,
            out,
            silu=silu,
            block_n=block_n or tuning.block_n,
            block_k=tuning.block_k,
            slices=tuning.slices,
            weights_first=tuning.weights_first,
            dependent=self.dependent,
        )

    def _attend(self, layer: int, attention: Qwen3Attention, tables: StepTables) -> None:
        from minivllm.engine.skinny_attention_kernels import skinny_attention

        q_norm = getattr(attention, "q_norm", None)
        k_norm = getattr(attention, "k_norm", None)
        skinny_attention(
            self.buffers.qkv,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            self.model.model.rotary.table,
            tables.positions,
            tables.slot_mapping,
            tables.block_tables,
            tables.context,
            self.cache.k[layer],
            self.cache.v[layer],
            self.buffers.splits,
            self.buffers.lse,
            eps=0.0 if q_norm is None else q_norm.eps,
            tile=self.tuning.attention_tile,
            min_split=self.tuning.attention_split,
            num_warps=self.tuning.attention_warps,
            stages=self.tuning.attention_stages,
            early=self.tuning.early_attention,
            dependent=self.dependent,
        )

    def _queries(self, layer: int, attention: Qwen3Attention, tables: StepTables) -> torch.Tensor:
        """Queries [P, H, D] from the projection; K and V go to the cache."""
        from minivllm.engine.fused_heads_kernels import qk_norm_rope_store

        q_norm = getattr(attention, "q_norm", None)
        k_norm = getattr(attention, "k_norm", None)
        qkv = attention.qkv_proj
        return qk_norm_rope_store(
            self.buffers.qkv,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps,
            self.model.model.rotary.table,
            tables.positions,
            tables.slot_mapping,
            self.cache.k[layer],
            self.cache.v[layer],
            num_heads=qkv.num_heads,
            num_kv_heads=qkv.num_kv_heads,
            head_size=qkv.head_size,
            pdl=self.dependent,
        )

    def _merged(self, tables: StepTables) -> torch.Tensor:
        """What attention gave, [P, H * D]."""
        from minivllm.engine.skinny_split_kernels import merge_splits

        buffers = self.buffers
        if buffers.direct:
            return buffers.splits[0].flatten(1)
        merge_splits(
            buffers.splits,
            buffers.lse,
            tables.context,
            buffers.attended,
            min_split=self.tuning.attention_split,
            dependent=self.dependent,
        )
        return buffers.attended.flatten(1)

    def _other_total(self, stream: Stream) -> torch.Tensor:
        # Programs of a kernel read the old sum while one of them writes the new.
        return self.buffers.totals[0 if stream.total is self.buffers.totals[1] else 1]
