"""Text on the screen: a question to a model, answered by recomputing everything at each step.

    python -m chapters.chapter02_qwen3_model.say "what is a block table?"
    python -m chapters.chapter02_qwen3_model.say --toy "?"
    python -m chapters.chapter02_qwen3_model.say --workspace "what is a block table?"

``--workspace`` runs your own code instead of the reference.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from chapters import ROOT

QUESTION = "What is a block table?"


def choose_package(workspace: bool) -> None:
    """Let ``import minivllm`` find the learner's package in ``workspace/``, or the reference."""
    if not workspace:
        return
    if not (ROOT / "workspace" / "minivllm").is_dir():
        raise ValueError("there is no workspace yet; begin with `python -m chapters start 2`")
    sys.path.insert(0, str(ROOT / "workspace"))


def print_as_it_comes(
    token_ids: Iterable[int], decode: Callable[[list[int]], str]
) -> tuple[list[int], list[float]]:
    """Print the text of tokens while they arrive; return them and the seconds each one took."""
    tokens: list[int] = []
    seconds: list[float] = []
    shown = ""
    start = time.perf_counter()
    for token in token_ids:
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
        tokens.append(token)
        text = decode(tokens)
        # A character can be cut across two tokens; half of one decodes to U+FFFD.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return tokens, seconds


def say(arguments: argparse.Namespace) -> None:
    """Load a model, ask it, print the answer and what it cost."""
    import torch

    from minivllm.models.generate import generate_by_recomputing
    from minivllm.models.hub import model_folder
    from minivllm.models.loader import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.model is None:
        # The embedded model and the toy are too small for a second thread to help.
        torch.set_num_threads(1)
    # A CPU computes fastest in float32; a GPU takes the checkpoint's own dtype.
    dtype = torch.float32 if device == "cpu" else None
    if arguments.toy:
        from chapters.chapter02_qwen3_model.toy import LETTERS, spell, write_toy

        strange = sorted(set(arguments.question) - set(LETTERS))
        if strange or not arguments.question:
            raise ValueError(f"the toy knows only {LETTERS}; ask it '?' or 'a'")
        with tempfile.TemporaryDirectory() as scratch:
            model = load_model(write_toy(Path(scratch)), dtype=dtype, device=device)
        prompt = [LETTERS.index(letter) for letter in arguments.question]
        decode: Callable[[list[int]], str] = spell
    else:
        folder = model_folder(arguments.model)
        model = load_model(folder, dtype=dtype, device=device)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": arguments.question}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, enable_thinking=False
        )["input_ids"]

        def decode(tokens: list[int]) -> str:
            return tokenizer.decode(tokens, skip_special_tokens=True)

    answer = generate_by_recomputing(model, prompt, arguments.max_tokens)
    tokens, seconds = print_as_it_comes(answer, decode)
    steps = range(len(prompt), len(prompt) + len(tokens))
    print(
        f"\n{len(prompt)} prompt tokens, {len(tokens)} new ones in {sum(seconds):.2f} s: "
        f"{sum(steps):,} rows went through the model, {len(prompt) + len(tokens) - 1} were new"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--model", help="a folder or a name on the hub; the embedded model if none")
    parser.add_argument("--toy", action="store_true", help="the chapter's toy instead")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    arguments = parser.parse_args(argv)
    try:
        choose_package(arguments.workspace)
        say(arguments)
    except (ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
