"""Sums over ranks in one launch: the kernels, on ordinary memory that stands for the ranks' GPUs.

One process plays all ranks, one after the other. A rank that is alone would wait for the others, so
everybody makes each call twice: first with the word in the host's memory that says not to wait,
whereby all words are sent, and then once more for the result.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")
import triton.language as tl  # noqa: E402

from minivllm.distributed import one_shot, one_shot_kernels  # noqa: E402
from minivllm.distributed.exchange import Exchange  # noqa: E402
from minivllm.distributed.one_shot import OneShot  # noqa: E402
from minivllm.layers import layernorm  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter's bfloat16 is not to be trusted.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
WIDTH = 48
MOST_ROWS = 3


class Rank:
    """The group of a rank: all that is asked of it here is who it is."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a sum of this size goes the short way")


class Host:
    """All ranks of a host, and the memory that they share."""

    def __init__(
        self, size: int, dtype: torch.dtype = torch.float32, *, width: int = WIDTH
    ) -> None:
        self.stop = torch.ones(1, dtype=torch.int32, pin_memory=DEVICE.type == "cuda")
        self.ranks = [
            OneShot(
                Rank(rank, size),
                stop=self.stop,
                width=width,
                dtype=dtype,
                most_rows=MOST_ROWS,
                most_parts=2,
                most_sampled=40,
                device=DEVICE,
            )
            for rank in range(size)
        ]
        # What lies around a box must not be touched.
        self.edge = 64
        count = self.ranks[0].num_bytes + 2 * self.edge
        self.boxes = [torch.zeros(count, dtype=torch.uint8, device=DEVICE) for _ in range(size)]
        for shot in self.ranks:
            shot.bind([box.data_ptr() + self.edge for box in self.boxes])

    def together(self, call: Callable[[OneShot], Any]) -> list[Any]:
        """What ``call`` gives on every rank."""
        for shot in self.ranks:
            self.send(shot, call)
        results = [call(shot) for shot in self.ranks]
        for box in self.boxes:
            assert not box[: self.edge].any() and not box[-self.edge :].any()
        return results

    def send(self, shot: OneShot, call: Callable[[OneShot], Any]) -> None:
        """Make the call up to where one would wait."""
        epochs = {name: channel.epochs.clone() for name, channel in shot._channels.items()}
        call(shot)
        for name, channel in shot._channels.items():
            channel.epochs.copy_(epochs[name])


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the host's word at once: the interpreter takes its time."""
    if INTERPRETED:
        monkeypatch.setattr(one_shot_kernels, "LOOKS", tl.constexpr(1))


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def sum_of(every: list[torch.Tensor]) -> torch.Tensor:
    """The sum in float64."""
    return torch.stack([x.double() for x in every]).sum(dim=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_the_same_sum(size: int, dtype: torch.dtype) -> None:
    host = Host(size, dtype)
    for step, rows in enumerate((1, MOST_ROWS, 1, 2)):
        every = [random(rows, WIDTH, dtype=dtype, seed=10 * step + r) for r in range(size)]
        sums = host.together(lambda shot, every=every: shot.sum_rows(every[shot.group.rank]))
        for mine in sums:
            assert torch.equal(mine, sums[0]), "ranks must not differ by a bit"
        # One rounding of what is close to the exact sum: no rounding between the ranks.
        expected = sum_of(every)
        close = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(sums[0].double(), expected, rtol=close, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_and_norm_come_with_the_sum(dtype: torch.dtype) -> None:
    host = Host(3, dtype)
    norm = layernorm.RMSNorm(WIDTH, 1e-5, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        norm.weight.copy_(random(WIDTH, dtype=dtype, seed=1))
    every = [random(3, WIDTH, dtype=dtype, seed=2 + r) for r in range(3)]
    residual = random(3, WIDTH, dtype=dtype, seed=9)
    total = (residual.double() + sum_of(every)).to(dtype)
    expected = layernorm.rms_norm(total, norm.weight.detach(), norm.eps)
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    results = host.together(lambda shot: shot.add_norm(every[shot.group.rank], residual, norm))
    for normed, new_residual in results:
        torch.testing.assert_close(new_residual, total, rtol=close, atol=close)
        torch.testing.assert_close(normed, expected, rtol=close, atol=close)
        assert torch.equal(normed, results[0][0]) and torch.equal(new_residual, results[0][1])


def test_a_token_is_embedded_by_the_rank_that_owns_it() -> None:
    host = Host(3)
    table = random(20, WIDTH, dtype=torch.float32, seed=0)
    norm = layernorm.RMSNorm(WIDTH, 1e-5, dtype=torch.float32, device=DEVICE)

    class Part:
        def __init__(self, rank: int) -> None:
            self.owned = range(7 * rank, min(7 * rank + 7, 20))
            # Behind the last rank's vectors lies what must not be read.
            self.weight = torch.full((7, WIDTH), float("nan"), device=DEVICE)
            self.weight[: len(self.owned)] = table[self.owned.start : self.owned.stop]

    ids = torch.tensor([0, 19, 7], device=DEVICE)
    for with_norm in (None, norm):
        for normed, vectors in host.together(
            lambda shot, n=with_norm: shot.embed(Part(shot.group.rank), ids, n)
        ):
            assert torch.equal(vectors, table[ids])
            expected = vectors if with_norm is None else norm(vectors)
            torch.testing.assert_close(normed, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("parts", "rows", "width"), [(1, 1, 1024), (3, 1, 48), (2, 2, 1024), (1, 2, 896)]
)
def test_parts_come_with_residual_and_gain(
    parts: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    """Sums of one row and of more take turns, and do not read each other's words."""
    host = Host(3, dtype, width=width)
    gain = random(width, dtype=dtype, seed=1)
    for step, count in enumerate((rows, 3 - rows, rows)):
        residual = random(count, width, dtype=torch.float32, seed=90 + step)
        every = [
            random(parts, count, width, dtype=torch.float32, seed=5 * step + r) for r in range(3)
        ]

        def call(shot: OneShot, every: Any = every, residual: Any = residual) -> Any:
            total = torch.full_like(residual, float("nan"))
            out = torch.full_like(residual, float("nan"), dtype=dtype)
            mine = every[shot.group.rank]
            squares = shot.add_gain_of_parts(mine, residual, gain, total, out)
            return total, out, squares

        results = host.together(call)
        expected = residual + sum_of([x.double().sum(dim=0) for x in every]).float()
        close = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
        for total, out, squares in results:
            assert torch.equal(total, results[0][0]), "ranks must not differ by a bit"
            torch.testing.assert_close(total, expected, rtol=close, atol=close)
            assert torch.equal(out, (total * gain).to(dtype))
            torch.testing.assert_close(squares.sum(dim=0), total.square().sum(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("parts", "rows", "width"), [(1, 1, 48), (3, 2, 1024), (2, 3, 896), (4, 4, 5120)]
)
def test_parts_by_collectives(parts: int, rows: int, width: int, dtype: torch.dtype) -> None:
    """What ranks do that share no memory; the last sum is large enough to be made smaller first."""
    residual = random(rows, width, dtype=torch.float32, seed=1)
    every = random(parts, rows, width, dtype=torch.float32, seed=2)
    gain = random(width, dtype=dtype, seed=3)
    total = torch.full_like(residual, float("nan"))
    out = torch.full_like(residual, float("nan"), dtype=dtype)
    group = Alone()
    squares = Exchange(group).add_gain_of_parts(every, residual, gain, total, out)
    assert group.sums == 1
    torch.testing.assert_close(total, residual + every.sum(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, (total * gain).to(dtype))
    torch.testing.assert_close(squares.sum(dim=0), total.square().sum(dim=1))


def test_the_norm_of_parts_is_made_at_once() -> None:
    host = Host(2, torch.float16)
    norm = layernorm.RMSNorm(WIDTH, 1e-5, dtype=torch.float16, device=DEVICE)
    with torch.no_grad():
        norm.weight.copy_(random(WIDTH, dtype=torch.float16, seed=1))
    residual = random(2, WIDTH, dtype=torch.float32, seed=9)
    every = [random(3, 2, WIDTH, dtype=torch.float32, seed=2 + r) for r in range(2)]

    def call(shot: OneShot) -> tuple[torch.Tensor, torch.Tensor]:
        total, out = torch.empty_like(residual), torch.empty_like(residual, dtype=torch.float16)
        shot.add_norm_of_parts(every[shot.group.rank], residual, norm, total, out)
        return total, out

    results = host.together(call)
    expected = residual + sum_of([x.double().sum(dim=0) for x in every]).float()
    for total, out in results:
        assert torch.equal(total, results[0][0]) and torch.equal(out, results[0][1])
        torch.testing.assert_close(total, expected, rtol=4e-3, atol=4e-3)
        normed = layernorm.rms_norm(expected, norm.weight.detach().float(), norm.eps)
        torch.testing.assert_close(out.float(), normed, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [2, 3])
def test_the_best_token_of_all_ranks_wins(size: int) -> None:
    host = Host(size)
    rows = 40
    for step in range(2):
        scores = [random(rows, dtype=torch.float32, seed=step + 10 * r) for r in range(size)]
        scores[1][:5] = scores[0][:5]  # the lowest token wins
        scores[0][5] = scores[1][5] = -3e38
        tokens = [torch.arange(rows, device=DEVICE) + 150_000 * r for r in range(size)]
        out = [torch.zeros(rows, dtype=torch.int64, device=DEVICE) for _ in range(size)]

        def call(shot: OneShot, scores: Any = scores, tokens: Any = tokens, out: Any = out) -> None:
            rank = shot.group.rank
            shot.best(scores[rank], tokens[rank], out[rank])

        host.together(call)
        winner = torch.stack(scores).argmax(dim=0)  # of equal ones the first
        expected = torch.stack(tokens).gather(0, winner[None])[0]
        for mine in out:
            assert mine.tolist() == expected.tolist()


def test_a_fast_rank_spares_what_a_slow_one_still_reads() -> None:
    host = Host(2)
    first, second = host.ranks
    every = [random(2, WIDTH, dtype=torch.float32, seed=r) for r in range(4)]
    for _ in range(3):
        host.send(second, lambda shot: shot.sum_rows(every[1]))
        sums = [first.sum_rows(every[0])]
        # The first is done, and sends for the next sum, while the second has not even begun.
        host.send(first, lambda shot: shot.sum_rows(every[2]))
        sums.append(second.sum_rows(every[1]))
        assert torch.equal(sums[0], every[0] + every[1])
        assert torch.equal(sums[1], sums[0])
        assert torch.equal(second.sum_rows(every[3]), every[2] + every[3])
        assert torch.equal(first.sum_rows(every[2]), every[2] + every[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_counting_starts_again_after_the_last_number(dtype: torch.dtype) -> None:
    host = Host(2, dtype)
    for start in (65_533, 2**31 - 2, -3):
        for shot in host.ranks:
            shot._channels["rows"].epochs.fill_(start)
        for step in range(4):
            every = [random(1, WIDTH, dtype=dtype, seed=10 * step + r) for r in range(2)]
            for mine in host.together(
                lambda shot, every=every: shot.sum_rows(every[shot.group.rank])
            ):
                assert torch.equal(mine, (every[0].float() + every[1].float()).to(dtype))
    assert host.ranks[0]._channels["rows"].epochs[0] == 1


def test_words_of_another_call_are_not_taken() -> None:
    """What all the others rest on: words that lie there from before are none."""
    host = Host(2)
    ones = torch.ones(1, WIDTH, device=DEVICE)
    for _ in range(4):
        assert torch.equal(host.together(lambda shot: shot.sum_rows(ones))[0], 2 * ones)
    epochs = host.ranks[0]._channels["rows"].epochs
    before = epochs.clone()
    host.ranks[0].sum_rows(ones)  # told not to wait, it goes on with what is there
    assert epochs[0] == before[0] + 1
    words = host.boxes[0][host.edge :].view(torch.int64)
    channel = host.ranks[0]._channels["rows"]
    halves = words[: channel.num_bytes // 8].view(2, 2, channel.slot)
    assert (halves[:, 1, :WIDTH] >> 32).unique().tolist() == [3, 4], "a half of its own each"


def test_large_sums_go_the_long_way() -> None:
    host = Host(2)
    shot = host.ranks[0]
    norm = layernorm.RMSNorm(WIDTH, 1e-5, dtype=torch.float32, device=DEVICE)
    x = torch.ones(MOST_ROWS + 1, WIDTH, device=DEVICE)
    with pytest.raises(AssertionError, match="goes the short way"):
        shot.add_norm(x, x, norm)
    with pytest.raises(AssertionError, match="goes the short way"):
        rows = x.repeat(2, 1)
        shot.add_norm_of_parts(rows[None], rows, norm, rows, rows)
    with pytest.raises(AssertionError, match="goes the short way"):
        shot.add_gain_of_parts(rows[None], rows, norm.weight, rows, rows)
    assert isinstance(shot, Exchange)


def test_limits_fall_with_the_number_of_ranks() -> None:
    rows = [one_shot.most_rows(size, 4096, torch.bfloat16) for size in (2, 4, 8, 9)]
    assert rows[0] >= rows[1] >= rows[2] > 0 == rows[3]


def test_ranks_meet_whatever_they_did_before() -> None:
    """PyTorch counts exchanges from the start of a process, but keys are those of the others."""
    from minivllm.distributed.shared_memory import NumberedFromZero

    inner = torch.distributed.HashStore()
    # A PrefixStore calls what it wraps from C++, as PyTorch's exchange does.
    stores = [NumberedFromZero(inner) for _ in range(2)]
    old, new = (torch.distributed.PrefixStore("x", store) for store in stores)
    for step in range(3):
        old.set(f"memory/{7 + step}/0", bytes([0, 255, step]))
        new.wait([f"memory/{step}/0"])
        assert new.get(f"memory/{step}/0") == bytes([0, 255, step])
    old.set("something else", b"1")
    assert new.get("something else") == b"1"


def test_ranks_that_share_no_memory_say_so_and_go_on(caplog: pytest.LogCaptureFixture) -> None:
    from minivllm.distributed.shared_memory import share_memory

    class Group:
        rank, size, local = 1, 2, True
        device = torch.device("cpu")

        def __init__(self) -> None:
            self.asked: list[int] = []

        def least(self, value: int) -> int:
            self.asked.append(value)
            return value

    group = Group()
    assert share_memory(group, 1024) is None
    assert group.asked == [0], "all ranks decide together, and no rank waits for memory alone"
    assert "rank 1: sums over the ranks go through NCCL" in caplog.text
    assert "this rank runs on cpu" in caplog.text


class Alone:
    """A group of one that counts its sums, and adds ``more`` to each."""

    rank, size = 0, 1

    def __init__(self, more: float = 0.0) -> None:
        self.more = more
        self.sums = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        return x.add_(self.more)


def test_the_forward_pass_asks_for_its_sums_and_uses_them() -> None:
    from minivllm.attention.paged import PagedKVCache
    from minivllm.distributed.parallel_layers import shard_model
    from minivllm.distributed.sharded_forms import ShardedForward
    from minivllm.models.config import ModelConfig
    from minivllm.models.loader import random_model

    config = ModelConfig.from_hf(
        {
            **{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 32, "hidden_size": 32},
            **{"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
            **{"tie_word_embeddings": True, "attention_bias": True},
        }
    )
    model = random_model(config, dtype=torch.float32, device=DEVICE)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(20)
        layer.self_attn.o_proj.bias.normal_()
        layer.mlp.down_proj.weight.mul_(500)
    ids = torch.tensor([7, 31, 2], device=DEVICE)
    positions = torch.arange(3, device=DEVICE)
    with torch.inference_mode():
        expected = model(ids, positions, lambda _, q, k, v: q)
        results = []
        for group in (Alone(), Alone(0.1)):
            cache = PagedKVCache(config, 2, 16, dtype=torch.float32, device=DEVICE)
            forward = ShardedForward(shard_model(model, config, group), Exchange(group))
            results.append(forward(ids, positions, positions, cache, lambda _, q: q))
            assert group.sums == 2 * config.num_layers + 1
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[1], expected, rtol=0.05), "sums are not used"
