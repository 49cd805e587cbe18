"""The measured tables of chapter 7's text, made from the report beside this file.

    python -m chapters.chapter07_scheduler.results    # writes them into README.md

``measure --json`` makes the report.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
RESULT = FOLDER / "served_cpu.json"


def tables() -> dict[str, str]:
    """The name of each table in the text, and the table in Markdown."""
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    batches = ["| at once | steps | tokens a second |", "|---|---|---|"]
    done = content["throughput"]
    for row in done:
        batches.append(f"| {row['batch']} | {row['steps']:,} | {row['tokens_per_second']:,.0f} |")
    step_ms = {row["batch"]: row["batch"] / row["tokens_per_second"] * 1e3 for row in done}
    batches += [
        "",
        f"Each doubling halves the steps, but a step of 4 takes {step_ms[4]:.1f} ms where a step "
        f"of 1 takes {step_ms[1]:.1f}: reading the weights and starting the operations costs the "
        f"same for all. At 32 it is {step_ms[32]:.1f} ms, and the arithmetic begins to count.",
    ]
    gaps = [
        "| policy | tokens a step | usual gap | longest gap | first token |",
        "|---|---|---|---|---|",
    ]
    for row in content["served"]:
        gaps.append(
            f"| {row['policy']} | {row['budget']:,} | {row['usual_gap']:.1f} "
            f"| {row['longest_gap']:.0f} | {row['first_token']:.0f} |"
        )
    torch, date = content["versions"]["torch"], content["date"].split()[0]
    gaps += ["", f"Both: {content['device']}; CPU seconds, float32, torch {torch}, {date}."]
    return {"batches": "\n".join(batches), "gaps": "\n".join(gaps)}


if __name__ == "__main__":
    from chapters.machine.texts import replace_block

    for name, text in tables().items():
        replace_block(FOLDER / "README.md", name, text)
