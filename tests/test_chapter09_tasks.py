"""Chapter 9's exercises: what a rank has, what it computes, and what it says to the others.

The ranks are threads of this process, see chapters/chapter09_tensor_parallelism/threads.py.
"""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from chapters.chapter09_tensor_parallelism import toy
from chapters.chapter09_tensor_parallelism.threads import Meeting, ThreadGroup, on_ranks
from minivllm.distributed.channel import MOST_BYTES, PONG, STEP, Link
from minivllm.distributed.parallel_layers import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    share_of,
)
from minivllm.distributed.sampling import Vocabulary
from minivllm.layers.linear import Linear, MergedLinear, QKVLinear
from minivllm.layers.sampler import Sampler, SamplingTensors
from minivllm.models.config import ModelConfig

FLOAT = toy.FLOAT
# Qwen3-8B's numbers.
MODEL = ModelConfig.from_hf(
    {
        **{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 4096},
        **{"intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 64},
        **{"tie_word_embeddings": False},
    }
)


def group_of(rank: int, size: int) -> ThreadGroup:
    """A rank that never has to speak."""
    return ThreadGroup(Meeting(size), rank)


# ------------------------------------------------------------------ 9.1: what a rank's model is


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_share_has_its_part_of_heads_mlp_and_vocabulary(size: int) -> None:
    share = share_of(MODEL, size)
    assert share.num_heads == 32 // size, "query heads are divided"
    assert share.num_kv_heads == 8 // size, "KV heads are divided, if there are enough"
    assert share.intermediate_size == 12288 // size, "the MLP's inner size is divided"
    assert share.vocab_size == 151936 // size, "the vocabulary is divided"


def test_a_share_keeps_what_every_rank_needs_whole() -> None:
    share = share_of(MODEL, 4)
    divided = {name: getattr(MODEL, name) for name in ("num_heads", "num_kv_heads")}
    divided |= {name: getattr(MODEL, name) for name in ("intermediate_size", "vocab_size")}
    assert replace(share, **divided) == MODEL, "E, D and the number of layers stay as they are"


def test_every_rank_has_a_kv_head() -> None:
    assert share_of(MODEL, 16).num_kv_heads == 1, "8 KV heads on 16 ranks: one each, not none"
    assert share_of(MODEL, 16).num_heads == 2


def test_a_share_of_the_vocabulary_is_rounded_up() -> None:
    odd = replace(MODEL, vocab_size=151937)
    assert share_of(odd, 2).vocab_size == 75969, "75,968 each would leave a token to nobody"


# ------------------------------------------------------------------ 9.2: which slice of what


@pytest.mark.parametrize("size", [1, 2, 4])
def test_columns_first(size: int) -> None:
    """Some of the outputs: rows of the checkpoint's [out, in]."""
    for rank in range(size):
        mlp = toy.mlp_of(group_of(rank, size), filled=False)
        toy.load(mlp.up.checkpoint_sources("mlp.up"))
        expected = toy.UP.chunk(size)[rank].tolist()
        assert mlp.up.weight.tolist() == expected, f"up's rows of rank {rank} of {size}"


def test_of_two_fused_matrices_each_is_cut_by_itself() -> None:
    share = MergedLinear(3, {"gate_proj": 2, "up_proj": 2}, **FLOAT)
    layer = ColumnParallelLinear(share, group_of(1, 2))
    gate, up = layer.checkpoint_sources("mlp.gate_up_proj")
    assert (gate.name, up.name) == ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    assert gate.shape == up.shape == (4, 3), "shape is that of the whole tensor"
    rows = torch.arange(4.0)[:, None].expand(4, 3)
    gate.target.copy_(rows[gate.index])
    up.target.copy_(10 * rows[up.index])
    assert layer.weight[:, 0].tolist() == [2, 3, 20, 30]


def test_biases_are_cut_like_the_rows_they_belong_to() -> None:
    share = QKVLinear(3, 2, 1, 2, bias=True, **FLOAT)
    layer = QKVParallelLinear(share, group_of(1, 2), 2)
    sources = {source.name: source for source in layer.checkpoint_sources("attn.qkv_proj")}
    for part, count in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        bias = sources[f"attn.{part}.bias"]
        assert bias.shape == (count,), f"{part}.bias of the checkpoint is [{count}]"
        bias.target.copy_(torch.arange(float(count))[bias.index])
    assert layer.bias is not None
    assert layer.bias.tolist() == [4, 5, 6, 7, 2, 3, 2, 3], "the second half of each part's bias"


@pytest.mark.parametrize(
    ("kv_heads", "size", "kv_of_ranks"),
    [
        (4, 2, [[0, 1], [2, 3]]),
        (2, 2, [[0], [1]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 4, [[0], [0], [0], [0]]),
    ],
)
def test_a_rank_has_the_kv_heads_of_its_query_heads(
    kv_heads: int, size: int, kv_of_ranks: list[list[int]]
) -> None:
    heads, head_size, hidden = 4, 2, 3

    def tensor(count: int) -> torch.Tensor:
        # Every number of a head is the head's.
        return torch.arange(float(count)).repeat_interleave(head_size)[:, None].expand(-1, hidden)

    for rank in range(size):
        own, own_kv = heads // size, max(1, kv_heads // size)
        share = QKVLinear(hidden, own, own_kv, head_size, **FLOAT)
        layer = QKVParallelLinear(share, group_of(rank, size), kv_heads)
        for source in layer.checkpoint_sources("attn.qkv_proj"):
            count = heads if "q_proj" in source.name else kv_heads
            assert source.shape == (count * head_size, hidden), (
                f"{size} ranks, {kv_heads} KV heads: {source.name} of the checkpoint is "
                f"{[count * head_size, hidden]}, not {list(source.shape)}"
            )
            source.target.copy_(tensor(count)[source.index])
        q, k, v = layer.split(layer.weight.sum(dim=1)[None] / hidden)
        queries = list(range(rank * own, (rank + 1) * own))
        assert q[0, :, 0].tolist() == queries, f"query heads of rank {rank}"
        found = [k[0, :, 0].int().tolist(), v[0, :, 0].int().tolist()]
        wanted = kv_of_ranks[rank]
        assert found == [wanted, wanted], (
            f"{size} ranks, {kv_heads} KV heads: rank {rank} has queries {queries}, "
            f"which look at KV heads {wanted}; its k and v are of {found[0]} and {found[1]}"
        )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_later(size: int) -> None:
    """Some of the inputs: columns of the checkpoint's [out, in]; the bias is everybody's."""
    for rank in range(size):
        mlp = toy.mlp_of(group_of(rank, size), bias=True, filled=False)
        toy.load(mlp.down.checkpoint_sources("mlp.down"))
        expected = toy.DOWN.chunk(size, dim=1)[rank].tolist()
        assert mlp.down.weight.tolist() == expected, f"down's columns of rank {rank} of {size}"
        assert mlp.down.bias is not None and mlp.down.bias.tolist() == toy.BIAS.tolist()


# ------------------------------------------------------------------ 9.3: adding up


def mlp_out(size: int, *, bias: bool) -> tuple[list[list[float]], Meeting]:
    def work(group: ThreadGroup) -> list[float]:
        empty = toy.mlp_of(group, bias=bias, filled=False)
        return toy.run(toy.by_hand(empty, group.rank, size)).out

    return on_ranks(size, work)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_summands_add_up(size: int) -> None:
    every, meeting = mlp_out(size, bias=False)
    assert every == [[9, 6]] * size, "the toy's out is [9, 6], on every rank"
    assert [word.kind for word in meeting.words] == ["all_reduce"], "one exchange, at the end"


def test_the_bias_is_added_once() -> None:
    for size in (1, 2, 4):
        every, _ = mlp_out(size, bias=True)
        assert every == [[19, 26]] * size, f"[9, 6] and the bias [10, 20], on {size} ranks"


def test_many_tokens_at_once() -> None:
    xs = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

    def work(group: ThreadGroup) -> torch.Tensor:
        layer = RowParallelLinear(Linear(2, 3, **FLOAT), group)
        part = slice(2 * group.rank, 2 * group.rank + 2)
        layer.weight.copy_(weight[:, part])
        return layer(xs[..., part].contiguous())

    for out in on_ranks(2, work)[0]:
        assert torch.allclose(out, xs @ weight.T, atol=1e-5), "[2, 5, 4] -> [2, 5, 3]"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_vector_comes_from_its_owner(size: int) -> None:
    every, meeting = toy.embed(size, [0, 4, 3, 3, 1, 2])
    assert every == [toy.TABLE[[0, 4, 3, 3, 1, 2]].tolist()] * size
    assert len(meeting.words) == 1


def test_a_rank_that_owns_none_of_the_tokens_speaks_all_the_same() -> None:
    for token in range(toy.VOCAB_SIZE):
        every, meeting = toy.embed(2, [token])
        assert every == [[toy.TABLE[token].tolist()]] * 2
        assert len(meeting.words) == 1, "the others wait for everybody's word"


def test_what_is_looked_up_for_others_does_not_count() -> None:
    """A rank may look anywhere for a token that is not its own; what it finds may be anything."""

    def work(group: ThreadGroup) -> list[list[float]]:
        embedding = toy.embedding_of(group, unused=float("nan"))
        if group.rank == 1:
            embedding.weight[0] = float("inf")
        return embedding(torch.tensor([0, 1, 2, 4])).tolist()

    for vectors in on_ranks(2, work)[0]:
        assert vectors == toy.TABLE[[0, 1, 2, 4]].tolist(), (
            "what a rank finds for a token that is not its own (here inf and NaN) must not count"
        )


# ------------------------------------------------------------------ 9.4: a token of all ranks


def draws(rows: int) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.tensor([0.0, 0.7, 1.3] * rows)[:rows],
        seed=torch.arange(rows) * 977 + (1 << 40),
        step=torch.arange(rows) % 5,
    )


def vocabulary_of(rank: int, size: int, count: int) -> Vocabulary:
    share = -(-count // size)
    return Vocabulary(
        range(rank * share, min((rank + 1) * share, count)), count, group_of(rank, size)
    )


def test_find_best_names_tokens_as_all_ranks_do() -> None:
    score, token = vocabulary_of(1, 2, 5).find_best(toy.LOGITS[None, 3:], toy.GREEDY)
    assert token.tolist() == [4], "row 1 of this rank's share is token 4 of the vocabulary"
    assert score.tolist() == [5.5] and score.dtype == torch.float32
    score, token = vocabulary_of(0, 2, 5).find_best(toy.LOGITS[None, :3], toy.GREEDY)
    assert (score.tolist(), token.tolist()) == ([4.0], [1])


def test_find_best_draws_with_the_noise_of_its_own_tokens() -> None:
    """The best of the two ranks' bests is what one rank draws; and ranks differ in their noise."""
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    params = draws(200)
    found = [
        vocabulary_of(rank, 2, 8).find_best(logits[:, 4 * rank : 4 * rank + 4], params)
        for rank in (0, 1)
    ]
    first = found[0][0] >= found[1][0]
    chosen = torch.where(first, found[0][1], found[1][1])
    expected = Sampler()(logits, params)
    wrong = (chosen != expected).nonzero()[:, 0].tolist()
    assert not wrong, (
        f"{len(wrong)} of 200 rows draw another token than on one rank, such as row {wrong[0]}: "
        f"temperature {params.temperature[wrong[0]]:.1f}"
    )


def sampled(logits: torch.Tensor, size: int) -> tuple[list[list[int]], Meeting]:
    """Every rank's tokens when each finds the best of its logits by hand."""

    def work(group: ThreadGroup) -> list[int]:
        vocabulary = replace(vocabulary_of(group.rank, size, logits.shape[1]), group=group)
        first, end = vocabulary.owned.start, vocabulary.owned.stop
        # As on a GPU: rows of the same length on every rank, with anything behind the last token.
        share = torch.full((len(logits), -(-logits.shape[1] // size)), float("nan"))
        share[:, : end - first] = logits[:, first:end]

        def best(mine: torch.Tensor, _: object) -> tuple[torch.Tensor, torch.Tensor]:
            assert mine.shape[1] == end - first, (
                "best got columns behind this rank's tokens: sample must cut them off before"
            )
            score, token = mine.max(dim=-1)
            return score, token + first

        tokens = torch.full((len(logits),), -1)
        vocabulary.sample(share, toy.GREEDY, tokens, best)
        return tokens.tolist()

    return on_ranks(size, work)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_best_of_all_shares_is_chosen_on_every_rank(size: int) -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(2))
    every, _ = sampled(logits, size)
    assert every == [logits.argmax(dim=-1).tolist()] * size


def test_eight_bytes_a_sequence_travel() -> None:
    _, meeting = sampled(torch.randn(20, 7, generator=torch.Generator().manual_seed(2)), 2)
    (word,) = meeting.words
    assert (word.kind, word.nbytes) == ("all_gather", 20 * 8), "a score and a token, float32 each"


def test_of_equal_scores_the_lowest_token_is_chosen() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    every, _ = sampled(logits, 2)
    assert every == [[1, 0]] * 2, "as argmax chooses on one rank"


# ------------------------------------------------------------------ 9.5: frames


class Pipe:
    """A socket that hands over ``data`` in pieces of at most ``most`` bytes, and then the end."""

    def __init__(self, data: bytes, most: int) -> None:
        self.data, self.most = data, most
        self.sent = bytearray()

    def setsockopt(self, *arguments: object) -> None:
        pass

    def recv(self, count: int) -> bytes:
        assert count > 0, "recv(0) gives nothing, which looks like the end"
        piece, self.data = self.data[: min(count, self.most)], self.data[min(count, self.most) :]
        return piece

    def sendall(self, data: bytes) -> None:
        self.sent += data


FRAMES = [(STEP, b'{"places":[0,1,2]}'), (PONG, b""), (STEP, bytes(range(256)) * 9)]


def stream() -> bytes:
    pipe = Pipe(b"", 1)
    for kind, payload in FRAMES:
        Link(pipe).send(kind, payload)  # type: ignore[arg-type]
    return bytes(pipe.sent)


@pytest.mark.parametrize("most", [1, 3, 1000, 1 << 20])
def test_frames_come_in_pieces(most: int) -> None:
    link = Link(Pipe(stream(), most))  # type: ignore[arg-type]
    for number, (kind, payload) in enumerate(FRAMES):
        received = link.receive()
        assert received is not None, (
            f"frame {number}, with a payload of {len(payload)} bytes, is not the end"
        )
        assert received == (kind, payload), (
            f"frame {number}, of {len(payload)} bytes, by a recv that gave at most {most} at a time"
        )
    assert link.receive() is None, "the other end is gone"


def test_a_frame_that_breaks_off_is_the_end() -> None:
    data, ends = stream(), list(accumulate(5 + len(payload) for _, payload in FRAMES))
    for cut in range(ends[1] + 40):
        link = Link(Pipe(data[:cut], 7))  # type: ignore[arg-type]
        whole = sum(end <= cut for end in ends)
        assert [link.receive() for _ in range(whole)] == FRAMES[:whole]
        assert link.receive() is None, f"only {cut} of {len(data)} bytes came"


def test_what_is_too_long_did_not_come_from_us() -> None:
    head = (MOST_BYTES + 1).to_bytes(4, "big") + STEP
    assert Link(Pipe(head + bytes(100), 50)).receive() is None  # type: ignore[arg-type]


def test_a_reset_is_the_end() -> None:
    class Reset(Pipe):
        def recv(self, count: int) -> bytes:
            if not self.data:
                raise ConnectionResetError
            return super().recv(count)

    assert Link(Reset(stream()[:3], 2)).receive() is None  # type: ignore[arg-type]
