"""Text on the screen: the prompt goes through your tiles, the answer through chapter 3's cache.

    python -m chapters.chapter04_flash_attention.say "what is a block table?"
    python -m chapters.chapter04_flash_attention.say --workspace --tile 16
    python -m chapters.chapter04_flash_attention.say --workspace --kernel

``--kernel`` takes the Triton kernel; without a GPU that is Triton's interpreter, and a few seconds.
``--workspace`` runs your own code instead of the reference.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chapters import ROOT
from chapters.machine import asking
from chapters.machine.asking import QUESTION


def chosen_form(kernel: bool, tile: int) -> Callable[..., Any]:
    """The function that attends in tiles: the kernel, or PyTorch with tiles of ``tile``."""
    if not kernel:
        from minivllm.attention.flash import flash_attention

        return functools.partial(flash_attention, tile=tile)
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported
        sys.path.append(str(ROOT / "notebooks"))
        from recorder import patch_interpreter

        patch_interpreter()
    from minivllm.attention import flash_kernels

    return flash_kernels.flash_attention


def generate(
    model: Any, prompt: list[int], max_tokens: int, form: Callable[..., Any]
) -> Iterator[int]:
    """Yield greedy tokens: one prefill in tiles that also fills a cache, then one token a step."""
    import torch

    from minivllm.attention.flash import FlashAttention
    from minivllm.attention.naive import CachedNaiveAttention, ContiguousKVCache

    config, weight = model.config, model.lm_head.weight
    scale = config.head_size**-0.5
    cache = ContiguousKVCache(
        config, 1, len(prompt) + max_tokens, dtype=weight.dtype, device=weight.device
    )
    in_tiles = FlashAttention([0, len(prompt)], scale, form=form, device=weight.device)

    def prefill(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache.store(layer, 0, 0, k, v)
        return in_tiles(layer, q, k, v)

    new, start, attend = list(prompt), 0, prefill
    for _ in range(max_tokens):
        input_ids = torch.tensor(new, device=weight.device)
        positions = torch.arange(start, start + len(new), device=weight.device)
        with torch.inference_mode():
            hidden = model(input_ids, positions, attend)
            token = int(model.compute_logits(hidden[-1:]).argmax())
        yield token
        if token in config.eos_token_ids:
            return
        start += len(new)
        new = [token]
        attend = CachedNaiveAttention(cache, [0], [start], [0, 1], scale)


def say(arguments: argparse.Namespace) -> None:
    """Load a model, ask it, print the answer and what it cost."""
    import torch

    form = chosen_form(arguments.kernel, arguments.tile)
    model, tokenizer = asking.load(arguments.model)
    prompt = asking.chat_prompt(tokenizer, arguments.question)
    calls: list[tuple[int, float]] = []

    def counted(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        began = time.perf_counter()
        out = form(q, *args, **kwargs)
        calls.append((len(q), time.perf_counter() - began))
        return out

    answer = generate(model, prompt, arguments.max_tokens, counted)
    tokens, _ = asking.print_as_it_comes(answer, asking.decoder(tokenizer))
    how = "the kernel" if arguments.kernel else f"tiles of {arguments.tile}"
    print(
        f"\n{calls[0][0]} prompt tokens through {how} in {len(calls)} layers, "
        f"{sum(seconds for _, seconds in calls):.2f} s; {len(tokens)} new ones from the cache"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = asking.ask_parser(__doc__)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--tile", type=int, default=16, help="queries and keys a step (16)")
    parser.add_argument("--kernel", action="store_true", help="the Triton kernel")
    return asking.run(say, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
