"""Rotary position embedding (Su et al. 2021, "RoFormer"), and its scalings for long contexts.

RoPE turns pair i of a head's D/2 pairs by the angle ``position * inv_freq[i]``. A query and a key
that are turned so meet at an angle that depends only on how far apart they are.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How the angles are stretched for contexts longer than the pretraining's.

    kind: ``linear`` divides every angle by ``factor`` (Chen et al. 2023); ``dynamic`` is the
    NTK-aware change of base (bloc97 2023); ``yarn`` blends by wavelength (Peng et al. 2023);
    ``llama3`` does the same with Llama 3.1's two thresholds.
    original_max_positions: the context length of the pretraining, in tokens.
    attention_factor: what cos and sin are multiplied by; ``None`` is YaRN's own formula.
    """

    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_TYPES:
            raise ValueError(f"rope_type={self.kind!r} is not supported; use one of {ROPE_TYPES}")
        if self.kind != "default" and not self.factor >= 1.0:
            raise ValueError(f"RoPE factor={self.factor} must be at least 1")
        if self.kind in ("yarn", "llama3", "dynamic") and self.original_max_positions <= 0:
            raise ValueError(
                f"rope_type={self.kind!r} needs original_max_position_embeddings in the config"
            )


def inverse_frequencies(
    head_size: int, base: float, scaling: RopeScaling, max_positions: int
) -> torch.Tensor:
    """The angle that each pair turns per position, in radians: float32 [D / 2]."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    if scaling.kind == "dynamic":
        return 1.0 / _ntk_base(head_size, base, scaling, max_positions) ** exponents
    inv_freq = 1.0 / base**exponents
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling)
    if scaling.kind == "yarn":
        return _yarn(inv_freq, head_size, base, scaling)
    return inv_freq


def _ntk_base(head_size: int, base: float, scaling: RopeScaling, max_positions: int) -> float:
    """Raise the base so that the slowest pair spans the longer context, the fastest stays."""
    stretch = scaling.factor * max_positions / scaling.original_max_positions - (scaling.factor - 1)
    return base * max(stretch, 1.0) ** (head_size / (head_size - 2))


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Slow pairs are slowed by ``factor``, fast ones kept, those between blended by their turns.

    inv_freq: [D / 2], radians a token. A pair's turns are how often it goes round within
    ``original_max_positions`` tokens: up to ``low_freq_factor`` turns it is slow, from
    ``high_freq_factor`` on fast, and between them its share of the plain speed grows evenly.
    """
    turns = scaling.original_max_positions * inv_freq / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return inv_freq * kept + inv_freq / scaling.factor * (1 - kept)


def _yarn(
    inv_freq: torch.Tensor, head_size: int, base: float, scaling: RopeScaling
) -> torch.Tensor:
    """Blend by pair index between pairs that turn ``beta_fast`` and ``beta_slow`` times."""

    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_max_positions / (times * 2 * math.pi)
        return head_size * math.log(wavelength) / (2 * math.log(base))

    low = pair_that_turns(scaling.beta_fast)
    high = pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    pairs = torch.arange(head_size // 2, dtype=torch.float32)
    stretched = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq * (1 - stretched) + inv_freq / scaling.factor * stretched


def attention_factor(scaling: RopeScaling) -> float:
    """What cos and sin are multiplied by: YaRN sharpens attention over a longer context."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pair (i, i + D/2) of every head by its angle.

    x: [T, heads, D]; cos, sin: float32 [T, 1, D/2]. Returns [T, heads, D] in the dtype of ``x``.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """RoPE with cos and sin tabulated for every position up to ``max_positions``."""

    def __init__(
        self,
        head_size: int,
        max_positions: int,
        base: float,
        scaling: RopeScaling | None = None,
        *,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        scaling = scaling or RopeScaling()
        inv_freq = inverse_frequencies(head_size, base, scaling, max_positions)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inv_freq
        factor = attention_factor(scaling)
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
        # [positions, 1, D]: cos in the first half, sin in the second; one look-up fetches both.
        self.register_buffer("table", table[:, None].to(device), persistent=False)

    def forward(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: [T]; q: [T, H, D]; k: [T, G, D]. Returns both turned to their positions."""
        cos, sin = self.table.index_select(0, positions).chunk(2, dim=-1)
        # All heads turn alike; and starting an operation costs a CPU more than a few heads do.
        turned = apply_rope(torch.cat((q, k), dim=1), cos, sin)
        return turned[:, : q.shape[1]], turned[:, q.shape[1] :]
