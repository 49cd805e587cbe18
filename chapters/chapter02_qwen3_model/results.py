"""The measured table of the chapter's text, made from figures/growth.json.

    python -m chapters.chapter02_qwen3_model.results    # writes it into README.md

``measure --keep`` measures, writes the file, and then this and the figure.
"""

import json
from pathlib import Path
from typing import Any

from chapters.machine.texts import replace_block

FOLDER = Path(__file__).parent
RESULT = FOLDER / "figures" / "growth.json"


def table(content: dict[str, Any]) -> str:
    """The time of the next token against the tokens before it, and what the last row means."""
    lines = ["| tokens so far | ms for the next token | rows computed | new rows |"]
    lines.append("|---|---|---|---|")
    times = {row["length"]: row["milliseconds"] for row in content["rows"]}
    for length, time in times.items():
        lines.append(f"| {length:,} | {short(time)} | {length:,} | 1 |")
    (first, shortest), (last, longest) = min(times.items()), max(times.items())
    lines += [
        "",
        f"The embedded model in float32 on one thread, {content['device']}, torch "
        f"{content['torch']}, {content['date']}, commit {content['commit']}; CPU time, median of "
        "5.",
        "",
        f"After {first:,} token{'s' * (first > 1)} a new row costs {short(shortest)} ms, after "
        f"{last:,} tokens {short(longest)} ms: {longest / shortest:,.0f} times as much, for the "
        f"other {last - 1:,} rows are computed again.",
    ]
    return "\n".join(lines)


def short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 99.5 else f"{milliseconds:.1f}"


def main() -> None:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    replace_block(FOLDER / "README.md", "growth", table(content))


if __name__ == "__main__":
    main()
