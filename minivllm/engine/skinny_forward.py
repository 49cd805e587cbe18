"""One decode step of a few rows as a chain of our own kernels, from token ids to logits.

The same mathematics as ``model(...)`` and ``model.compute_logits(...)``, cut differently. A layer:

    one row      qkv ....... attention ......... o ........ gate-up .. down
    more rows    sum, qkv .. attention, merge .. o .. sum, gate-up .. down
    many rows    sum, qkv .. heads, attention, merge .. o .. sum, gate-up .. down

What o and down give is left in parts, which the next one adds to the residual stream, in float32.
For one row, each program of qkv and gate-up does it for itself, with the norm, and each program of
o the merge. It reads the whole row for that. Of several rows, or a wide one, that would be as much
as it has weights: then there are kernels of their own (``benchmarks/skinny.py --shapes 8B --batch 1
--try norm_inside=4096`` measures both). In bfloat16, for one row or on Hopper, these only
multiply the norm's weights, and the products divide, see ``skinny_sum_kernels.py``. SiLU is part of
gate-up. Norms of the heads, RoPE and the store of K and V are part of attention; but the attention
for many sequences, which shares work out more evenly, has them in front. The head of several rows
is left to cuBLAS. Each kernel is launched while the one before it still runs (see
``skinny_kernels.py``); only the first, and cuBLAS's, wait for all that was queued before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from minivllm.attention.flash_hopper import runs_on_hopper
from minivllm.attention.paged import PagedKVCache
from minivllm.attention.paged_triton import triton_runs_on
from minivllm.engine.fused_forward import AttendStored
from minivllm.engine.skinny_buffers import Scratch, SkinnyBuffers
from minivllm.engine.skinny_links import SkinnyLinks, StepTables
from minivllm.engine.skinny_tuning import SkinnyTuning
from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Qwen3ForCausalLM

if TYPE_CHECKING:
    from minivllm.engine.skinny_gemv_kernels import Stream

MOST_ROWS = 64
MOST_ROWS_ON_HOPPER = 256
HEAD_SIZES = (64, 128)


class SkinnyForward(SkinnyLinks):
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
        on_gpu = weight.device.type == "cuda"
        properties = torch.cuda.get_device_properties(weight.device) if on_gpu else None
        self.processors = properties.multi_processor_count if properties else 4
        self.tuning = tuning or SkinnyTuning.for_rows(rows)
        self.norm_inside = rows == 1 and weight.shape[1] <= self.tuning.norm_inside
        self.merge_inside = rows == 1 and weight.shape[1] <= self.tuning.merge_inside
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
            stream = replace(stream, total=total, parts=buffers.o_parts)
            norm = layer.post_attention_layernorm
            total = self._gemv_norm(norm, stream, gate_up, buffers.act, silu=True)
            self._gemv(down, buffers.act[0], buffers.down_parts)
            stream = replace(stream, total=total, parts=buffers.down_parts)
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
            stream = replace(stream, total=total, parts=buffers.o_parts)
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
            stream = replace(stream, total=total, parts=buffers.down_parts)
        self._sum_and_norm(self.model.model.norm, stream)
        head = self.model.lm_head.weight
        if tuning.head_block_n:
            self._product(head, buffers.normed, self.logits, block_n=tuning.head_block_n)
        else:
            torch.mm(buffers.normed, head.T, out=self.logits[0])
        return self.logits[0]

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
