"""Text on the screen as in chapter 2, but each token goes through the model once.

    python -m chapters.chapter03_naive_attention.say "what is a block table?"
    python -m chapters.chapter03_naive_attention.say --workspace "what is a block table?"

``--workspace`` runs your own code instead of the reference.
"""

import argparse
import sys
from collections.abc import Sequence

from chapters.machine import asking
from chapters.machine.asking import QUESTION


def say(arguments: argparse.Namespace) -> None:
    """Load a model, ask it, print the answer and what it cost."""
    from minivllm.attention.naive import generate_with_cache

    model, tokenizer = asking.load(arguments.model)
    prompt = asking.chat_prompt(tokenizer, arguments.question)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    answer = generate_with_cache(model, prompt, arguments.max_tokens)
    tokens, seconds = asking.print_as_it_comes(answer, asking.decoder(tokenizer))
    print(
        f"\n{len(prompt)} prompt tokens, {len(tokens)} new ones in {sum(seconds):.2f} s: "
        f"{sum(rows):,} rows went through the model, "
        f"{rows[0] if rows else 0} in the prefill and {len(rows[1:])} in {len(rows[1:])} decodes"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = asking.ask_parser(__doc__)
    parser.add_argument("question", nargs="?", default=QUESTION)
    return asking.run(say, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
