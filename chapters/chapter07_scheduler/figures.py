"""The pictures of chapter 7, for its text and its notebook.

    python -m chapters.chapter07_scheduler.figures    # writes figures/*.svg beside this file

Every picture is drawn from the event log that the real scheduler wrote.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from chapters.chapter03_naive_attention.memory import workload
from chapters.chapter07_scheduler import toy
from chapters.chapter07_scheduler.gantt import Cell, gaps, rows
from minivllm.engine.events import Event, EventLog

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "notebooks"))

from drawing import EMPTY, INK, PALETTE, write_figures  # noqa: E402

BLUE, ORANGE, GREEN, RED = PALETTE[:4]


# ---- the chart -----------------------------------------------------------------------------------


def draw_charts(played: Mapping[str, toy.Played]) -> Figure:
    """One chart for each policy, below each other and on the same scale of steps."""
    longest = max(one.steps for one in played.values())
    figure, axes = plt.subplots(
        len(played), figsize=(9.2, 1.75 * len(played) + 0.5), squeeze=False, sharex=True
    )
    for ax, (policy, one) in zip(axes[:, 0], played.items(), strict=True):
        events = one.events.events
        gap = max(gaps(events)["ann"])
        ax.set_title(f"{policy}: ann's longest gap is {gap} tokens", fontsize=9.5)
        draw_chart(ax, rows(events), longest)
    axes[-1, 0].set_xlabel("step", fontsize=9)
    axes[-1, 0].legend(
        handles=_legend(), loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=5, fontsize=8
    )
    figure.tight_layout(h_pad=1.4)
    return figure


def draw_chart(ax: Axes, found: Mapping[str, Mapping[int, Cell]], steps: int) -> None:
    """A row for each request, a column for each step; a number is how many tokens of it ran."""
    for row, cells in enumerate(found.values()):
        for step, cell in cells.items():
            box = (step + 0.06, row + 0.12, 0.88, 0.76)
            if cell.kind in ("prefill", "decode"):
                colour = ORANGE if cell.kind == "prefill" else BLUE
                ax.add_patch(Rectangle(box[:2], *box[2:], fc=colour, ec="none"))
                style = {"color": "white", "fontsize": 7.5, "weight": "bold"}
                if cell.tokens > 1:
                    ax.text(step + 0.5, row + 0.5, cell.tokens, ha="center", va="center", **style)
            elif cell.kind == "idle":
                ax.add_patch(
                    Rectangle(box[:2], *box[2:], fc="none", ec=BLUE, lw=1.2, ls=(0, (2, 2)))
                )
            elif cell.kind == "preempted":
                ax.plot(step + 0.5, row + 0.5, marker="X", ms=10, color=RED)
        waits = [step for step, cell in cells.items() if cell.kind == "waiting"]
        for _, run in groupby(enumerate(waits), key=lambda pair: pair[1] - pair[0]):
            found_steps = [step for _, step in run]
            left, right = found_steps[0] + 0.1, found_steps[-1] + 0.9
            ax.plot([left, right], [row + 0.5] * 2, color=INK, lw=1.2, ls=(0, (1, 2)))
    ax.set(xlim=(-0.1, steps + 0.1), ylim=(len(found) + 0.05, -0.05))
    ax.set_yticks([row + 0.5 for row in range(len(found))], found, fontsize=9)
    ax.set_xticks([step + 0.5 for step in range(0, steps, 2)], range(0, steps, 2), fontsize=8)
    ax.tick_params(length=0, labelbottom=True)
    ax.spines[:].set_visible(False)


def _legend() -> list[Patch | Line2D]:
    return [
        Patch(fc=ORANGE, label="prompt, tokens of it"),
        Patch(fc=BLUE, label="decode"),
        Patch(fc="none", ec=BLUE, ls=(0, (2, 2)), label="holds blocks, does not run"),
        Line2D([], [], color=INK, lw=1.2, ls=(0, (1, 2)), label="waits"),
        Line2D([], [], ls="", marker="X", ms=8, color=RED, label="preempted"),
    ]


# ---- what a step is filled with, and the pool ----------------------------------------------------


def draw_steps(logs: Mapping[str, Sequence[Event]], num_blocks: int, budget: int) -> Figure:
    """For each log: tokens of every step, prompts on decodes; below, the blocks held."""
    figure, axes = plt.subplots(2, len(logs), figsize=(9.2, 3.6), sharex="col", sharey="row")
    for (above, below), (name, events) in zip(axes.T, logs.items(), strict=True):
        count = {"prefill": {}, "decode": {}}
        held = {}
        for event in events:
            if event.kind in count:
                of_kind = count[event.kind]
                of_kind[event.step] = of_kind.get(event.step, 0) + event["tokens"]
            elif event.kind == "step ended":
                held[event.step] = event["held"]
        steps = range(max(held) + 1)
        decodes = [count["decode"].get(step, 0) for step in steps]
        prompts = [count["prefill"].get(step, 0) for step in steps]
        above.bar(steps, decodes, color=BLUE, width=0.9, label="decodes")
        above.bar(steps, prompts, bottom=decodes, color=ORANGE, width=0.9, label="prompts")
        above.axhline(budget, color=INK, lw=1, ls=(0, (4, 2)))
        above.set_title(name, fontsize=9.5)
        below.bar(steps, [held[step] for step in steps], color=GREEN, width=0.9)
        below.axhline(num_blocks, color=INK, lw=1, ls=(0, (4, 2)))
        for event in events:
            if event.kind == "preempted":
                below.plot(event.step, num_blocks + 0.6, marker="X", ms=7, color=RED, clip_on=False)
        below.set_xlabel("step", fontsize=9)
    axes[0, 0].set_ylabel("tokens in the step", fontsize=9)
    axes[1, 0].set_ylabel("blocks held", fontsize=9)
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    return figure


# ---- static and continuous -----------------------------------------------------------------------


def draw_batches(answers: Sequence[int], places: int) -> Figure:
    """The same answers in static batches and in continuous ones: a bar for each answer."""
    figure, axes = plt.subplots(2, figsize=(9.2, 3.8), sharex=True)
    static = static_starts(answers, places)
    continuous = continuous_starts(answers, places)
    for ax, name, found in zip(axes, ("static", "continuous"), (static, continuous), strict=True):
        end = max(begun + new for (_, begun), new in zip(found, answers, strict=True))
        used = sum(answers) / (end * places)
        ax.set_title(f"{name}: {end:,} steps, {used:.0%} of the places at work", fontsize=9.5)
        ax.add_patch(Rectangle((0, 0), end, places, fc=EMPTY, ec="none"))
        for index, ((place, begun), new) in enumerate(zip(found, answers, strict=True)):
            colour = PALETTE[index % len(PALETTE)]
            ax.add_patch(Rectangle((begun, place + 0.08), new - 3, 0.84, fc=colour, ec="none"))
        ax.set(ylim=(places, 0), yticks=[], ylabel="places")
    longest = max(begun + new for (_, begun), new in zip(static, answers, strict=True))
    axes[1].set(xlabel="step", xlim=(0, longest))
    figure.tight_layout()
    return figure


def static_starts(answers: Sequence[int], places: int) -> list[tuple[int, int]]:
    """(place, first step) of each answer, when a batch waits for its longest answer."""
    found, begun = [], 0
    for start in range(0, len(answers), places):
        batch = answers[start : start + places]
        found += [(place, begun) for place in range(len(batch))]
        begun += max(batch)
    return found


def continuous_starts(answers: Sequence[int], places: int) -> list[tuple[int, int]]:
    """(place, first step) of each answer on the real scheduler, from its event log."""
    from chapters.chapter06_block_manager.driver import Request
    from minivllm.engine.block_manager import BlockManager
    from minivllm.engine.scheduler import Scheduler

    log = EventLog()
    manager = BlockManager(sum(answers), 16, events=log)
    scheduler = Scheduler(
        manager, max_num_seqs=places, max_num_batched_tokens=places, policy="mixed", events=log
    )
    for arrival, new in enumerate(answers):
        scheduler.add(Request(str(arrival), [arrival], new).sequence(arrival))
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        scheduler.commit(step, [0] * len(step.sampling))
    found: dict[str, tuple[int, int]] = {}
    free = list(range(places))
    for event in log.of("admitted", "finished"):
        if event.kind == "admitted":
            found[event.request_id] = (free.pop(0), event.step)
        else:
            free.append(found[event.request_id][0])
            free.sort()
    return [found[str(index)] for index in range(len(answers))]


def some_answers(count: int = 24) -> list[int]:
    """The lengths of the first answers of chapter 3's workload."""
    return [new for _, new in workload()][:count]


# ---- in milliseconds -----------------------------------------------------------------------------


def draw_waits(waits: Mapping[str, Sequence[float]]) -> Figure:
    """name -> seconds from each of ann's tokens to her next, as a line each."""
    figure, axes = plt.subplots(1, len(waits), figsize=(9.2, 2.4), sharey=True)
    for ax, (name, found) in zip(axes, waits.items(), strict=True):
        colours = [RED if one == max(found) else BLUE for one in found]
        ax.bar(range(len(found)), [1e3 * one for one in found], color=colours, width=0.9)
        ax.set_title(f"{name}\nlongest {1e3 * max(found):.0f} ms", fontsize=9)
        ax.set_xlabel("ann's tokens", fontsize=9)
        ax.grid(axis="y")
    axes[0].set_ylabel("ms to the next", fontsize=9)
    figure.tight_layout()
    return figure


def draw_throughput(batches: Sequence[int], tokens_per_second: Sequence[float]) -> Figure:
    """Tokens a second by the size of the batch, and what they would be if steps cost the same."""
    figure, ax = plt.subplots(figsize=(6, 2.8))
    ideal = [tokens_per_second[0] * batch / batches[0] for batch in batches]
    ax.plot(batches, ideal, color=INK, lw=1.2, ls=(0, (4, 2)), label="if every step cost the same")
    ax.plot(batches, tokens_per_second, marker="o", label="measured")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(batches, batches)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set(xlabel="sequences at once", ylabel="tokens a second")
    ax.grid()
    ax.legend(fontsize=8.5)
    return figure


def all_figures() -> dict[str, Figure]:
    """The figures of the text, by file name."""
    played = {policy: toy.play(policy) for policy in ("prefill_first", "mixed")}
    return {"gantt.svg": draw_charts(played)}


def main(folder: Path = FOLDER / "figures") -> None:
    write_figures(all_figures, folder)


if __name__ == "__main__":
    main()
