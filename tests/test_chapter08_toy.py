"""Chapter 8's toy, its stand-in for a graph, and every figure that its text prints."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from chapters.chapter08_cuda_graphs import halves, launches, results, rows, toy, waste
from chapters.chapter08_cuda_graphs.tape import Tape, TapeRecorder

FOLDER = Path(results.__file__).parent
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


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


# ---------------------------------------------------------------------------- what the text prints


def test_rows_print_what_the_text_shows(capsys):
    assert rows.main([]) == 0
    printed = capsys.readouterr().out
    shown = re.search(r"chapter08_cuda_graphs\.rows\n(.*?)```", TEXT, re.DOTALL)
    assert shown
    pieces = [piece.strip("\n") for piece in shown[1].split("...\n")]
    assert len(pieces) >= 2 and all(piece in printed for piece in pieces)


def test_the_count_of_operations():
    found = launches.count(repeats=1)
    assert f"plain form    {found.operations} operations, each a kernel on a GPU" in TEXT
    # Each layer adds the same.
    few, fewer = launches.count(3, repeats=1), launches.count(2, repeats=1)
    a_layer = few.operations - fewer.operations
    assert found.operations == fewer.operations + 26 * a_layer


def test_the_waste_of_ladders(capsys):
    assert waste.main() == 0
    assert capsys.readouterr().out in TEXT
    assert waste.waste_of([1, 2, 4]).padding == [0, 0, 1, 0]
    assert waste.waste_of([1, 2, 4]).share == 1 / 11


def test_the_bytes_that_are_sent(capsys, monkeypatch):
    """Counts, the same on every machine."""
    half = halves.measure(32, steps=40)
    row = re.search(r"^ +32 .* ([\d,]+) +([\d.]+)$", TEXT, re.MULTILINE)
    assert row, "the text has no row for batch 32"
    assert (f"{half.plain_bytes:,.0f}", f"{half.sent_bytes:.1f}") == row.groups()
    assert half.prepare > 0 and half.plain > 0 and half.schedule > 0
    monkeypatch.setattr(halves, "BATCHES", (1,))
    assert halves.main() == 0 and "laid out" in capsys.readouterr().out


@pytest.mark.parametrize("mark", results.BLOCKS)
def test_measured_blocks_are_those_of_the_reports(mark):
    block = f"<!-- {mark} -->\n{results.BLOCKS[mark]()}\n<!-- end of {mark} -->"
    assert block in TEXT, "run `python -m chapters.chapter08_cuda_graphs.results`"


def test_figures_are_those_that_the_code_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("triton", reason="the notebooks' drawing needs the recorder")
    matplotlib.use("agg")
    figures = importlib.import_module("chapters.chapter08_cuda_graphs.figures")
    with matplotlib.rc_context():
        figures.main(tmp_path)
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == sorted(file.name for file in (FOLDER / "figures").iterdir())
    for name in drawn:
        assert f"](figures/{name})" in TEXT, f"the text does not show {name}"
        words = [
            re.findall(r">([^<>\n]+)</text>", (folder / name).read_text(encoding="utf-8"))
            for folder in (FOLDER / "figures", tmp_path)
        ]
        assert words[0] == words[1], "run `python -m chapters.chapter08_cuda_graphs.figures`"


def test_a_host_that_is_a_step_ahead_is_never_waited_for():
    figures = pytest.importorskip("chapters.chapter08_cuda_graphs.figures")

    def end(*, overlap: bool) -> float:
        bars = figures.replayed(5.0, 0.9, 0.1, 4, overlap=overlap)
        return max(bar.start + bar.length for bar in bars)

    assert end(overlap=False) == pytest.approx(4 * 6.0)
    assert end(overlap=True) == pytest.approx(1.0 + 4 * 5.0)
    apart = figures.one_by_one(10, 1.0, 3.0)
    assert max(bar.start + bar.length for bar in apart) == pytest.approx(31.0)
