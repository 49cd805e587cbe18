"""Layers that hold one rank's share of their weights (Shoeybi et al. 2019, "Megatron-LM").

    rank 0    x ->  q k v of heads 0, 1  -> attention -> o, columns of heads 0, 1 \\
                                                                                  + -> x
    rank 1    x ->  q k v of heads 2, 3  -> attention -> o, columns of heads 2, 3 /

A column-parallel layer computes some of the outputs from the whole input; a row-parallel layer
takes those as some of its inputs and computes a summand of the whole output. So a pair of them,
qkv and o or gate-up and down, needs no word between the ranks but the sum at its end: two
all-reduces a layer. The embedding adds a third kind, with one all-reduce for the whole model.

A rank's model is the finished model of :func:`share_of` the config, whose layers
:func:`shard_model` replaces, from outside, by their kin from here. Those compute on the same
parameters, but know which slice of a checkpoint belongs there and when to add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from minivllm.distributed.group import Group
from minivllm.layers.checkpoint import CheckpointSource
from minivllm.layers.embedding import Embedding, LMHead
from minivllm.layers.linear import Linear, MergedLinear, QKVLinear
from minivllm.models.config import ModelConfig


def share_of(config: ModelConfig, size: int) -> ModelConfig:
    """The config of one rank's model: its H, G, F and V, everything else as it is.

    Where there are fewer KV heads than ranks, each is computed and cached by several. Shares of the
    vocabulary are rounded up: the last rank's ends with rows that nobody uses.
    Raises ValueError if the model cannot be shared out to ``size`` ranks.
    """
    asked = f"tensor_parallel_size={size}"
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise ValueError(
                f"{asked} does not divide the model's {name}={getattr(config, name)}; choose a "
                "number of ranks that does"
            )
    if max(config.num_kv_heads, size) % min(config.num_kv_heads, size):
        raise ValueError(
            f"{asked} and the model's num_kv_heads={config.num_kv_heads}: one must divide the "
            "other, so that every rank holds whole KV heads; choose another number of ranks"
        )
    vocab_size = -(-config.vocab_size // size)
    if vocab_size * (size - 1) >= config.vocab_size:
        raise ValueError(
            f"{asked} leaves the last rank nothing of the model's vocab_size="
            f"{config.vocab_size}; choose fewer ranks"
        )
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=max(1, config.num_kv_heads // size),
        intermediate_size=config.intermediate_size // size,
        vocab_size=vocab_size,
    )


def vocabulary_of(whole: ModelConfig, rank: int, size: int) -> range:
    """The tokens whose embeddings and scores ``rank`` owns."""
    count = -(-whole.vocab_size // size)
    return range(rank * count, min((rank + 1) * count, whole.vocab_size))


class ColumnParallelLinear(MergedLinear):
    """This rank's rows of several weights over one input: [..., E] -> [..., share of the parts].

    share: the layer of this rank's sizes, whose parameters it takes over.
    """

    def __init__(self, share: MergedLinear, group: Group) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = share.in_features, share.out_features
        self.weight, self.bias, self.parts = share.weight, share.bias, share.parts
        self.rank, self.size = group.rank, group.size

    def place_of(self, part: str) -> tuple[int, int]:
        """Which of how many shares of ``part`` this rank holds."""
        return self.rank, self.size

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        for source in super().checkpoint_sources(prefix):
            # "...gate_proj.weight" is of the part "gate_proj".
            index, shares = self.place_of(source.name.split(".")[-2])
            rows = source.shape[0]
            yield source._replace(
                shape=(rows * shares, *source.shape[1:]),
                index=(slice(index * rows, (index + 1) * rows),),
            )


class QKVParallelLinear(ColumnParallelLinear, QKVLinear):
    """This rank's heads: [T, E] -> [T, (H + 2 * G) * D], with its own H and G.

    whole_kv_heads: the model's. Rank r of P has query heads from r * H / P on, and the KV heads
    that those attend to.
    """

    def __init__(self, share: QKVLinear, group: Group, whole_kv_heads: int) -> None:
        super().__init__(share, group)
        self.num_heads, self.num_kv_heads = share.num_heads, share.num_kv_heads
        self.head_size = share.head_size
        self.whole_kv_heads = whole_kv_heads

    def place_of(self, part: str) -> tuple[int, int]:
        if part == "q_proj" or self.whole_kv_heads >= self.size:
            return self.rank, self.size
        copies = self.size // self.whole_kv_heads
        return self.rank // copies, self.whole_kv_heads


class RowParallelLinear(Linear):
    """This rank's columns of a weight: [..., its share of the inputs] -> [..., all outputs].

    The sum over the ranks is made here, and the bias, which all of them hold, is added once to it.
    """

    def __init__(self, share: Linear, group: Group) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = share.in_features, share.out_features
        self.weight, self.bias = share.weight, share.bias
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.group.all_reduce(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        for source in super().checkpoint_sources(prefix):
            if len(source.shape) == 1:
                yield source
                continue
            rows, columns = source.shape
            first = self.group.rank * columns
            yield source._replace(
                shape=(rows, columns * self.group.size),
                index=(slice(None), slice(first, first + columns)),
            )


class VocabularyParallelEmbedding(Embedding):
    """The vectors of the tokens ``owned``; the others' come from their ranks: [T] -> [T, E]."""

    def __init__(self, share: Embedding, group: Group, owned: range, vocab_size: int) -> None:
        nn.Module.__init__(self)
        self.weight = share.weight
        self.group = group
        self.owned = owned
        self.vocab_size = vocab_size

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [T] integers below V -> [T, E]; all but one of the summands are zeros."""
        mine = (input_ids >= self.owned.start) & (input_ids < self.owned.stop)
        vectors = F.embedding((input_ids - self.owned.start) * mine, self.weight)
        # Not times the mask: rows that are not in use hold anything, NaN included.
        return self.group.all_reduce(vectors.masked_fill_(~mine[:, None], 0))

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        yield owned_rows(f"{prefix}.weight", self.weight, self.owned, self.vocab_size)


class VocabularyParallelHead(LMHead):
    """Scores the tokens ``owned``: [T, E] -> logits [T, V / P], which stay where they are."""

    def __init__(self, share: LMHead, owned: range, vocab_size: int) -> None:
        nn.Module.__init__(self)
        self.tied, self.weight = share.tied, share.weight
        self.owned = owned
        self.vocab_size = vocab_size

    def checkpoint_sources(self, prefix: str) -> Iterator[CheckpointSource]:
        if not self.tied:
            yield owned_rows(f"{prefix}.weight", self.weight, self.owned, self.vocab_size)


def owned_rows(name: str, weight: torch.Tensor, owned: range, vocab_size: int) -> CheckpointSource:
    """The rows ``owned`` of a table of the whole vocabulary [V, E], to the top of ``weight``."""
    return CheckpointSource(
        name,
        (vocab_size, weight.shape[1]),
        weight[: len(owned)],
        (slice(owned.start, owned.stop),),
    )


def shard_model(model: nn.Module, whole: ModelConfig, group: Group) -> nn.Module:
    """Replace the layers of a finished model by their parallel kin, before its weights load.

    model: Qwen3ForCausalLM or LlamaForCausalLM of :func:`share_of` ``whole``, on any device, "meta"
    too. Returns it.
    """
    assert model.config == share_of(whole, group.size), "build the model of share_of(whole, size)"
    owned = vocabulary_of(whole, group.rank, group.size)
    decoder = model.model
    decoder.embed_tokens = VocabularyParallelEmbedding(
        decoder.embed_tokens, group, owned, whole.vocab_size
    )
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv_proj = QKVParallelLinear(attention.qkv_proj, group, whole.num_kv_heads)
        attention.o_proj = RowParallelLinear(attention.o_proj, group)
        mlp.gate_up_proj = ColumnParallelLinear(mlp.gate_up_proj, group)
        mlp.down_proj = RowParallelLinear(mlp.down_proj, group)
    model.lm_head = VocabularyParallelHead(model.lm_head, owned, whole.vocab_size)
    return model
