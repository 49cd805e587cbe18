"""Text on the screen: a question to a model, answered by recomputing everything at each step.

    python -m chapters.chapter02_qwen3_model.say "what is a block table?"
    python -m chapters.chapter02_qwen3_model.say --toy "?"
    python -m chapters.chapter02_qwen3_model.say --workspace "what is a block table?"

``--workspace`` runs your own code instead of the reference.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from chapters.machine import asking
from chapters.machine.asking import QUESTION


def say(arguments: argparse.Namespace) -> None:
    """Load a model, ask it, print the answer and what it cost."""
    from minivllm.models.generate import generate_by_recomputing

    max_tokens = arguments.max_tokens
    if arguments.toy:
        from chapters.chapter02_qwen3_model.toy import LETTERS, spell, write_toy

        strange = sorted(set(arguments.question) - set(LETTERS))
        if strange or not arguments.question:
            raise ValueError(f"the toy knows only {LETTERS}; ask it '?' or 'a'")
        with tempfile.TemporaryDirectory() as scratch:
            model = asking.load_folder(write_toy(Path(scratch)), small=True)
        prompt = [LETTERS.index(letter) for letter in arguments.question]
        max_tokens = min(max_tokens, max(1, model.config.max_positions - len(prompt) + 1))
        decode: Callable[[list[int]], str] = spell
    else:
        model, tokenizer = asking.load(arguments.model)
        prompt = asking.chat_prompt(tokenizer, arguments.question)
        decode = asking.decoder(tokenizer)

    answer = generate_by_recomputing(model, prompt, max_tokens)
    tokens, seconds = asking.print_as_it_comes(answer, decode)
    steps = range(len(prompt), len(prompt) + len(tokens))
    print(
        f"\n{len(prompt)} prompt tokens, {len(tokens)} new ones in {sum(seconds):.2f} s: "
        f"{sum(steps):,} rows went through the model, {len(prompt) + len(tokens) - 1} were new"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = asking.ask_parser(__doc__)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--toy", action="store_true", help="the chapter's toy instead")
    return asking.run(say, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
