"""The measured table of chapter 6's text, made from the report beside this file.

    python -m chapters.chapter06_block_manager.results    # writes it into README.md

``measure --json`` makes the report.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
RESULT = FOLDER / "first_token_cpu.json"
MARK = "tokens"


def table() -> str:
    """The times to the first token, as a Markdown table."""
    from chapters.chapter06_block_manager.measure import LENGTH

    rows = ["| found | tokens that run | to admit | to the first token |", "|---|---|---|---|"]
    for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]:
        found, left = row["found"], LENGTH - row["found"]
        rows.append(f"| {found:,} | {left:,} | {row['admit']:.2f} | {row['run']:.0f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    from chapters.machine.texts import replace_block

    replace_block(FOLDER / "README.md", MARK, table())
