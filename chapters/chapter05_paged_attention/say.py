"""Two questions at once, their keys and values in pages scattered over one pool.

    python -m chapters.chapter05_paged_attention.say
    python -m chapters.chapter05_paged_attention.say "introduce yourself" "What is a KV cache?"
    python -m chapters.chapter05_paged_attention.say --workspace --kernels

``--workspace`` runs your own code instead of the reference. ``--kernels`` runs the Triton kernels
instead of the PyTorch forms; without a GPU they run in Triton's interpreter, which is slow.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from chapters.chapter02_qwen3_model.say import QUESTION, choose_package

QUESTIONS = (QUESTION, "introduce yourself")


def say(arguments: argparse.Namespace) -> None:
    """Load a model, ask it all questions in one batch, print the answers and their blocks."""
    import torch

    if arguments.kernels and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from chapters.chapter05_paged_attention.drive import Pages, Request, by_kernels, by_loop
    from minivllm.models.hub import model_folder
    from minivllm.models.loader import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.model is None:
        # The embedded model is too small for a second thread to help.
        torch.set_num_threads(1)
    folder = model_folder(arguments.model)
    model = load_model(folder, dtype=torch.float32 if device == "cpu" else None, device=device)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = []
    for question in arguments.questions or QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, enable_thinking=False
        )["input_ids"]
        requests.append(Request(question, prompt))
    if not 1 <= arguments.block_size <= 64:
        raise ValueError("--block-size must be from 1 to 64")
    pages = Pages(
        model,
        512 // arguments.block_size,
        arguments.block_size,
        scattered=not arguments.in_order,
        form=by_kernels if arguments.kernels else by_loop,
    )
    running, tables = list(requests), {}
    while running:
        pages.step(running)
        for request in list(running):
            done = request.answer[-1] in model.config.eos_token_ids
            if done or len(request.answer) == arguments.max_tokens:
                tables[request.name] = request.stored, list(request.table)
                pages.end(request)
                running.remove(request)
    for request in requests:
        stored, table = tables[request.name]
        print(f"{request.name}\n  {tokenizer.decode(request.answer, skip_special_tokens=True)}")
        print(f"  {stored} tokens in {len(table)} blocks of {arguments.block_size}: {table}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", nargs="*")
    parser.add_argument("--model", help="a folder or a name on the hub; the embedded model if none")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--block-size", type=int, default=16, help="of the 512 slots (default 16)")
    parser.add_argument("--in-order", action="store_true", help="hand out blocks 0, 1, 2, ...")
    parser.add_argument("--kernels", action="store_true", help="use the Triton kernels")
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
