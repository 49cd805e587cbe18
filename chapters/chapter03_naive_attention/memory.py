"""What a contiguous KV cache takes, how much of it is used, and what the scores take.

    python -m chapters.chapter03_naive_attention.memory

Pure arithmetic; the tests hold it against the cache itself.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class Sizes:
    """What of a model's ``config.json`` counts for its cache."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


MODELS = {
    "Qwen3-0.6B": Sizes(28, 16, 8, 128),
    "Qwen3-8B": Sizes(36, 32, 8, 128),
}
POSITIONS = 40_960  # the max_position_embeddings of both


def bytes_per_token(model: Sizes, element_size: int = 2) -> int:
    """K and V of one token in all layers, in bytes; an element of bfloat16 has 2."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_size * element_size


def score_bytes(model: Sizes, tokens: int) -> int:
    """One layer's float32 scores of a prompt: [H, T, T]."""
    return model.num_heads * tokens * tokens * 4


def workload() -> list[tuple[int, int]]:
    """256 requests of 100 to 1,024 prompt and 100 to 1,024 new tokens: a usual benchmark."""
    generator = random.Random(0)
    return [(generator.randint(100, 1024), generator.randint(100, 1024)) for _ in range(256)]


def share_used(requests: Sequence[tuple[int, int]], max_len: int) -> float:
    """The mean share of a reserved row that holds tokens, while its request runs.

    requests: (prompt, new) token counts. Step s of a request, counted from 0, leaves prompt + s
    tokens in its row, for the last token that comes out is never stored.
    """
    steps = sum(new for _, new in requests)
    held = sum(prompt * new + new * (new - 1) // 2 for prompt, new in requests)
    return held / (steps * max_len)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", type=float, default=64, help="GiB for the cache")
    arguments = parser.parse_args(argv)
    print("bytes for one token: 2 (K and V) x layers x KV heads x head size x 2 (bfloat16)")
    for name, model in MODELS.items():
        print(
            f"  {name:<11} 2 x {model.num_layers} x {model.num_kv_heads} x {model.head_size} x 2"
            f" = {bytes_per_token(model):>7,}"
            f"    a row of {POSITIONS:,} tokens: {POSITIONS * bytes_per_token(model) / GIB:.2f} GiB"
        )
    requests = workload()
    print(f"\n{len(requests)} requests of 100 to 1,024 tokens in and out on Qwen3-0.6B,")
    print(f"{arguments.memory:g} GiB of cache, a row for each running request:")
    print(f"  {'max_len':>7}  {'rows':>5}  {'reserved, GiB':>13}  {'used':>5}")
    token = bytes_per_token(MODELS["Qwen3-0.6B"])
    for max_len in (2048, 4096, POSITIONS):
        rows = min(len(requests), int(arguments.memory * GIB) // (max_len * token))
        used = share_used(requests, max_len)
        reserved = rows * max_len * token / GIB
        print(f"  {max_len:>7,}  {rows:>5}  {reserved:>13.1f}  {used:>5.0%}")
    print("\nthe score matrix of one layer of Qwen3-0.6B, 16 x T x T x 4 bytes:")
    for tokens in (1024, 4096, 16_384, POSITIONS):
        taken = score_bytes(MODELS["Qwen3-0.6B"], tokens)
        print(f"  {tokens:>6,} tokens  {taken / GIB:>9.4g} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
