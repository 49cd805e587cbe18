"""One decode step of a few rows as a chain of our own kernels, from token ids to logits.

The same mathematics as ``model(...)`` and ``model.compute_logits(...)``, cut differently. A layer:

    one row      qkv ........ attention .......... o .......... gate-up ... down
    more rows    norm, qkv ... attention, merge ... o ... norm, gate-up ... down

For one row, each program of qkv and gate-up makes the norm for itself, and each program of o the
merge. It reads the whole row for that. Of many rows, or a wide one, that would be as much as it has
weights: then they are kernels of their own, also for one row (``benchmarks/skinny.py --shapes 8B
--batch 1 --try norm_inside=4096`` measures both). SiLU is part of gate-up; norms of the heads, RoPE
and the store of K and V are part of attention. The residual stream stays in float32. Each kernel is
launched while the one in front still runs (see ``skinny_kernels.py``); only the first waits for all
that was queued before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minivllm.attention.flash_hopper import runs_on_hopper
from minivllm.attention.paged import PagedKVCache
from minivllm.attention.paged_triton import triton_runs_on
from minivllm.engine.fused_forward import AttendStored
from minivllm.engine.skinny_buffers import Scratch, SkinnyBuffers
from minivllm.engine.skinny_tuning import SkinnyTuning
from minivllm.layers.layernorm import RMSNorm
from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM

if TYPE_CHECKING:
    from minivllm.engine.skinny_gemv_kernels import Stream

MOST_ROWS = 64
MOST_ROWS_ON_HOPPER = 256
HEAD_SIZES = (64, 128)
Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StepTables:
    """What attention has to know of P rows; see :meth:`SkinnyForward.__call__`."""

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context: torch.Tensor


class SkinnyForward:
    """A finished model, its cache and P rows, ready to be called, and captured, again and again.

    All buffers are made here, so every call uses the same addresses; a call reads nothing back and
    waits for nothing.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        cache: PagedKVCache,
        rows: int,
        *,
        reduce: Reduce | None = None,
        tuning: SkinnyTuning | None = None,
        logits: torch.Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """Reserve the buffers.

        Args:
            model: Qwen3ForCausalLM or LlamaForCausalLM with its weights loaded; they are used
                where they lie.
            cache: where K and V go, of the model's dtype and device.
            rows: P, 1 to 64; to 256 in 16 bits on Hopper.
            reduce: called on what o_proj and down_proj give, float32 [P, E]; what it returns is
                added to the residual stream instead (the sum over ranks, say), in the same form.
            tuning: tile sizes; those for this number of rows when None.
            logits: [P, V] of the model's dtype to write into; new memory when None.
            scratch: where to take the buffers from; new memory when None.

        Raises:
            ValueError: if these kernels cannot run the model there.
        """
        weight = model.model.embed_tokens.weight
        reason = self.why_not(model.config, rows, weight.device, weight.dtype)
        if reason is not None:
            raise ValueError(reason)
        if cache.block_size & (cache.block_size - 1):
            raise ValueError(
                f"the cache's block_size={cache.block_size} must be a power of two for the kernels"
            )
        if cache.k.dtype != weight.dtype or cache.k.device != weight.device:
            raise ValueError(
                f"the cache is {cache.k.dtype} on {cache.k.device} but the model {weight.dtype} on "
                f"{weight.device}; make both alike"
            )
        self.model = model
        self.cache = cache
        self.rows = rows
        self.reduce = reduce
        on_gpu = weight.device.type == "cuda"
        properties = torch.cuda.get_device_properties(weight.device) if on_gpu else None
        self.processors = properties.multi_processor_count if properties else 4
        self.tuning = tuning or SkinnyTuning.for_rows(rows)
        self.norm_inside = rows == 1 and weight.shape[1] <= self.tuning.norm_inside
        self.merge_inside = rows == 1 and weight.shape[1] <= self.tuning.merge_inside
        # The copy engine wants rows of the weights that begin at 16 bytes: all sizes are so.
        self.hopper = (
            self.tuning.hopper
            and rows > 1
            and runs_on_hopper(weight.device, weight.dtype, model.config.head_size)
        )
        if rows > MOST_ROWS and not self.hopper:
            raise ValueError(f"rows={rows} must be at most {MOST_ROWS} with hopper=False")
        # float16 might not hold what is not normalised yet.
        self.divides_late = (
            self.tuning.late
            and weight.dtype == torch.bfloat16
            and (self.hopper if rows > 1 else not self.norm_inside)
        )
        # Hopper and later can start a kernel while the one in front finishes.
        self.dependent = bool(properties and properties.major >= 9) and self.tuning.dependent
        self.buffers = SkinnyBuffers.allocate(
            model,
            rows,
            self.tuning,
            scratch or Scratch(weight.device),
            processors=self.processors,
            merge_inside=self.merge_inside,
            hopper=self.hopper,
        )
        if logits is None:
            logits = weight.new_empty(rows, model.lm_head.weight.shape[0])
        self.logits = logits[None]

    @staticmethod
    def fits(
        config: ModelConfig,
        rows: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> bool:
        """Whether the kernels can run this model with this many rows on ``device``.

        dtype: of its weights.
        """
        return SkinnyForward.why_not(config, rows, device, dtype) is None

    @staticmethod
    def why_not(
        config: ModelConfig,
        rows: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> str | None:
        """What stands against it, with a remedy; None if nothing does."""
        device = torch.device(device)
        hopper = runs_on_hopper(device, dtype, config.head_size)
        most = MOST_ROWS_ON_HOPPER if hopper else MOST_ROWS
        if not 1 <= rows <= most:
            return f"rows={rows} must be 1 to {most}; run larger batches through the model"
        if not triton_runs_on(device):
            return f"device={device}: these kernels need Triton and a GPU of Ampere or later"
        if config.head_size not in HEAD_SIZES:
            return f"head_size={config.head_size} is not one of {HEAD_SIZES}; use the model itself"
        if config.attention_bias or config.mlp_bias:
            return "attention_bias and mlp_bias are not supported; use the model itself"
        for name in ("hidden_size", "intermediate_size"):
            if getattr(config, name) % 16:
                return f"{name}={getattr(config, name)} is no multiple of 16; use the model itself"
        if config.vocab_size * config.hidden_size >= 2**31:
            return "vocab_size * hidden_size passes 2^31; use the model itself"
        return None

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        context: torch.Tensor,
        attend: AttendStored | None = None,
    ) -> torch.Tensor:
        """Run one new token of each of P sequences.

        Args:
            input_ids: [P] int64 tokens.
            positions: [P] int64, each token's place in its sequence.
            slot_mapping: [P] int64, where its K and V go; -1 writes nowhere (a padded row).
            block_tables: [P, M] int32; entries past a sequence's last block are not read.
            context: [P] int32 tokens of each sequence, the newest included; 0 for a padded row,
                whose logits mean nothing.
            attend: attention over keys and values that are in their slots, instead of the one
                for a handful of rows; see ``fused_forward.py``.

        Returns:
            logits [P, V] in the model's dtype, in the same memory at every call.

        Raises:
            ValueError: if a tensor has another shape, dtype or device.
        """
        from minivllm.engine.skinny_gemv_kernels import Stream

        tables = StepTables(positions, slot_mapping, block_tables, context)
        self._check(input_ids, tables)
        stream = Stream(self.model.model.embed_tokens.weight, input_ids)
        if self.rows == 1:
            return self._one_row(stream, tables)
        return self._more_rows(stream, tables, attend)

    # ------------------------------------------------------------------ the chain

    def _one_row(self, stream: Stream, tables: StepTables) -> torch.Tensor:
        buffers = self.buffers
        for index, layer in enumerate(self.model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            qkv, o = attention.qkv_proj.weight, attention.o_proj.weight
            gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
            total = self._gemv_norm(layer.input_layernorm, stream, qkv, buffers.qkv)
            self._attend(index, attention, tables)
            self._gemv_merge(o, buffers.o_parts, tables)
            stream = self._stream(stream, total, buffers.o_parts)
            norm = layer.post_attention_layernorm
            total = self._gemv_norm(norm, stream, gate_up, buffers.act, silu=True)
            self._gemv(down, buffers.act[0], buffers.down_parts)
            stream = self._stream(stream, total, buffers.down_parts)
        self._gemv_norm(self.model.model.norm, stream, self.model.lm_head.weight, self.logits)
        return self.logits[0]

    def _more_rows(
        self, stream: Stream, tables: StepTables, attend: AttendStored | None
    ) -> torch.Tensor:
        buffers = self.buffers
        tuning = self.tuning
        for index, layer in enumerate(self.model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            qkv, o = attention.qkv_proj.weight, attention.o_proj.weight
            gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
            total, late = self._norm(layer.input_layernorm, stream)
            self._product(qkv, buffers.normed, buffers.qkv, **late)
            if attend is None:
                self._attend(index, attention, tables)
                attended = self._merged(tables)
            else:
                q = self._queries(index, attention, tables)
                attended = attend(index, q).flatten(1)
            self._product(o, attended, buffers.o_parts)
            stream = self._stream(stream, total, buffers.o_parts)
            total, late = self._norm(layer.post_attention_layernorm, stream)
            self._product(
                gate_up,
                buffers.normed,
                buffers.act,
                silu=True,
                block_n=tuning.gate_up_block_n,
                **late,
            )
            self._product(down, buffers.act[0], buffers.down_parts)
            stream = self._stream(stream, total, buffers.down_parts)
        self._sum_and_norm(self.model.model.norm, stream)
        head = self.model.lm_head.weight
        if tuning.head_block_n:
            self._product(head, buffers.normed, self.logits, block_n=tuning.head_block_n)
        else:
            torch.mm(buffers.normed, head.T, out=self.logits[0])
        return self.logits[0]

    # ------------------------------------------------------------------ its links

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
        from minivllm.engine.skinny_kernels import sum_and_norm

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
        from minivllm.engine.skinny_kernels import sum_and_gain

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

    def _stream(self, stream: Stream, total: torch.Tensor, parts: torch.Tensor) -> Stream:
        """The residual stream ``total``, to which ``parts`` [parts, P, E] will be added."""
        from minivllm.engine.skinny_gemv_kernels import Stream

        if self.reduce is not None:
            parts = self.reduce(parts.sum(dim=0))[None]
        return Stream(total, stream.ids, parts)

    def _other_total(self, stream: Stream) -> torch.Tensor:
        # Programs of a kernel read the old sum while one of them writes the new.
        return self.buffers.totals[0 if stream.total is self.buffers.totals[1] else 1]

    def _check(self, input_ids: torch.Tensor, tables: StepTables) -> None:
        named = {"input_ids": input_ids, **vars(tables)}
        for name, tensor in named.items():
            dtype = torch.int32 if name in ("block_tables", "context") else torch.int64
            if tensor.dtype != dtype or tensor.shape[0] != self.rows:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)} but must be {dtype} with "
                    f"{self.rows} rows, as this SkinnyForward was made for"
                )
            if tensor.dim() != (2 if name == "block_tables" else 1) or tensor.stride(-1) != 1:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}; give "
                    "[P, M] for block_tables and [P] for the others, without gaps"
                )
            if tensor.device != self.logits.device:
                raise ValueError(
                    f"{name} is on {tensor.device} but the model on {self.logits.device}; move it"
                )
