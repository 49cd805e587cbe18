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

from chapters.machine import asking
from chapters.machine.asking import QUESTION

QUESTIONS = (QUESTION, "introduce yourself")


def say(arguments: argparse.Namespace) -> None:
    """Load a model, ask it all questions in one batch, print the answers and their blocks."""
    import torch

    if arguments.kernels and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from chapters.chapter05_paged_attention.drive import Pages, Request, by_kernels, by_loop

    model, tokenizer = asking.load(arguments.model)
    requests = [
        Request(question, asking.chat_prompt(tokenizer, question))
        for question in arguments.questions or QUESTIONS
    ]
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
        print(f"{request.name}\n  {asking.decoder(tokenizer)(request.answer)}")
        print(f"  {stored} tokens in {len(table)} blocks of {arguments.block_size}: {table}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = asking.ask_parser(__doc__, max_tokens=100)
    parser.add_argument("questions", nargs="*")
    parser.add_argument("--block-size", type=int, default=16, help="of the 512 slots (default 16)")
    parser.add_argument("--in-order", action="store_true", help="hand out blocks 0, 1, 2, ...")
    parser.add_argument("--kernels", action="store_true", help="use the Triton kernels")
    return asking.run(say, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
