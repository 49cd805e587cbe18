"""Chapter 4's toy, whose every number is in the text: three tiles, and what runs along."""

import importlib

import pytest
import torch
from flash_helpers import assert_toy

from minivllm.attention import flash
from minivllm.attention.naive import naive_attention

toy = importlib.import_module("chapters.chapter04_flash_attention.toy")
NOTHING_YET = torch.full((1,), float("-inf")), torch.zeros(1), torch.zeros(1, 2)


def toy_tiles() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores [1, 2] and values [2, 2] of the last token, tile by tile."""
    return [
        (toy.SCALE * dots[None], values)
        for dots, values in zip(toy.DOTS, toy.VALUES.split(toy.TILE), strict=True)
    ]


def test_toy_dot_products() -> None:
    assert torch.equal((toy.ASKING @ toy.KEYS.T)[-1].view(3, 2), toy.DOTS)


def test_toy_running_values() -> None:
    """The table of the text, from its own first principles."""
    seen = torch.zeros(0)
    for tile in range(3):
        before = seen.max() if tile else torch.tensor(float("-inf"))
        seen = torch.cat((seen, toy.DOTS[tile]))
        weights = 2 ** (seen - toy.MAX[tile])
        assert seen.max() == toy.MAX[tile]
        assert 2 ** (before - toy.MAX[tile]) == toy.SHRINK[tile]
        assert torch.equal(weights[-2:], toy.WEIGHTS[tile])
        assert weights.sum() == toy.SUM[tile]
        assert torch.equal(weights @ toy.VALUES[: len(seen)], toy.ACC[tile])
    assert torch.equal(toy.ACC[-1] / toy.SUM[-1], toy.LAST)


def test_online_softmax_step_on_the_toy() -> None:
    state = NOTHING_YET
    for tile, (scores, values) in enumerate(toy_tiles()):
        state = flash.online_softmax_step(*state, scores, values)
        row_max, row_sum, acc = state
        assert_toy(row_max, toy.SCALE * toy.MAX[tile : tile + 1], f"row_max after tile {tile}")
        assert_toy(row_sum, toy.SUM[tile : tile + 1], f"row_sum after tile {tile}")
        assert_toy(acc, toy.ACC[tile : tile + 1], f"acc after tile {tile}")


def test_attend_in_tiles_on_the_toy() -> None:
    """The last token alone, with the six keys in tiles of 2."""
    out = flash.attend_in_tiles(toy.Q[-1:], toy.K, toy.V, scale=toy.SCALE, tile=toy.TILE)
    assert_toy(out[0, 0], toy.LAST, "the output of the last token")
    out = flash.attend_in_tiles(toy.Q, toy.K, toy.V, scale=toy.SCALE, tile=toy.TILE)
    assert_toy(out, naive_attention(toy.Q, toy.K, toy.V, toy.SCALE), "all six tokens at once")


def test_attend_in_blocks_on_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 2 queries meet 1, 2 and 3 tiles: 6 of the 9."""
    steps: list[torch.Tensor] = []
    original = flash.online_softmax_step

    def counting(row_max, row_sum, acc, scores, values):
        steps.append(scores)
        return original(row_max, row_sum, acc, scores, values)

    monkeypatch.setattr(flash, "online_softmax_step", counting)
    out = flash.attend_in_blocks(toy.Q, toy.K, toy.V, scale=toy.SCALE, tile=toy.TILE)
    assert_toy(out, naive_attention(toy.Q, toy.K, toy.V, toy.SCALE), "the output")
    assert len(steps) == toy.VISITED[0], (
        f"online_softmax_step ran {len(steps)} times; the three blocks of 2 queries need "
        "1 + 2 + 3 = 6 tiles of 2 keys"
    )


def test_flash_attention_of_the_toy_batch() -> None:
    q, k, v = (tensor[toy.BATCH] for tensor in (toy.Q, toy.K, toy.V))
    cu_seqlens = torch.tensor(toy.CU_SEQLENS, dtype=torch.int32)
    out = flash.flash_attention(q, k, v, cu_seqlens, scale=toy.SCALE, max_seqlen=6, tile=toy.TILE)
    whole = naive_attention(toy.Q, toy.K, toy.V, toy.SCALE)
    assert_toy(out, whole[toy.BATCH], "the output of the two sequences")
