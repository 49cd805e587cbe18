"""The toy on one rank and on two: what each has, what it computes, what they say to each other.

python -m chapters.chapter09_tensor_parallelism.shares
python -m chapters.chapter09_tensor_parallelism.shares --workspace   # your own code
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from chapters.machine.asking import choose_package

if TYPE_CHECKING:
    from chapters.chapter09_tensor_parallelism.threads import Meeting


def lines() -> Iterator[str]:
    """Everything that the toy has to say."""
    from chapters.chapter09_tensor_parallelism import toy

    yield f"the MLP of x = {_list(toy.X.tolist())}"
    whole, _ = toy.run_mlp(1)
    yield _row("one rank", f"hidden {_list(whole[0].hidden)}", f"out {_list(whole[0].out)}")
    parts, meeting = toy.run_mlp(2)
    for rank, part in enumerate(parts):
        hidden, summand = _list(part.hidden), _list(part.summand)
        yield _row(f"rank {rank} of 2", f"hidden {hidden}", f"summand {summand}")
    yield _row("said", _said(meeting), f"out {_list(parts[0].out)}")
    biased, _ = toy.run_mlp(2, bias=True)
    yield _row("with bias", _list(toy.BIAS.tolist()), f"out {_list(biased[0].out)}")
    yield "the vector of token 3"
    for size in (1, 2):
        vectors, meeting = toy.embed(size, [3])
        name = "one rank" if size == 1 else "two ranks"
        yield _row(name, _said(meeting), f"out {_list(vectors[0][0])}")
    yield f"a token from the logits {_list(toy.LOGITS.tolist())}"
    choices, meeting = toy.choose(2)
    for rank, choice in enumerate(choices):
        owned = toy.owned_by(rank, 2)
        has = f"has tokens {owned.start} to {owned.stop - 1}"
        yield _row(f"rank {rank} of 2", has, f"best ({choice.score:g}, token {choice.token})")
    yield _row("said", _said(meeting), f"chosen {choices[0].chosen}")


def _row(*cells: str) -> str:
    first, second, third = cells
    return f"  {first:<13}{second:<23}{third}"


def _list(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def _said(meeting: "Meeting") -> str:
    word = meeting.words[-1]
    return f"{word.kind}, {word.nbytes} bytes"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    arguments = parser.parse_args(argv)
    try:
        choose_package(arguments.workspace)
        for line in lines():
            print(line)
    except (ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
