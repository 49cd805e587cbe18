"""The memory between the kernels of ``skinny_forward.py``, and into how many parts a sum is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from minivllm.engine.skinny_tuning import SkinnyTuning
from minivllm.models.qwen3 import Qwen3ForCausalLM


class Scratch:
    """Memory by name, for forwards of several sizes of which only one runs at a time.

    The largest should come first: what was given out stays, and more than it had is new memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A contiguous tensor, which shares its memory with all of this name and dtype."""
        numel = math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or len(flat) < numel:
            flat = torch.empty(numel, dtype=dtype, device=self.device)
            self._flat[name, dtype] = flat
        return flat[:numel].view(shape)


@dataclass(frozen=True)
class SkinnyBuffers:
    """What the kernels of P rows hand to each other.

    totals: two float32 [P, E], the residual stream; normed: [P, E], its norm; squares: float32 [n,
    P], from which the division still to come is made (see ``sum_and_gain``). qkv: float32 [parts,
    P, (H + 2 G) * D]. splits: float32 [splits, P, H, D], or [1, P, H, D] that needs no merge
    (``direct``), and lse: float32 [splits, P, H]; attended: [P, H, D], merged. act: [1, P, F].
    o_parts, down_parts: float32 [parts, P, E].
    """

    totals: tuple[torch.Tensor, torch.Tensor]
    normed: torch.Tensor
    squares: torch.Tensor
    qkv: torch.Tensor
    splits: torch.Tensor
    lse: torch.Tensor
    attended: torch.Tensor
    o_parts: torch.Tensor
    act: torch.Tensor
    down_parts: torch.Tensor
    direct: bool

    @classmethod
    def allocate(
        cls,
        model: Qwen3ForCausalLM,
        rows: int,
        tuning: SkinnyTuning,
        scratch: Scratch,
        *,
        processors: int,
        merge_inside: bool,
        hopper: bool,
    ) -> SkinnyBuffers:
        """Buffers for ``rows`` rows; merge_inside, hopper: see :class:`SkinnyForward`."""
        # Here, for it imports Triton, which has no wheel for every machine.
        from minivllm.engine.skinny_split_kernels import splits_for

        weight = model.model.embed_tokens.weight
        layer = model.model.layers[0]
        qkv, size = layer.self_attn.qkv_proj, weight.shape[1]
        heads, head_size = qkv.num_heads, qkv.head_size
        mlp_size = layer.mlp.down_proj.in_features

        def wide(name: str, *shape: int) -> torch.Tensor:
            return scratch.take(name, torch.float32, *shape)

        def narrow(name: str, *shape: int) -> torch.Tensor:
            return scratch.take(name, weight.dtype, *shape)

        splits = splits_for(rows, qkv.num_kv_heads, tuning.attention_waves * processors)
        qkv_parts, o_parts, down_parts = tuning.qkv_parts, tuning.o_parts, tuning.down_parts
        if hopper:
            # Attention reads the parts of qkv, and reads enough besides.
            qkv_parts = qkv_parts or tuning.hopper_parts(
                qkv.out_features, size, processors, 2 * tuning.hopper_weights
            )
            o_parts = o_parts or tuning.hopper_parts(size, heads * head_size, processors)
            down_parts = down_parts or tuning.hopper_parts(size, mlp_size, processors)
        if rows == 1:
            qkv_parts = 1  # the norm of a single row needs all of it
        if merge_inside:
            # A program of o merges the splits of its part's heads only: with 4,096 tokens of
            # context a step of the 0.6B model took 0.76 ms in 4 parts and 0.93 in one.
            o_parts = o_parts or (4 if heads % 4 == 0 else 0)
        qkv_parts = qkv_parts or tuning.parts(rows, qkv.out_features, size, 16, processors)
        o_parts = o_parts or tuning.parts(rows, size, heads * head_size, head_size, processors)
        down_parts = down_parts or tuning.parts(rows, size, mlp_size, 16, processors)
        direct = splits == 1 and not merge_inside
        return cls(
            totals=(wide("total 0", rows, size), wide("total 1", rows, size)),
            normed=narrow("normed", rows, size),
            squares=wide("squares", tuning.gain_blocks(rows, size, processors), rows),
            qkv=wide("qkv", qkv_parts, rows, qkv.out_features),
            splits=(narrow if direct else wide)("splits", splits, rows, heads, head_size),
            lse=wide("lse", splits, rows, heads),
            attended=narrow("attended", rows, heads, head_size),
            o_parts=wide("o", o_parts, rows, size),
            act=narrow("act", 1, rows, mlp_size),
            down_parts=wide("down", down_parts, rows, size),
            direct=direct,
        )
