"""The command line: ``minivllm`` alone runs the demo."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

ENGINE_FLAGS = (
    "model",
    "device",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "policy",
    "block_size",
    "num_kv_blocks",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "enforce_eager",
    "async_scheduling",
    "tensor_parallel_size",
    "attention_backend",
    "seed",
)

ATTENTION_BENCHMARKS = {
    "prefill": "causal attention over prompts: our kernels beside PyTorch's",
    "decode": "attention of one token a sequence over pages: our kernels beside others",
    "check": "all attention kernels against float64",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for a user's mistake, told in one line)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "demo")
    try:
        if arguments[0] == "bench" and arguments[1:2] and arguments[1] in ATTENTION_BENCHMARKS:
            # It has flags of its own, and knows them only once PyTorch is imported.
            from minivllm.benchmarks.attention import main as attention_main

            return attention_main(arguments[1:])
        if arguments[:2] == ["bench", "tensor-parallel"]:
            from minivllm.benchmarks.tensor_parallel import main as tensor_parallel_main

            tensor_parallel_main(arguments[2:])
            return 0
        options = parser.parse_args(arguments)
        options.run(options)
    except ValueError as error:
        print(f"minivllm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minivllm: interrupted", file=sys.stderr)
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    # Here, so that --help and a mistyped flag do not wait for PyTorch.
    from minivllm.demo import run_demo

    run_demo(
        _engine_settings(options),
        repeat=options.repeat,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        as_json=options.json,
    )


def _chat(options: argparse.Namespace) -> None:
    from minivllm.chat import run_chat

    run_chat(
        _engine_settings(options),
        options.question,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
    )


def _bench_offline(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.offline import run_offline

    run_offline(
        _engine_settings(options),
        repeat=options.repeat,
        rounds=options.rounds,
        output=options.output,
    )


def _bench_scheduler(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.scheduler import run_scheduler

    run_scheduler(options.requests, output=options.output)


def _bench_throughput(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.throughput import run_throughput

    run_throughput(
        _engine_settings(options),
        shapes=options.shapes,
        num_requests=options.requests,
        most=options.most,
        rounds=options.rounds,
        profile=options.profile,
        peers=options.peers,
        output=options.output,
        plot=options.plot,
    )


def _bench_latency(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.latency import run_latency

    run_latency(
        _engine_settings(options),
        shapes=options.shapes,
        batches=options.batch,
        num_input=options.input,
        num_output=options.tokens,
        output=options.output,
    )


def _bench_ladder(options: argparse.Namespace) -> None:
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


def _bench_serve_sim(options: argparse.Namespace) -> None:
    from minivllm.benchmarks.serve_sim import run_serve_sim

    run_serve_sim(
        _engine_settings(options),
        shapes=options.shapes,
        rates=options.rates,
        num_requests=options.requests,
        seed=options.arrivals_seed,
        ttft_limit_ms=options.ttft_limit,
        itl_limit_ms=options.itl_limit,
        output=options.output,
        plot=options.plot,
    )


def _engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in ENGINE_FLAGS}
    return {name: value for name, value in given.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minivllm",
        description="A small, fast LLM inference engine. Without a command it runs the demo.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="answer 60 chat prompts and report how fast")
    demo.add_argument("--repeat", type=int, default=30, help="how often each prompt runs (30)")
    _add_generation_flags(demo)
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _add_engine_flags(demo)
    demo.set_defaults(run=_demo)

    chat = commands.add_parser("chat", help="ask one question, or talk")
    chat.add_argument("question", nargs="?", help="without one, questions are read line by line")
    _add_generation_flags(chat)
    _add_engine_flags(chat)
    chat.set_defaults(run=_chat)

    bench = commands.add_parser("bench", help="measure: see minivllm bench --help")
    benches = bench.add_subparsers(required=True, metavar="benchmark")
    offline = benches.add_parser(
        "offline", help="the demo's prompts, this engine beside transformers' generate"
    )
    offline.add_argument("--repeat", type=int, default=30, help="how often each prompt runs (30)")
    offline.add_argument("--rounds", type=int, default=3, help="measured pairs (3)")
    _add_output_flag(offline)
    _add_engine_flags(offline)
    offline.set_defaults(run=_bench_offline)
    scheduler = benches.add_parser(
        "scheduler", help="simulate requests without a model: scheduling decisions a second"
    )
    scheduler.add_argument("--requests", type=int, default=100_000, help="how many (100000)")
    _add_output_flag(scheduler)
    scheduler.set_defaults(run=_bench_scheduler)
    throughput = benches.add_parser(
        "throughput", help="256 random requests at once: output tokens a second"
    )
    throughput.add_argument("--requests", type=int, default=256, help="how many (256)")
    throughput.add_argument("--most", type=int, default=1024, help="most tokens in and out (1024)")
    throughput.add_argument("--rounds", type=int, default=2, help="how often all run (2)")
    throughput.add_argument("--profile", action="store_true", help="also profile decode steps")
    throughput.add_argument(
        "--peers", action="store_true", help="then vLLM, nano-vllm and transformers, if installed"
    )
    _add_plot_flag(throughput)
    _add_shapes_flag(throughput)
    throughput.set_defaults(run=_bench_throughput)
    latency = benches.add_parser("latency", help="time to the first token and between tokens")
    latency.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="1 8 32")
    latency.add_argument("--input", type=int, default=128, help="tokens of a prompt (128)")
    latency.add_argument("--tokens", type=int, default=256, help="tokens of an answer (256)")
    _add_shapes_flag(latency)
    latency.set_defaults(run=_bench_latency)
    _add_ladder(benches)
    _add_serve_sim(benches)
    for name, summary in ATTENTION_BENCHMARKS.items():
        benches.add_parser(name, help=summary)
    benches.add_parser("tensor-parallel", help="one model on 1, 2, 4 ... GPUs")
    return parser


def _add_ladder(benches: Any) -> None:
    ladder = benches.add_parser(
        "ladder", help="the same prompts by every chapter's way: output tokens a second"
    )
    ladder.add_argument("--requests", type=int, help="how many (128; 32 on a CPU)")
    ladder.add_argument("--batch", type=int, help="sequences at a time (32; 8 on a CPU)")
    ladder.add_argument(
        "--subset", type=int, default=4, help="requests of the chapters that serve one by one (4)"
    )
    ladder.add_argument("--rounds", type=int, default=3, help="of each, unless it is slow (3)")
    ladder.add_argument("--model", help="a folder or hub name (the embedded tiny Qwen3)")
    ladder.add_argument("--device", help="cpu, cuda or cuda:N (the GPU if there is one)")
    ladder.add_argument("--dtype", help="float32, float16 or bfloat16")
    _add_shapes_name(ladder)
    _add_output_flag(ladder)
    _add_plot_flag(ladder)
    ladder.set_defaults(run=_bench_ladder)


def _add_serve_sim(benches: Any) -> None:
    serve_sim = benches.add_parser(
        "serve-sim", help="requests that arrive over time: waiting times, goodput, fairness"
    )
    serve_sim.add_argument(
        "--rates", type=float, nargs="+", help="requests a second (0.3, 0.6, 0.9 of the capacity)"
    )
    serve_sim.add_argument("--requests", type=int, default=64, help="at each rate (64)")
    serve_sim.add_argument("--arrivals-seed", type=int, default=0, help="of the arrivals (0)")
    serve_sim.add_argument(
        "--ttft-limit", type=float, default=500.0, help="good: first token within ms (500)"
    )
    serve_sim.add_argument(
        "--itl-limit", type=float, default=50.0, help="good: ms a further token, on average (50)"
    )
    _add_plot_flag(serve_sim)
    _add_shapes_flag(serve_sim)
    serve_sim.set_defaults(run=_bench_serve_sim)


def _add_shapes_flag(parser: argparse.ArgumentParser) -> None:
    _add_shapes_name(parser)
    _add_output_flag(parser)
    _add_engine_flags(parser)


def _add_shapes_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", metavar="NAME", help="random weights of this model's shapes, e.g. Qwen3-0.6B"
    )


def _add_plot_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="FILE", help="also draw the figures there, as SVG")


def _add_output_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", help="also write the figures there, as JSON")


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens an answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--model", help="a folder or hub name (the embedded tiny Qwen3)")
    group.add_argument("--device", help="cpu, cuda or cuda:N (the GPU if there is one)")
    group.add_argument("--dtype", help="float32, float16 or bfloat16")
    group.add_argument("--max-model-len", type=int, help="most tokens a request may hold")
    group.add_argument("--max-num-seqs", type=int, help="most sequences in a step (256)")
    group.add_argument("--max-num-batched-tokens", type=int, help="most tokens in a step (8192)")
    group.add_argument("--policy", help="prefill_first (default) or mixed")
    group.add_argument("--block-size", type=int, help="tokens a KV block, 16 to 256 (64, CPU: 16)")
    group.add_argument("--num-kv-blocks", type=int, help="KV blocks (as many as fit)")
    group.add_argument("--gpu-memory-utilization", type=float, help="share of the GPU to use (0.9)")
    group.add_argument(
        "--no-prefix-caching",
        dest="enable_prefix_caching",
        action="store_false",
        default=None,
        help="compute every prompt from its first token",
    )
    group.add_argument(
        "--enforce-eager", action="store_true", default=None, help="never capture CUDA graphs"
    )
    group.add_argument(
        "--no-async-scheduling",
        dest="async_scheduling",
        action="store_false",
        default=None,
        help="wait for every step before the next is scheduled",
    )
    group.add_argument(
        "--tensor-parallel-size", type=int, help="GPUs, or on a CPU processes, to share a model (1)"
    )
    group.add_argument("--attention-backend", help="auto, torch or triton")
    group.add_argument("--seed", type=int, help="seed of the sampler (0)")


if __name__ == "__main__":
    sys.exit(main())
