"""What the chapters' programs share: which package runs, a model to ask, its answer as it comes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from chapters import ROOT

if TYPE_CHECKING:
    from torch import nn

QUESTION = "What is a block table?"


def choose_package(workspace: bool) -> None:
    """Let ``import minivllm`` find the learner's package in ``workspace/``, or the reference.

    ValueError if there is no workspace. To be called before anything imports minivllm.
    """
    if not workspace:
        return
    if not (ROOT / "workspace" / "minivllm").is_dir():
        raise ValueError("there is no workspace yet; begin with `python -m chapters start 1`")
    sys.path.insert(0, str(ROOT / "workspace"))


def ask_parser(description: str | None, max_tokens: int = 200) -> argparse.ArgumentParser:
    """The options that every program has which asks a model."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--model", help="a folder or a name on the hub; the embedded model if none")
    parser.add_argument("--max-tokens", type=int, default=max_tokens)
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    return parser


def run(
    say: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Run ``say`` on the chosen package. Returns 2 for a mistake or a blank, told in one line."""
    arguments = parser.parse_args(argv)
    try:
        choose_package(arguments.workspace)
        say(arguments)
    except (ValueError, NotImplementedError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def load(name: str | None) -> tuple[nn.Module, Any]:
    """A model and its tokenizer, on the GPU if there is one.

    name: a folder or a name on the hub; the embedded model if None.
    """
    from minivllm.models.hub import model_folder

    folder = model_folder(name)
    model = load_folder(folder, small=name is None)
    from transformers import AutoTokenizer

    return model, AutoTokenizer.from_pretrained(folder)


def load_folder(folder: Any, *, small: bool) -> nn.Module:
    """The model of a folder. small: too small for a second thread to help."""
    import torch

    from minivllm.models.loader import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if small:
        torch.set_num_threads(1)
    # A CPU computes fastest in float32; a GPU takes the checkpoint's own dtype.
    dtype = torch.float32 if device == "cpu" else None
    return load_model(folder, dtype=dtype, device=device)


def chat_prompt(tokenizer: Any, question: str) -> list[int]:
    """The token ids of a chat in which ``question`` waits for its answer."""
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, enable_thinking=False
    )["input_ids"]


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """From token ids to text, without the tokens that only mark the chat."""
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


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
