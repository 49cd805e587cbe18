"""Chapter 4: attention without the score matrix, in PyTorch, against float64."""

from pathlib import Path

import pytest
import torch
from flash_helpers import DEVICE, assert_close, make_batch, norm_error, reference
from helpers import oracle_logits, random_prompt, relative_error, save_checkpoint, tiny_qwen3
from torch.utils._python_dispatch import TorchDispatchMode

from minivllm.attention import flash
from minivllm.models.loader import load_model


def _shown(numbers: torch.Tensor) -> list[float]:
    return [round(x, 3) for x in numbers.tolist()]


# ------------------------------------------------------------------ one step


def test_online_softmax_step_keeps_the_running_values_it_promises() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 12, generator=generator, dtype=torch.float64) * 10
    scores[2, 5:9] = float("-inf")  # hidden from row 2
    values = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    row_max = torch.full((5,), float("-inf"), dtype=torch.float64)
    row_sum, acc = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    for start in range(0, 12, 4):
        end = start + 4
        row_max, row_sum, acc = flash.online_softmax_step(
            row_max, row_sum, acc, scores[:, start:end], values[start:end]
        )
        seen = scores[:, :end]
        weights = (seen - seen.amax(1, keepdim=True)).exp()
        assert torch.equal(row_max, seen.amax(1)), (
            f"row_max after {end} keys\nis        {_shown(row_max)},\nshould be "
            f"{_shown(seen.amax(1))}, the largest score of each row"
        )
        assert_close(row_sum, weights.sum(1), 1e-12, f"row_sum after {end} keys")
        assert_close(acc, weights @ values[:end], 1e-12, f"acc after {end} keys")


def test_online_softmax_survives_scores_that_exp_would_not() -> None:
    scores = torch.tensor([[800.0, 900.0, 1000.0, -1000.0]])
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    state = torch.full((1,), float("-inf")), torch.zeros(1), torch.zeros(1, 1)
    for i in range(4):
        state = flash.online_softmax_step(*state, scores[:, i : i + 1], values[i : i + 1])
    out = (state[2] / state[1].unsqueeze(-1)).item()
    assert out == pytest.approx(3.0), f"the key with score 1000 has all the weight, and 3.0; {out}"


def test_online_softmax_takes_tiles_in_any_order() -> None:
    """A large maximum may come first, last, or twice."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(4, 2, 3, 8, generator=generator, dtype=torch.float64) * 5
    values = torch.randn(2, 8, 3, generator=generator, dtype=torch.float64)
    outs = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        row_max = torch.full((4, 2, 3), float("-inf"), dtype=torch.float64)
        state = row_max, torch.zeros_like(row_max), torch.zeros(4, 2, 3, 3, dtype=torch.float64)
        for tile in order:
            keys = slice(2 * tile, 2 * tile + 2)
            state = flash.online_softmax_step(*state, scores[..., keys], values[:, keys])
        outs.append(state[2] / state[1].unsqueeze(-1))
    for out in outs:
        assert_close(out, scores.softmax(dim=-1) @ values, 1e-12, "acc / row_sum")


def test_online_softmax_step_leaves_its_arguments_alone() -> None:
    given = torch.ones(2), torch.ones(2), torch.ones(2, 3), torch.ones(2, 4), torch.ones(4, 3)
    flash.online_softmax_step(*given)
    assert all(bool((tensor == 1).all()) for tensor in given), "an argument was written to"


# ------------------------------------------------------------------ a block of queries


@pytest.mark.parametrize("tile", [1, 3, 7, 16, 100])
def test_attend_in_tiles_does_not_depend_on_the_tile(tile: int) -> None:
    q, k, v, _ = make_batch([23], 4, 2, 16, torch.float64)
    out = flash.attend_in_tiles(q, k, v, scale=0.25, tile=tile)
    assert_close(out, reference(q, k, v, [23], 0.25), 1e-14, f"4 heads on 2 KV heads, tile={tile}")


@pytest.mark.parametrize("first", [13, 19])
def test_attend_in_tiles_of_the_last_queries(first: int) -> None:
    """Queries 13 to 19 of 20 tokens, then the last alone."""
    q, k, v, _ = make_batch([20], 4, 2, 16, torch.float64)
    whole = reference(q, k, v, [20], 0.25)
    out = flash.attend_in_tiles(q[first:], k, v, scale=0.25, tile=8)
    assert_close(out, whole[first:], 1e-14, f"queries {first} to 19 of 20 tokens")


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (3, 1), (2, 2)])
def test_attend_in_tiles_grouped_query(num_heads: int, num_kv_heads: int) -> None:
    q, k, v, _ = make_batch([9], num_heads, num_kv_heads, 8, torch.float64)
    out, expected = (
        flash.attend_in_tiles(q, k, v, scale=0.3, tile=4),
        reference(q, k, v, [9], 0.3),
    )
    assert out.shape == q.shape, f"the shape is {tuple(out.shape)}, not {tuple(q.shape)}"
    for head in range(num_heads):
        what = f"query head {head}, which reads KV head {head * num_kv_heads // num_heads}"
        assert_close(out[:, head], expected[:, head], 1e-14, what)


def test_attend_in_tiles_computes_in_float32() -> None:
    q, k, v, _ = make_batch([50], 2, 1, 16, torch.float16)
    out = flash.attend_in_tiles(q, k, v, scale=0.25, tile=4)
    assert out.dtype == torch.float16, f"the result is {out.dtype}; q is float16"
    # Rounding the result alone costs 2e-4; running sums in float16 would cost far more.
    assert_close(out, reference(q, k, v, [50], 0.25), 3e-4, "float16 input, sums in float32")


def test_attend_in_tiles_takes_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = watch_steps(monkeypatch)
    q, k, v, _ = make_batch([20], 2, 1, 8, torch.float32)
    flash.attend_in_tiles(q, k, v, scale=0.25, tile=8)
    assert widths == [8, 8, 4], f"20 keys in tiles of 8 are 8, 8 and 4, not {widths}"


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, the number of keys of each step."""
    widths: list[int] = []
    original = flash.online_softmax_step

    def watched(row_max, row_sum, acc, scores, values):
        widths.append(scores.shape[-1])
        return original(row_max, row_sum, acc, scores, values)

    monkeypatch.setattr(flash, "online_softmax_step", watched)
    return widths


# ------------------------------------------------------------------ blocks, and a batch


@pytest.mark.parametrize("tile", [1, 5, 16, 64])
def test_attend_in_blocks(tile: int) -> None:
    q, k, v, _ = make_batch([33], 4, 2, 16, torch.float64)
    out = flash.attend_in_blocks(q, k, v, scale=0.25, tile=tile)
    assert_close(out, reference(q, k, v, [33], 0.25), 1e-14, f"4 heads on 2 KV heads, tile={tile}")
    assert out.is_contiguous() and out.dtype == q.dtype


@pytest.mark.parametrize("first", [1, 16, 30])
def test_attend_in_blocks_of_a_chunk(first: int) -> None:
    """The last tokens of a prompt, whose beginning went through the model before."""
    q, k, v, _ = make_batch([33], 4, 2, 16, torch.float64)
    out = flash.attend_in_blocks(q[first:], k, v, scale=0.25, tile=8)
    what = f"queries {first} to 32 of 33 tokens"
    assert_close(out, reference(q, k, v, [33], 0.25)[first:], 1e-14, what)


def test_attend_in_blocks_visits_half_of_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = watch_steps(monkeypatch)
    q, k, v, _ = make_batch([64], 2, 1, 8, torch.float32)
    flash.attend_in_blocks(q, k, v, scale=0.25, tile=8)
    assert len(widths) == 36, (
        f"8 blocks of queries need 1 + 2 + ... + 8 = 36 of the 64 tiles, not {len(widths)}"
    )


def test_attend_in_blocks_never_touches_what_is_hidden() -> None:
    """NaN in the keys and values behind a block does not reach it."""
    q, k, v, _ = make_batch([40], 2, 1, 8, torch.float32)
    expected = reference(q, k, v, [40], 0.25)
    k[32:], v[32:] = float("nan"), float("nan")
    out = flash.attend_in_blocks(q, k, v, scale=0.25, tile=16)
    assert_close(out[:32], expected[:32], 1e-6, "the queries before token 32")


class LargestResult(TorchDispatchMode):
    """The most numbers that a result of one PyTorch operation had, views left aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_attend_in_blocks_holds_no_row_of_scores() -> None:
    """256 tokens, 2 heads of 4 numbers: a result has 2,048, a block's scores have 4,096."""
    q, k, v, _ = make_batch([256], 2, 1, 4, torch.float32)
    with LargestResult() as largest:
        flash.attend_in_blocks(q, k, v, scale=0.5, tile=8)
    assert largest.numbers <= 256 * 2 * 4, (
        f"one operation made {largest.numbers:,} numbers; nothing need be larger than the output, "
        "which has 2,048"
    )


def test_flash_attention_of_many_sequences() -> None:
    lengths = [1, 9, 0, 30]
    q, k, v, cu_seqlens = make_batch(lengths, 6, 3, 8, torch.float64)
    out = flash.flash_attention(q, k, v, cu_seqlens, scale=0.3, max_seqlen=30, tile=8)
    assert_close(out, reference(q, k, v, lengths, 0.3), 1e-14, "sequences of 1, 9, 0 and 30")


def test_flash_attention_refuses_a_tile_of_nothing() -> None:
    q, k, v, cu_seqlens = make_batch([4], 2, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="tile=0 must be at least 1"):
        flash.flash_attention(q, k, v, cu_seqlens, scale=0.3, max_seqlen=4, tile=0)


@torch.inference_mode()
def test_model_with_flash_attention_equals_transformers(tmp_path: Path) -> None:
    theirs = tiny_qwen3(seed=1)
    ours = load_model(save_checkpoint(theirs, tmp_path), device=DEVICE)
    prompts = [random_prompt(length, seed=length) for length in (5, 18)]
    form = lambda *args, **kwargs: flash.flash_attention(*args, **kwargs, tile=4)  # noqa: E731
    attend = flash.FlashAttention([0, 5, 23], ours.config.head_size**-0.5, form=form, device=DEVICE)
    assert attend.max_seqlen == 18
    input_ids = torch.tensor([token for prompt in prompts for token in prompt], device=DEVICE)
    positions = torch.cat([torch.arange(5), torch.arange(18)]).to(DEVICE)
    logits = ours.compute_logits(ours(input_ids, positions, attend)).cpu()
    for prompt, mine in zip(prompts, logits.split((5, 18)), strict=True):
        error = relative_error(mine, oracle_logits(theirs, prompt))
        assert error < 1e-5, f"the sequence of {len(prompt)} tokens is off by {error:.2g}"


@pytest.mark.parametrize("length", [300, 1000])
def test_error_does_not_grow_with_the_number_of_tiles(length: int) -> None:
    q, k, v, _ = make_batch([length], 1, 1, 32, torch.float32)
    expected = reference(q, k, v, [length], 0.2)
    few = norm_error(flash.attend_in_blocks(q, k, v, scale=0.2, tile=512), expected)
    many = norm_error(flash.attend_in_blocks(q, k, v, scale=0.2, tile=16), expected)
    assert max(few, many) < 1e-6
