"""Text on the screen as in chapter 2, but each token goes through the model once.

    python -m chapters.chapter03_naive_attention.say "what is a block table?"
    python -m chapters.chapter03_naive_attention.say --workspace "what is a block table?"

``--workspace`` runs your own code instead of the reference.
"""

import argparse
import sys
from collections.abc import Sequence

from chapters.chapter02_qwen3_model.say import QUESTION, choose_package, print_as_it_comes


def say(arguments: argparse.Namespace) -> None:
    """Load a model, ask it, print the answer and what it cost."""
    import torch

    from minivllm.attention.naive import generate_with_cache
    from minivllm.models.hub import model_folder
    from minivllm.models.loader import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.model is None:
        # The embedded model is too small for a second thread to help.
        torch.set_num_threads(1)
    # A CPU computes fastest in float32; a GPU takes the checkpoint's own dtype.
    dtype = torch.float32 if device == "cpu" else None
    folder = model_folder(arguments.model)
    model = load_model(folder, dtype=dtype, device=device)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": arguments.question}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, enable_thinking=False
    )["input_ids"]
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    answer = generate_with_cache(model, prompt, arguments.max_tokens)
    tokens, seconds = print_as_it_comes(
        answer, lambda found: tokenizer.decode(found, skip_special_tokens=True)
    )
    print(
        f"\n{len(prompt)} prompt tokens, {len(tokens)} new ones in {sum(seconds):.2f} s: "
        f"{sum(rows):,} rows went through the model, "
        f"{rows[0] if rows else 0} in the prefill and {len(rows[1:])} in {len(rows[1:])} decodes"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--model", help="a folder or a name on the hub; the embedded model if none")
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
