"""Chapter 8's toy, and its stand-in for a graph."""

import pytest
import torch

from chapters.chapter08_cuda_graphs import toy
from chapters.chapter08_cuda_graphs.tape import Tape, TapeRecorder


@pytest.mark.parametrize("taped", [False, True], ids=["done again", "taped"])
@pytest.mark.parametrize("num_blocks", [8, 6], ids=["roomy", "preempting"])
def test_toy_answers(num_blocks, taped):
    game = toy.play(num_blocks=num_blocks, taped=taped)
    wrong = [
        f"{request.name} is told {game.answers[request.name]}, not {toy.expected(request)}"
        for request in toy.REQUESTS
        if game.answers[request.name] != toy.expected(request)
    ]
    assert not wrong, "\n".join(wrong)
    assert game.scheduler.num_preemptions == (num_blocks == 6)


def test_toy_steps():
    """What the figure shows: sizes, rows and words of every step."""
    notes = toy.play().notes
    assert [note.size for note in notes] == [0, 4, 4, 2, 0, 4, 2]
    assert [note.places for note in notes[3:]] == [[0, 2], [1], [0, 2, 1], [0, 1]]
    assert [len(note.sent) for note in notes] == [23, 1, 1, 0, 7, 0, 0]
    assert notes[1].sent == [(34, 5)] and notes[2].sent == [(25, 6)]
    assert notes[1].inputs["slot_mapping"] == [15, 33, 80, -1]


def test_toy_of_a_request_that_comes_last():
    late = (*toy.REQUESTS[:1], toy.Request("eve", 500, 20, 2, arrives=12))
    assert toy.play(late).answers == {request.name: toy.expected(request) for request in late}


# ---------------------------------------------------------------------------- the tape


def test_a_tape_runs_no_python():
    x, out, calls = torch.zeros(3), torch.zeros(3), []

    def work() -> None:
        calls.append(1)
        out.copy_((x + 1) * (2 if x.sum() == 0 else 3))

    replay = TapeRecorder().record(work)
    assert len(calls) == 2, "once for real, once on the tape"
    x.fill_(4)
    replay()
    assert len(calls) == 2 and out.tolist() == [10] * 3, (
        "the branch was chosen when it was recorded"
    )


def test_a_tape_follows_views_masks_and_what_it_made_itself():
    x, mask, out = torch.arange(4.0), torch.tensor([True, False, True, False]), torch.zeros(1)
    tape = Tape()
    with tape:
        part = x[:3]
        part += 1
        out[0] = x[mask].sum()
    assert x.tolist() == [1, 2, 3, 3] and out.item() == 4
    mask.copy_(torch.tensor([True, True, True, True]))
    tape.replay()
    assert x.tolist() == [2, 3, 4, 3] and out.item() == 12
