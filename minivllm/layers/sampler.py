"""The sampler: from logits to one token for each sequence.

Sampling uses the Gumbel-max trick (Gumbel 1954): ``argmax(logits / T + noise)`` with Gumbel noise
draws from ``softmax(logits / T)`` in one pass. The noise is a pure function of (seed, step, token),
computed by a hash instead of a generator with a state (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), so a request's tokens do not depend on who shares its batch.
"""

from dataclasses import dataclass

import torch
from torch import nn

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingTensors:
    """The sampling parameters of B sequences, one row each, on the logits' device.

    temperature: float32 [B]; 0 is greedy.
    seed: int64 [B]; step: int64 [B], how many tokens the sequence has produced so far.
    top_k: int64 [B] (V where unrestricted); top_p: float32 [B] (infinity where unrestricted, for a
    cumulative sum can round up to 1); min_p: float32 [B] (0 where unrestricted).
    A field that no row needs is ``None``, which skips its work; with ``temperature`` None all rows
    are greedy.
    """

    temperature: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    step: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None


def mix32(h: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby 2011), on int64 tensors that hold uint32 values."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & _MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _MASK
    return h ^ (h >> 16)


def gumbel_noise(seed: torch.Tensor, step: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise for every token: seed, step int64 [B] -> float32 [B, V]."""
    first = mix32((seed & _MASK) ^ 0x9E3779B9)
    first = mix32((first + (step & _MASK)) & _MASK)
    second = mix32((first ^ ((seed >> 32) & _MASK) ^ 0x85157AF5) & _MASK)
    token = torch.arange(vocab_size, device=seed.device)
    h = mix32((token + first[:, None]) & _MASK)
    h = mix32(h ^ second[:, None])
    # 23 bits and a half: never 0 and never 1 in float32, so both logarithms stay finite.
    uniform = ((h >> 9).float() + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


def keep_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Drop tokens less likely than ``min_p`` times the likeliest (Nguyen et al. 2024).

    logits: [B, V]; min_p: [B]. Returns logits with the dropped ones at -inf.
    """
    threshold = logits.amax(dim=-1, keepdim=True) + min_p.log()[:, None]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_k_top_p(
    logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> torch.Tensor:
    """Keep the ``top_k`` likeliest tokens, and of those the nucleus of mass ``top_p``.

    logits: [B, V]; top_k: int64 [B]; top_p: [B] (Holtzman et al. 2019: the smallest set of the
    likeliest tokens whose probabilities add up to at least ``top_p``; never empty).
    Returns logits with the dropped ones at -inf.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    if top_k is not None:
        ordered = ordered.masked_fill(rank >= top_k[:, None], float("-inf"))
    if top_p is not None:
        probability = ordered.softmax(dim=-1)
        mass_before = probability.cumsum(dim=-1) - probability
        outside = (mass_before >= top_p[:, None]) & (rank > 0)
        ordered = ordered.masked_fill(outside, float("-inf"))
    return torch.empty_like(ordered).scatter_(-1, order, ordered)


class Sampler(nn.Module):
    """Picks one token a row: logits [B, V] -> token ids int64 [B]."""

    def forward(self, logits: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
        """logits: [B, V] -> token ids int64 [B].

        A row of temperature 0 takes its likeliest token. Any other divides its logits, in float32,
        by its temperature, then drops what min_p, then what top_k and top_p drop, and draws.
        """
        if params.temperature is None:
            return logits.argmax(dim=-1)
        assert params.seed is not None and params.step is not None
        greedy = params.temperature == 0
        temperature = params.temperature.masked_fill(greedy, 1.0)[:, None]
        scaled = logits.float() / temperature
        if params.min_p is not None:
            scaled = keep_min_p(scaled, params.min_p)
        if params.top_k is not None or params.top_p is not None:
            scaled = keep_top_k_top_p(scaled, params.top_k, params.top_p)
        noise = gumbel_noise(params.seed, params.step, logits.shape[-1])
        # A greedy row goes by its untouched logits: no rounding of ours may reorder a tie.
        return torch.where(greedy, logits.argmax(dim=-1), (scaled + noise).argmax(dim=-1))


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The log-probabilities of the chosen and of the ``count`` likeliest tokens.

    logits: [B, V]; token_ids: [B]. Returns ids int64 [B, 1 + count], log-probabilities float32
    [B, 1 + count] and the chosen tokens' ranks int64 [B] (1 is the likeliest). The first column is
    the chosen token.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = token_ids[:, None]
    chosen_logprob = logprobs.gather(-1, chosen)
    rank = (logprobs > chosen_logprob).sum(dim=-1) + 1
    top = logprobs.topk(min(count, logits.shape[-1]), dim=-1)
    ids = torch.cat((chosen, top.indices), dim=-1)
    return ids, torch.cat((chosen_logprob, top.values), dim=-1), rank
