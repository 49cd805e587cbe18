"""Play the toy and say what every step was sent, what it read from the rows, and what it chose.

python -m chapters.chapter08_cuda_graphs.rows
python -m chapters.chapter08_cuda_graphs.rows --taped       # steps replayed from tapes
python -m chapters.chapter08_cuda_graphs.rows --blocks 6    # a pool that preempts cem
python -m chapters.chapter08_cuda_graphs.rows --workspace   # your own code
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from chapters.machine.asking import choose_package

if TYPE_CHECKING:
    from chapters.chapter08_cuda_graphs.toy import Game, Note

FIELDS = {"token": "input_ids", "position": "positions", "slot": "slot_mapping"}


def lines_of(note: "Note") -> Iterator[str]:
    """A step in a few lines: one column a place."""
    what = f"graph of {note.size}" if note.size else "prompts"
    yield f"step {note.step}: {what}, {len(note.sent)} words sent"
    empty = ["-"] * max(note.size - len(note.names), 0)
    yield _line("", [*note.names, *empty])
    if note.size:
        yield _line("row", [*map(str, note.places), *empty])
        for label, name in FIELDS.items():
            yield _line(label, [str(value) for value in note.inputs[name]])
    yield _line("chosen", [*map(str, note.tokens), *empty])


def _line(label: str, cells: Sequence[str]) -> str:
    return f"  {label:<9}" + "".join(f"{cell:>6}" for cell in cells)


def answers_of(game: "Game") -> Iterator[str]:
    """What everybody was told."""
    for name, answer in game.answers.items():
        yield f"  {name}  {' '.join(map(str, answer))}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--taped", action="store_true", help="replay the steps from tapes")
    parser.add_argument("--blocks", type=int, default=8, metavar="N", help="the pool's size")
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    arguments = parser.parse_args(argv)
    try:
        choose_package(arguments.workspace)
        from chapters.chapter08_cuda_graphs import toy

        game = toy.play(num_blocks=arguments.blocks, taped=arguments.taped)
    except (ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
    for note in game.notes:
        print("\n".join(lines_of(note)))
    print("\nanswers")
    print("\n".join(answers_of(game)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
