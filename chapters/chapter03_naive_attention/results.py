"""The measured tables of the chapter's text, made from the JSON files beside it.

    python -m chapters.chapter03_naive_attention.results    # writes them into README.md

``measure --keep`` and ``compare --keep`` measure, write the file of this device, and then this.
"""

import json
from pathlib import Path
from typing import Any

from chapters.machine.texts import replace_block

FOLDER = Path(__file__).parent
STEPS = {"CPU": "steps_cpu.json", "GPU": "steps_gpu.json"}
FORMS = "forms_gpu.json"
NAMES = {"scaled_dot_product_attention": "PyTorch's own"}


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def steps_table() -> str:
    """Milliseconds for the next token, recomputing and with the cache, on each device."""
    found = {kind: read(name) for kind, name in STEPS.items()}
    times = {
        (kind, way): {row["length"]: row[key] for row in content["rows"]}
        for kind, content in found.items()
        for way, key in (("recomputing", "recomputing"), ("cache", "cached"))
    }
    lines = ["| tokens so far | " + " | ".join(f"{kind}, {way}" for kind, way in times) + " |"]
    lines.append("|---|" + "---|" * len(times))
    for length in sorted(set().union(*times.values())):
        cells = [short(column[length]) if length in column else "" for column in times.values()]
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    origins = [f"{kind}: {origin(content)}" for kind, content in found.items()]
    return "\n".join([*lines, "", ". ".join(origins) + "."])


def forms_table() -> str:
    """Milliseconds of naive attention in PyTorch, as one kernel, and of PyTorch's own."""
    content = read(FORMS)
    times = {(row["length"], row["form"]): row["ms"] for row in content["rows"]}
    forms = list(dict.fromkeys(form for _, form in times))
    lines = [f"| tokens each | {' | '.join(NAMES.get(form, form) for form in forms)} |"]
    lines.append("|---|" + "---|" * len(forms))
    for length in dict.fromkeys(length for length, _ in times):
        cells = [f"{short(times[length, form])} ms" for form in forms]
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{origin(content)}, bfloat16."])


def origin(content: dict[str, Any]) -> str:
    """What a number has to be read with."""
    versions = content["versions"]
    return f"{content['device']}; torch {versions['torch']}, {content['date'].split()[0]}"


def short(milliseconds: float) -> str:
    """Three digits, for the fourth is noise."""
    if milliseconds >= 99.5:
        return f"{milliseconds:,.0f}"
    return f"{milliseconds:.{1 if milliseconds >= 9.95 else 2 if milliseconds >= 0.995 else 3}f}"


def main() -> None:
    replace_block(FOLDER / "README.md", "steps", steps_table())
    replace_block(FOLDER / "README.md", "forms", forms_table())


if __name__ == "__main__":
    main()
