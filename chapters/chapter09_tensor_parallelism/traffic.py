"""Every word of one decode step of the embedded model, by the engine's own code on two ranks.

python -m chapters.chapter09_tensor_parallelism.traffic
python -m chapters.chapter09_tensor_parallelism.traffic --ranks 4
python -m chapters.chapter09_tensor_parallelism.traffic --workspace   # your own code
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from chapters.machine.asking import choose_package

if TYPE_CHECKING:
    from chapters.chapter09_tensor_parallelism.crew import Step

PROMPTS = [list(range(10, 30)), list(range(40, 47))]


def lines(ranks: int, new: int = 8) -> Iterator[str]:
    """A step in which both prompts decode, and whether the answers are those of one rank."""
    from chapters.chapter09_tensor_parallelism.crew import talk
    from minivllm.engine.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.8, seed=1, max_tokens=new, ignore_eos=True)
    alone = talk(1, PROMPTS, params)
    said = talk(ranks, PROMPTS, params)
    step = [step for step in said.steps if step.decodes][-1]
    yield f"a decode step of {len(PROMPTS)} sequences on {ranks} ranks"
    yield from step_lines(step)
    same = said.answers == alone.answers
    yield f"answers: {'the same tokens as' if same else 'OTHER tokens than'} on one rank"


def step_lines(step: "Step") -> Iterator[str]:
    """Who speaks, in order; the layers of a model say the same, so they are told once."""
    yield f"  rank 0 tells  {step.message.decode()}"
    total = 0
    for _, group in groupby(step.words, key=lambda word: _place(word.who)):
        words = list(group)
        total += sum(word.nbytes for word in words)
        for word in dict.fromkeys((w.kind, w.shape, w.nbytes, _name(w.who)) for w in words):
            kind, shape, nbytes, name = word
            times = sum(w.kind == kind and _name(w.who) == name for w in words)
            yield f"  {name:<18}{kind:<12}{list(shape)!s:<10}{nbytes:>6,} bytes, {times} times"
    yield f"  {'in all':<18}{len(step.words)} words{total:>20,} bytes of each rank"


def _place(who: str) -> str:
    return "layers" if who.startswith("layers.") else who


def _name(who: str) -> str:
    return who.rpartition(".")[2]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    arguments = parser.parse_args(argv)
    try:
        choose_package(arguments.workspace)
        for line in lines(arguments.ranks):
            print(line)
    except (ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
