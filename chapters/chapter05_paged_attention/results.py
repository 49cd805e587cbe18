"""The measured table of chapter 5's text, made from ``attention_decode_h200.json``.

    python -m chapters.chapter05_paged_attention.results            # print it
    python -m chapters.chapter05_paged_attention.results --write    # put it into README.md

``minivllm bench decode --output FOLDER`` on a GPU makes the file. A test compares text and file.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULT, TEXT = FOLDER / "attention_decode_h200.json", FOLDER / "README.md"
HEADS = (16, 8)
FORMS = {
    "PyTorch, loop": "loop",
    "PyTorch, gather": "gather",
    "Triton, a sequence each": "a sequence each",
    "Triton, equal shares": "equal shares",
    "SDPA, contiguous": "PyTorch's own, not paged",
}
POINTS = {
    "512 x 1": "1 of 512",
    "16384 x 1": "1 of 16,384",
    "4096 x 8": "8 of 4,096",
    "1024 x 256": "256 of 1,024",
    "4096 x 256": "256 of 4,096",
    "ragged x 256": "256 of 100 to 2,000",
    "31 x 300, 16384": "31 of 300, 1 of 16,384",
}
_BLOCK = re.compile(r"(<!-- measured decode -->\n).*?(\n<!-- end of measured -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """GB/s of keys and values by batch and form, what the machine can do, and two times."""
    records = {(r["point"], r["form"]): r for r in _of_the_heads(result)}
    lines = [f"| sequences and their tokens | {' | '.join(FORMS.values())} |"]
    lines.append("|---|" + "---|" * len(FORMS))
    for point, name in POINTS.items():
        found = [records.get((point, form)) for form in FORMS]
        cells = ["" if record is None else _short(record["gb_per_s"]) for record in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    def times(point: str) -> tuple[str, str]:
        forms = ("Triton, a sequence each", "Triton, equal shares")
        each, shares = (records[point, form]["seconds"] * 1e6 for form in forms)
        return f"{each:,.0f} µs", f"{shares:,.0f}"

    lone, mixed = times("16384 x 1"), times("31 x 300, 16384")
    versions = result["versions"]
    lines += [
        "",
        f"{result['device']}, {HEADS[0]} query and {HEADS[1]} KV heads of "
        f"{result['shape']['head_size']} numbers, bfloat16, pages of "
        f"{result['shape']['block_size']}; torch {versions['torch']}, triton {versions['triton']}, "
        f"{result['date'][:10]}. The machine copies "
        f"{_short(result['ceilings']['copy_bytes_per_s'] / 1e9)} GB/s. A layer with one sequence "
        f"of 16,384 tokens takes {lone[0]} with a program for each KV head and {lone[1]} in equal "
        f"shares; beside 31 sequences of 300 tokens, {mixed[0]} and {mixed[1]}.",
    ]
    return "\n".join(lines)


def _of_the_heads(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a layer with HEADS; a record names its heads where a run had several."""
    return [
        record
        for record in result["records"]
        if (record.get("num_heads", HEADS[0]), record.get("num_kv_heads", HEADS[1])) == HEADS
    ]


def _short(rate: float) -> str:
    return f"{rate:.1f}" if rate < 10 else f"{rate:,.0f}"


def filled(text: str, result: dict[str, Any]) -> str:
    """``text`` with the table between its markers made anew."""
    if len(_BLOCK.findall(text)) != 1:
        raise ValueError(
            "README.md needs <!-- measured decode --> and <!-- end of measured -->, once"
        )
    return _BLOCK.sub(lambda match: match[1] + table(result) + match[2], text)


def read() -> dict[str, Any]:
    """The measured results."""
    return json.loads(RESULT.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    arguments = parser.parse_args(argv)
    if not arguments.write:
        print(table(read()))
        return 0
    text = TEXT.read_text(encoding="utf-8")
    new = filled(text, read())
    TEXT.write_text(new, encoding="utf-8")
    print("README.md was out of date" if new != text else "README.md is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
