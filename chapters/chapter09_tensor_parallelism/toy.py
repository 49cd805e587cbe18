"""The toy of chapter 9: an MLP, a vocabulary and one row of logits, shared out to two ranks.

    hidden = relu(up @ x)      out = down @ hidden + bias

Everything is computed by the package's own parallel layers; only the numbers are ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from chapters.chapter09_tensor_parallelism.threads import Meeting, ThreadGroup, on_ranks
from minivllm.distributed.parallel_layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabularyParallelEmbedding,
)
from minivllm.distributed.sampling import Vocabulary
from minivllm.layers.checkpoint import CheckpointSource
from minivllm.layers.embedding import Embedding
from minivllm.layers.linear import Linear, MergedLinear
from minivllm.layers.sampler import SamplingTensors

FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
X = torch.tensor([1.0, 2.0])
UP = torch.tensor([[3.0, -1.0], [0.0, -1.0], [1.0, 1.0], [2.0, 1.0]])
DOWN = torch.tensor([[1.0, 2.0, 0.0, 2.0], [3.0, 1.0, 1.0, 0.0]])
BIAS = torch.tensor([10.0, 20.0])
VOCAB_SIZE = 5
# The vector of token t is [t, 10 t].
TABLE = torch.stack((torch.arange(5.0), 10 * torch.arange(5.0)), dim=1)
LOGITS = torch.tensor([1.0, 4.0, 0.0, 2.0, 5.5])

CHECKPOINT = {
    "mlp.up.weight": UP,
    "mlp.down.weight": DOWN,
    "mlp.down.bias": BIAS,
    "embed.weight": TABLE,
}


@dataclass(frozen=True)
class Mlp:
    """What one rank has of the MLP: weights up [F / P, E] and down [E, F / P]."""

    up: ColumnParallelLinear
    down: RowParallelLinear


@dataclass(frozen=True)
class Pass:
    """One rank's pass. hidden: [F / P]; summand, out: [E], before and after the ranks met."""

    hidden: list[float]
    summand: list[float]
    out: list[float]


def load(sources: Iterable[CheckpointSource]) -> None:
    """What the loader of chapter 2 does, from :data:`CHECKPOINT` instead of a file."""
    for source in sources:
        tensor = CHECKPOINT[source.name]
        assert source.shape == tuple(tensor.shape), (
            f"{source.name} is {list(tensor.shape)} in the checkpoint, not {list(source.shape)}"
        )
        source.target.copy_(tensor[source.index or ...])


def mlp_of(group: ThreadGroup, *, bias: bool = False, filled: bool = True) -> Mlp:
    """This rank's share of the MLP, filled by the layers' own word of what belongs there."""
    share = len(UP) // group.size
    up = MergedLinear(UP.shape[1], {"up": share}, **FLOAT)
    down = Linear(share, len(DOWN), bias=bias, **FLOAT)
    mlp = Mlp(ColumnParallelLinear(up, group), RowParallelLinear(down, group))
    if filled:
        load(mlp.up.checkpoint_sources("mlp.up"))
        load(mlp.down.checkpoint_sources("mlp.down"))
    return mlp


def by_hand(mlp: Mlp, rank: int, size: int) -> Mlp:
    """Fill a rank's MLP without its help: rows of up, columns of down, the whole bias."""
    share = len(UP) // size
    part = slice(rank * share, (rank + 1) * share)
    mlp.up.weight.copy_(UP[part])
    mlp.down.weight.copy_(DOWN[:, part])
    if mlp.down.bias is not None:
        mlp.down.bias.copy_(BIAS)
    return mlp


def run(mlp: Mlp, x: torch.Tensor = X) -> Pass:
    """The MLP on ``x`` [E]."""
    hidden = torch.relu(mlp.up(x))
    summand = mlp.down.weight @ hidden
    return Pass(hidden.tolist(), summand.tolist(), mlp.down(hidden).tolist())


def run_mlp(size: int, *, bias: bool = False) -> tuple[list[Pass], Meeting]:
    """Every rank's pass."""
    return on_ranks(size, lambda group: run(mlp_of(group, bias=bias)))


def owned_by(rank: int, size: int) -> range:
    """The tokens of a rank: shares are rounded up, so the last one's may be shorter."""
    count = -(-VOCAB_SIZE // size)
    return range(rank * count, min((rank + 1) * count, VOCAB_SIZE))


def embedding_of(group: ThreadGroup, unused: float = 0.0) -> VocabularyParallelEmbedding:
    """This rank's rows of the table; rows behind them hold ``unused``."""
    owned = owned_by(group.rank, group.size)
    share = Embedding(-(-VOCAB_SIZE // group.size), TABLE.shape[1], **FLOAT)
    embedding = VocabularyParallelEmbedding(share, group, owned, VOCAB_SIZE)
    embedding.weight.fill_(unused)
    embedding.weight[: len(owned)] = TABLE[owned.start : owned.stop]
    return embedding


def embed(size: int, token_ids: list[int]) -> tuple[list[list[list[float]]], Meeting]:
    """Every rank's vectors [T, E] of the tokens, when all have met."""
    ids = torch.tensor(token_ids)
    return on_ranks(size, lambda group: embedding_of(group)(ids).tolist())


@dataclass(frozen=True)
class Choice:
    """One rank's choice. score, token: the best of its own; chosen: the best of all."""

    score: float
    token: int
    chosen: int


GREEDY = SamplingTensors(
    temperature=torch.zeros(1),
    seed=torch.zeros(1, dtype=torch.int64),
    step=torch.zeros(1, dtype=torch.int64),
)


def choose(
    size: int, logits: torch.Tensor = LOGITS, draw: SamplingTensors = GREEDY
) -> tuple[list[Choice], Meeting]:
    """Every rank's choice from one row of logits [V], of which it has its own tokens' alone."""

    def work(group: ThreadGroup) -> Choice:
        owned = owned_by(group.rank, group.size)
        vocabulary = Vocabulary(owned, VOCAB_SIZE, group)
        mine = logits[None, owned.start : owned.stop]
        score, token = vocabulary.find_best(mine, draw)
        tokens = torch.empty(1, dtype=torch.int64)
        vocabulary.sample(mine, draw, tokens, vocabulary.find_best)
        return Choice(float(score), int(token), int(tokens))

    return on_ranks(size, work)
