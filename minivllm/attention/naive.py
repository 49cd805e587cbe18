"""Attention as the paper writes it (Vaswani et al. 2017), and a contiguous KV cache.

The whole score matrix is built: O(T^2) memory, but every number can be looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minivllm.models.config import ModelConfig
from minivllm.models.generate import check_request


def causal_mask(
    num_queries: int, context_len: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Which key each query may see: bool [num_queries, context_len].

    The queries are the last ``num_queries`` of ``context_len`` tokens, so query i stands at
    position ``context_len - num_queries + i`` and sees the keys up to itself.
    """
    key = torch.arange(context_len, device=device)
    position = torch.arange(context_len - num_queries, context_len, device=device)
    return key <= position[:, None]


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal grouped-query attention of one sequence, scores and all.

    q: [Q, H, D], the queries of the last Q of L tokens; k, v: [L, G, D], H a multiple of G; query
    head h reads key head h // (H / G) (Ainslie et al. 2023). Returns [Q, H, D].

    Raises ValueError naming both numbers for what does not fit: "q has 4 heads, no multiple of the
    3 of k and v", or "q has 5 tokens but k and v only 3".
    """
    num_queries, num_heads, _ = q.shape
    context_len, num_kv_heads, _ = k.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, no multiple of the {num_kv_heads} of k and v")
    if num_queries > context_len:
        raise ValueError(f"q has {num_queries} tokens but k and v only {context_len}")
    group = num_heads // num_kv_heads
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,lhd->hql", q, k).float() * scale
    mask = causal_mask(num_queries, context_len, q.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hql,lhd->qhd", weights.to(v.dtype), v)


class NaiveAttention:
    """``attend`` for sequences laid end to end, without a cache.

    cu_seqlens: the boundaries, [0, end of the first, end of the second, ...], B + 1 numbers.
    scale: what the scores are multiplied by, D ** -0.5.
    """

    def __init__(self, cu_seqlens: Sequence[int], scale: float) -> None:
        self.cu_seqlens = list(cu_seqlens)
        self.scale = scale

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q: [T, H, D]; k, v: [T, G, D]. No token sees another sequence's. Returns [T, H, D]."""
        spans = zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)
        return torch.cat([naive_attention(q[a:b], k[a:b], v[a:b], self.scale) for a, b in spans])


class ContiguousKVCache:
    """One row of ``max_len`` tokens for each sequence, reserved whether they come or not.

    k, v: [layers, rows, max_len, G, D].
    """

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (config.num_layers, num_rows, max_len, config.num_kv_heads, config.head_size)
        self.max_len = max_len
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """What the cache takes, full or empty."""
        return 2 * self.k.numel() * self.k.element_size()

    def store(
        self, layer: int, row: int, start: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k, v [Q, G, D] at position ``start`` of ``row``.

        Returns views of all that the row now holds, [start + Q, G, D] each. Raises ValueError if
        the row is too short, as in "the sequence grew to 9 tokens but the cache was built with
        max_len=8".
        """
        end = start + len(k)
        if end > self.max_len:
            raise ValueError(
                f"the sequence grew to {end} tokens but the cache was built with "
                f"max_len={self.max_len}; build it larger"
            )
        self.k[layer, row, start:end] = k
        self.v[layer, row, start:end] = v
        return self.k[layer, row, :end], self.v[layer, row, :end]


@dataclass(frozen=True)
class CachedNaiveAttention:
    """``attend`` for new tokens of B sequences whose earlier K and V lie in a contiguous cache.

    rows: the cache row of each sequence; starts: how many tokens each already has there;
    cu_query_lens: the boundaries of their new tokens, B + 1 numbers.
    """

    cache: ContiguousKVCache
    rows: Sequence[int]
    starts: Sequence[int]
    cu_query_lens: Sequence[int]
    scale: float

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q: [T, H, D]; k, v: [T, G, D]. Stores k and v, then attends. Returns [T, H, D]."""
        out = []
        for index, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            a, b = self.cu_query_lens[index], self.cu_query_lens[index + 1]
            keys, values = self.cache.store(layer, row, start, k[a:b], v[a:b])
            out.append(naive_attention(q[a:b], keys, values, self.scale))
        return torch.cat(out)


@torch.inference_mode()
def generate_with_cache(
    model: nn.Module, prompt_token_ids: list[int], max_tokens: int
) -> Iterator[int]:
    """Yield greedy tokens one by one: one prefill of the prompt, then one token a step.

    Stops after ``max_tokens`` or after an end token of the model, which is yielded too. Raises
    ValueError, when the first token is asked for, if :func:`check_request` does.
    """
    config = model.config
    check_request(config, prompt_token_ids, max_tokens)
    weight = model.lm_head.weight
    cache = ContiguousKVCache(
        config, 1, len(prompt_token_ids) + max_tokens, dtype=weight.dtype, device=weight.device
    )
    new, start = list(prompt_token_ids), 0
    for _ in range(max_tokens):
        attend = CachedNaiveAttention(cache, [0], [start], [0, len(new)], config.head_size**-0.5)
        input_ids = torch.tensor(new, device=weight.device)
        positions = torch.arange(start, start + len(new), device=weight.device)
        hidden = model(input_ids, positions, attend)
        token = int(model.compute_logits(hidden[-1:]).argmax())
        yield token
        if token in config.eos_token_ids:
            return
        start += len(new)
        new = [token]
