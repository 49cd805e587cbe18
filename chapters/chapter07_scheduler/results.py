"""The measured tables of chapter 7's text, made from the reports beside this file.

    python -m chapters.chapter07_scheduler.results    # writes them into README.md

``measure --json`` makes the CPU's report, ``minivllm bench serve-sim --shapes Qwen3-0.6B --policy
POLICY --output served_h200_POLICY.json`` the GPU's, one for each policy.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
RESULT = FOLDER / "served_cpu.json"
POLICIES = ("prefill_first", "mixed")


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
    return {"batches": "\n".join(batches), "gaps": "\n".join(gaps), "arrivals": arrivals()}


def arrivals() -> str:
    """Requests that arrive over time on a GPU, by policy."""
    rows = [
        "| policy | requests a second | first token | its p99 | usual gap | p99 | longest |",
        "|---|---|---|---|---|---|---|",
    ]
    for policy in POLICIES:
        report = json.loads((FOLDER / f"served_h200_{policy}.json").read_text(encoding="utf-8"))
        for run in report["runs"]:
            first, between = run["first_token_ms"], run["between_tokens_ms"]
            cells = [first["p50"], first["p99"], between["p50"], between["p99"], between["p100"]]
            numbers = " | ".join(f"{cell:.1f}" for cell in cells)
            rows.append(f"| {policy} | {run['rate_per_s']:.0f} | {numbers} |")
    load = report["arrivals"]
    return "\n".join(
        [
            *rows,
            "",
            f"({load['requests']} requests a rate, {load['long_requests']} of them long; "
            f"{report['model']}, chapter 8's runner; {report['device']}, {report['date'][:10]}.)",
        ]
    )


if __name__ == "__main__":
    from chapters.machine.texts import replace_block

    for name, text in tables().items():
        replace_block(FOLDER / "README.md", name, text)
