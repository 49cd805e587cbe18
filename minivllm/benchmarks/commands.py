"""``minivllm bench``: its commands, their flags, and what they call.

Nothing of PyTorch is imported before a command runs: --help and a mistyped flag need not wait.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from minivllm.cli_flags import (
    add_engine_flags,
    add_output_flag,
    add_plot_flag,
    add_shapes_flag,
    add_shapes_name,
    engine_settings,
    positive,
    positive_number,
)

# Have flags of their own, which they know only once PyTorch is imported.
ATTENTION_BENCHMARKS = {
    "prefill": "causal attention over prompts: our kernels beside PyTorch's",
    "decode": "attention of one token a sequence over pages: our kernels beside others",
    "check": "all attention kernels against float64",
}
OWN_FLAGS = {**ATTENTION_BENCHMARKS, "tensor-parallel": "one model on 1, 2, 4 ... GPUs"}


def run_with_own_flags(arguments: Sequence[str]) -> int:
    """Run one of :data:`OWN_FLAGS`; arguments: its name, then its flags. Returns the exit code."""
    if arguments[0] in ATTENTION_BENCHMARKS:
        from minivllm.benchmarks.attention import main as attention_main

        return attention_main(arguments)
    from minivllm.benchmarks.tensor_parallel import main as tensor_parallel_main

    return tensor_parallel_main(arguments[1:])


def add_benchmarks(benches: Any) -> None:
    """Add every benchmark to the subparsers of ``minivllm bench``."""
    _add_offline(benches)
    _add_scheduler(benches)
    _add_throughput(benches)
    _add_latency(benches)
    _add_ladder(benches)
    _add_serve_sim(benches)
    for name, summary in OWN_FLAGS.items():
        benches.add_parser(name, help=summary)


def _add_offline(benches: Any) -> None:
    offline = benches.add_parser(
        "offline", help="the demo's prompts, this engine beside transformers' generate"
    )
    offline.add_argument(
        "--repeat", type=positive, default=30, help="how often each prompt runs (30)"
    )
    offline.add_argument("--rounds", type=positive, default=3, help="measured pairs (3)")
    add_output_flag(offline)
    add_engine_flags(offline)
    offline.set_defaults(run=_run_offline)


def _add_scheduler(benches: Any) -> None:
    scheduler = benches.add_parser(
        "scheduler", help="simulate requests without a model: scheduling decisions a second"
    )
    scheduler.add_argument("--requests", type=positive, default=100_000, help="how many (100000)")
    add_output_flag(scheduler)
    scheduler.set_defaults(run=_run_scheduler)


def _add_throughput(benches: Any) -> None:
    throughput = benches.add_parser(
        "throughput", help="256 random requests at once: output tokens a second"
    )
    throughput.add_argument("--requests", type=positive, default=256, help="how many (256)")
    throughput.add_argument(
        "--most", type=positive, default=1024, help="most tokens in and out (1024)"
    )
    throughput.add_argument("--rounds", type=positive, default=2, help="how often all run (2)")
    throughput.add_argument("--profile", action="store_true", help="also profile decode steps")
    throughput.add_argument(
        "--peers", action="store_true", help="then vLLM, nano-vllm and transformers, if installed"
    )
    add_plot_flag(throughput)
    add_shapes_flag(throughput)
    throughput.set_defaults(run=_run_throughput)


def _add_latency(benches: Any) -> None:
    latency = benches.add_parser("latency", help="time to the first token and between tokens")
    latency.add_argument("--batch", type=positive, nargs="+", default=[1, 8, 32], help="1 8 32")
    latency.add_argument("--input", type=positive, default=128, help="tokens of a prompt (128)")
    latency.add_argument("--tokens", type=positive, default=256, help="tokens of an answer (256)")
    add_shapes_flag(latency)
    latency.set_defaults(run=_run_latency)


def _add_ladder(benches: Any) -> None:
    ladder = benches.add_parser(
        "ladder", help="the same prompts by every chapter's way: output tokens a second"
    )
    ladder.add_argument("--requests", type=positive, help="how many (128; 32 on a CPU)")
    ladder.add_argument("--batch", type=positive, help="sequences at a time (32; 8 on a CPU)")
    ladder.add_argument(
        "--subset",
        type=positive,
        default=4,
        help="requests of the chapters that serve one by one (4)",
    )
    ladder.add_argument("--rounds", type=positive, default=3, help="of each, unless it is slow (3)")
    ladder.add_argument("--model", help="a folder or hub name (the embedded tiny Qwen3)")
    ladder.add_argument("--device", help="cpu, cuda or cuda:N (the GPU if there is one)")
    ladder.add_argument("--dtype", help="float32, float16 or bfloat16")
    add_shapes_name(ladder)
    add_output_flag(ladder)
    add_plot_flag(ladder)
    ladder.set_defaults(run=_run_ladder)


def _add_serve_sim(benches: Any) -> None:
    serve_sim = benches.add_parser(
        "serve-sim", help="requests that arrive over time: waiting times, goodput, fairness"
    )
    serve_sim.add_argument(
        "--rates",
        type=positive_number,
        nargs="+",
        help="requests a second (0.3, 0.6, 0.9 of the capacity)",
    )
    serve_sim.add_argument("--requests", type=positive, default=64, help="at each rate (64)")
    serve_sim.add_argument("--arrivals-seed", type=int, default=0, help="of the arrivals (0)")
    serve_sim.add_argument(
        "--ttft-limit",
        type=positive_number,
        default=500.0,
        help="good: first token within ms (500)",
    )
    serve_sim.add_argument(
        "--itl-limit",
        type=positive_number,
        default=50.0,
        help="good: ms a further token, on average (50)",
    )
    add_plot_flag(serve_sim)
    add_shapes_flag(serve_sim)
    serve_sim.set_defaults(run=_run_serve_sim)


def _run_offline(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.offline import run_offline

    run_offline(
        engine_settings(options),
        repeat=options.repeat,
        rounds=options.rounds,
        output=options.output,
    )


def _run_scheduler(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.scheduler import run_scheduler

    run_scheduler(options.requests, output=options.output)


def _run_throughput(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.throughput import run_throughput

    run_throughput(
        engine_settings(options),
        shapes=options.shapes,
        num_requests=options.requests,
        most=options.most,
        rounds=options.rounds,
        profile=options.profile,
        peers=options.peers,
        output=options.output,
        plot=options.plot,
    )


def _run_latency(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.latency import run_latency

    run_latency(
        engine_settings(options),
        shapes=options.shapes,
        batches=options.batch,
        num_input=options.input,
        num_output=options.tokens,
        output=options.output,
    )


def _run_ladder(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.ladder import run_ladder

    run_ladder(
        model=options.model,
        shapes=options.shapes,
        device=options.device,
        dtype=options.dtype,
        num_requests=options.requests,
        batch=options.batch,
        subset=options.subset,
        rounds=options.rounds,
        output=options.output,
        plot=options.plot,
    )


def _run_serve_sim(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.serve_sim import run_serve_sim

    run_serve_sim(
        engine_settings(options),
        shapes=options.shapes,
        rates=options.rates,
        num_requests=options.requests,
        seed=options.arrivals_seed,
        ttft_limit_ms=options.ttft_limit,
        itl_limit_ms=options.itl_limit,
        output=options.output,
        plot=options.plot,
    )
