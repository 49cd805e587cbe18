"""``minivllm bench serve-sim``: requests that arrive over time, served in real time.

Arrivals are a Poisson process. What counts is what each user sees: how long until the first token,
how evenly the others follow, and whether short requests pay for long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minivllm.benchmarks.arrivals import Arrival, Served, alone, poisson_arrivals, serve, summarise
from minivllm.benchmarks.harness import format_table
from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.benchmarks.svg import Line, line_charts, write_svg
from minivllm.benchmarks.throughput import build
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.scheduler import POLICIES

# Shares of what the engine serves when all requests are there at once.
DEFAULT_LOADS = (0.3, 0.6, 0.9)


def run_serve_sim(
    settings: dict[str, Any],
    *,
    shapes: str | None,
    rates: Sequence[float] | None,
    num_requests: int,
    seed: int,
    ttft_limit_ms: float,
    itl_limit_ms: float,
    output: str | None,
    plot: str | None,
) -> dict[str, Any]:
    """Serve the same requests at each rate under each policy; print, draw and write the figures.

    settings: keywords of :class:`minivllm.LLM`; a ``policy`` among them is the only one measured.
    rates: requests a second; by default shares of what is served when all come at once.
    """
    policies = [settings["policy"]] if settings.get("policy") else list(POLICIES)
    runs: list[dict[str, Any]] = []
    ideals: dict[str, Any] = {}
    capacity = None
    facts: dict[str, Any] = {}
    for policy in policies:
        llm, ready = build({**settings, "policy": policy}, shapes)
        with llm:
            engine = llm.engine
            assert engine.runner is not None
            on_gpu = engine.runner.device.type == "cuda"
            work = {
                "scale": 4 if on_gpu else 1,
                "vocab_size": engine.model_config.vocab_size,
                "seed": seed,
            }
            burst = poisson_arrivals(num_requests, 1e9, **work)
            # Compiled kernels and warm buffers first; then what the engine can do at most.
            serve(engine, burst)
            ideal = alone(engine, burst)
            if capacity is None:
                capacity = num_requests / max(one.times[-1] for one in serve(engine, burst))
                rates = list(rates) if rates else [capacity * load for load in DEFAULT_LOADS]
                facts = {
                    "scale": work["scale"],
                    "input_tokens": sum(len(each.prompt) for each in burst),
                    "output_tokens": sum(each.max_tokens for each in burst),
                    "long_requests": sum(each.long for each in burst),
                }
            ideals[policy] = {
                "long" if long else "short": {"first_token_ms": 1e3 * a, "a_token_ms": 1e3 * b}
                for long, (a, b) in ideal.items()
            }
            assert rates is not None
            for rate in rates:
                runs.append(
                    {
                        "policy": policy,
                        "rate_per_s": rate,
                        "ready_seconds": ready,
                        **summarise(
                            _serve_with_bar(
                                engine, poisson_arrivals(num_requests, rate, **work), policy, rate
                            ),
                            ideal,
                            ttft_limit_s=ttft_limit_ms / 1e3,
                            itl_limit_s=itl_limit_ms / 1e3,
                        ),
                    }
                )
    report = {
        "benchmark": "serve-sim",
        "model": shapes or str(settings.get("model") or "the embedded tiny Qwen3"),
        "arrivals": {
            "description": " ".join((poisson_arrivals.__doc__ or "").split()),
            "requests": num_requests,
            "seed": seed,
            **facts,
        },
        "limits": {"first_token_ms": ttft_limit_ms, "a_token_ms": itl_limit_ms},
        "served_per_s_all_at_once": capacity,
        "alone": ideals,
        "runs": runs,
    }
    print(_table(runs))
    print(
        f"all at once: {capacity:.2f} requests/s; good: first token within {ttft_limit_ms:g} ms "
        f"and {itl_limit_ms:g} ms a token; on {machine_facts()['device']}"
    )
    write_report(output, report)
    write_svg(plot, draw({**machine_facts(), **report}))
    return report


def draw(report: dict[str, Any]) -> str:
    """Time to the first token, between tokens, and goodput, by rate and policy."""
    runs = report["runs"]
    policies = list(dict.fromkeys(run["policy"] for run in runs))

    def lines(name: str, shares: Sequence[str]) -> list[Line]:
        return [
            Line(
                f"{policy}, {share}",
                [
                    (run["rate_per_s"], run[name][share])
                    for run in sorted(runs, key=lambda run: run["rate_per_s"])
                    if run["policy"] == policy and run[name][share] is not None
                ],
                colour=number,
                dashed=share == "p99",
            )
            for number, policy in enumerate(policies)
            for share in shares
        ]

    goodput = [
        Line(
            policy,
            sorted(
                (run["rate_per_s"], run["goodput_per_s"]) for run in runs if run["policy"] == policy
            ),
            colour=number,
        )
        for number, policy in enumerate(policies)
    ]
    limits = report["limits"]
    return line_charts(
        "Requests that arrive over time",
        [
            ("first token, ms", lines("first_token_ms", ("p50", "p99"))),
            ("between tokens, ms", lines("between_tokens_ms", ("p50", "p99"))),
            ("goodput, requests/s", goodput),
        ],
        x_label="requests a second",
        notes=[
            f"{report['model']} on {report['device']}, {report['date']}",
            f"{report['arrivals']['requests']} requests a run; good: first token within "
            f"{limits['first_token_ms']:g} ms and {limits['a_token_ms']:g} ms a token",
        ],
    )


def _serve_with_bar(
    engine: LLMEngine, arrivals: Sequence[Arrival], policy: str, rate: float
) -> list[Served]:
    from tqdm.auto import tqdm

    with tqdm(total=len(arrivals), desc=f"{policy}, {rate:.3g}/s", unit="req") as bar:
        return serve(engine, arrivals, bar)


def _table(runs: Sequence[dict[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"

    rows = [
        [
            run["policy"],
            number(run["rate_per_s"]),
            *(number(run["first_token_ms"][share]) for share in ("p50", "p90", "p99")),
            *(number(run["between_tokens_ms"][share]) for share in ("p50", "p90", "p99")),
            number(run["goodput_per_s"]),
            f"{run['good_share']:.0%}",
            number(run["slowdown"]["short"]["p50"]),
            number(run["slowdown"]["long"]["p50"]),
            f"{run['fairness']:.2f}",
        ]
        for run in runs
    ]
    headers = [
        "policy",
        "requests/s",
        *("first ms p50", "p90", "p99"),
        *("between ms p50", "p90", "p99"),
        *("good/s", "good", "slowdown short", "long", "fairness"),
    ]
    return format_table(headers, rows)
