"""The measured tables of the text, made from ``attention_prefill_h200.json``.

python -m chapters.chapter04_flash_attention.results            # print them
python -m chapters.chapter04_flash_attention.results --write    # put them into README.md
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MEASURED = FOLDER / "attention_prefill_h200.json"
TEXT = FOLDER / "README.md"

# The benchmark's names of the forms, and the text's.
FORMS = {
    "PyTorch, all scores": "naive attention, PyTorch",
    "Triton, all scores": "naive attention, chapter 3's kernel",
    "Triton, tiles": "your kernel",
    "Hopper": "the Hopper kernel",
    "SDPA flash": "PyTorch's own, flash backend",
    "SDPA cuDNN": "PyTorch's own, cuDNN",
}
_PLACE = re.compile(r"(<!-- measured (\w+) -->\n)(?:.*?\n)?(<!-- end of measured -->)", re.DOTALL)


def measured() -> dict[str, Any]:
    """What ``minivllm bench prefill`` wrote."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def speed_table(result: dict[str, Any]) -> str:
    """TFLOP/s of each form by length, as Markdown, and what they were measured with."""
    lengths = sorted({record["length"] for record in result["records"]})
    rates = {(r["form"], r["length"]): r["tflop_per_s"] for r in result["records"]}
    lines = [
        f"| TFLOP/s | {' | '.join(f'{length:,}' for length in lengths)} |",
        "|---|" + "---|" * len(lengths),
    ]
    for form, name in FORMS.items():
        cells = [_short(rates.get((form, length))) for length in lengths]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shape, versions = result["shape"], result["versions"]
    ceiling = result["ceilings"]["matmul_flop_per_s"] / 1e12
    lines += [
        "",
        f"{result['device']}, bfloat16, {shape['num_heads']} query heads on "
        f"{shape['num_kv_heads']} KV heads of {shape['head_size']}, prompts of 256 to 16,384 "
        "tokens, 16,384 in all; medians of CUDA graphs. A large matrix product reaches "
        f"{ceiling:.0f} TFLOP/s there. {_checked(result)}torch {versions['torch']}, "
        f"triton {versions['triton']}, {result['date'].split()[0]}.",
    ]
    return "\n".join(lines)


def _checked(result: dict[str, Any]) -> str:
    """What the same run found of the two kernels' errors, if it looked."""
    found = [c for c in result.get("checks", ()) if c["kernel"].startswith("flash_attention")]
    if not found:
        return ""
    worst = max(check["ratio"] for check in found)
    return (
        f"In the same run, in {len(found)} checks, the two kernels' error against float64 was at "
        f"most {worst:.2f} times that of PyTorch's own. "
    )


def _short(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.0f}"


TABLES = {"speed": speed_table}


def filled(text: str, result: dict[str, Any]) -> str:
    """``text`` with every measured table made anew."""
    return _PLACE.sub(lambda place: place[1] + TABLES[place[2]](result) + "\n" + place[3], text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    arguments = parser.parse_args(argv)
    result = measured()
    if arguments.write:
        text = TEXT.read_text(encoding="utf-8")
        TEXT.write_text(filled(text, result), encoding="utf-8")
    else:
        print("\n\n".join(table(result) for table in TABLES.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
