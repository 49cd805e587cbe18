"""One function in three forms: eager PyTorch, ``torch.compile`` and our Triton kernel.

    python -m chapters.chapter01_layers.compare_forms --count    # bytes, no clock; any machine
    python -m chapters.chapter01_layers.compare_forms            # times on this machine
    python -m chapters.chapter01_layers.compare_forms --json FILE    # and write them to a file
    python -m chapters.chapter01_layers.compare_forms --keep     # and put them into the text
    python -m chapters.chapter01_layers.compare_forms --table FILE   # a file's times in Markdown

Every form is checked against float64 in the run that times it. A CPU is timed with one thread, in
CPU seconds, so that other programs on the machine disturb less; and without the Triton form, which
would run in Triton's interpreter, whose speed says nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from chapters.chapter01_layers.results import environment, table
from chapters.chapter01_layers.traffic import count_traffic
from chapters.machine.texts import replace_block
from minivllm.layers.activation import silu_and_mul
from minivllm.layers.layernorm import add_rms_norm

FOLDER = Path(__file__).parent
EPS = 1e-6
FORMS = ("eager", "compile", "triton")
FUNCTIONS = ("add_rms_norm", "silu_and_mul")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What has to move for each number of the result: x, residual, sum and norm; gate, up and out.
LEAST_MOVES = {"add_rms_norm": 4, "silu_and_mul": 3}


@dataclass(frozen=True)
class Timing:
    """One form at one size.

    call_us: microseconds a call takes when Python makes one after the other. device_us: the same in
    a CUDA graph, without Python (None on a CPU). gigabytes_per_second: the bytes that have to move
    over the shorter time. error: the largest deviation from float64, as a share of the largest
    number.
    """

    function: str
    form: str
    tokens: int
    call_us: float
    device_us: float | None
    gigabytes_per_second: float
    error: float


def make_arguments(
    function: str, tokens: int, size: int, dtype: torch.dtype, device: str
) -> tuple[Any, ...]:
    """Random arguments for ``function`` whose result has ``tokens`` rows of ``size`` numbers."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    if function == "add_rms_norm":
        return randn(tokens, size), randn(tokens, size), randn(size), EPS
    return (randn(tokens, 2 * size),)


def make_form(function: str, form: str) -> Callable[..., Any]:
    """``function`` as ``form`` runs it."""
    plain = {"add_rms_norm": add_rms_norm, "silu_and_mul": silu_and_mul}[function]
    if form == "eager":
        return plain
    if form == "compile":
        return torch.compile(plain, dynamic=False, fullgraph=True)
    from minivllm.layers import layer_kernels

    return getattr(layer_kernels, function)


def exact(function: str, arguments: tuple[Any, ...]) -> torch.Tensor:
    """The first result in float64."""
    if function == "add_rms_norm":
        x, residual, weight, eps = arguments
        total = x.double() + residual.double()
        mean_square = total.square().mean(dim=-1, keepdim=True)
        return total / (mean_square + eps).sqrt() * weight.double()
    gate, up = arguments[0].double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def measure(function: str, form: str, tokens: int, size: int, dtype: str, device: str) -> Timing:
    """Check one form, then time it."""
    arguments = make_arguments(function, tokens, size, DTYPES[dtype], device)
    run = make_form(function, form)
    result = run(*arguments)
    result = result[0] if isinstance(result, tuple) else result
    expected = exact(function, arguments)
    error = float((result.double() - expected).abs().max() / expected.abs().max())
    if not error < 0.02:
        raise SystemExit(f"{form} {function} is wrong by {error:.3g}; its time means nothing")
    call_us = _time_calls(lambda: run(*arguments), device)
    device_us = _time_graph(lambda: run(*arguments)) if device == "cuda" else None
    moved = LEAST_MOVES[function] * tokens * size * DTYPES[dtype].itemsize
    speed = moved / (device_us or call_us) / 1e3
    return Timing(function, form, tokens, call_us, device_us, speed, error)


def _time_calls(call: Callable[[], Any], device: str) -> float:
    """Median microseconds a call, over 9 rounds of about 20 ms."""
    clock = time.perf_counter if device == "cuda" else time.process_time

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def round_of(count: int) -> float:
        finish()
        start = clock()
        for _ in range(count):
            call()
        finish()
        return (clock() - start) / count * 1e6

    round_of(3)
    count = max(1, int(20_000 / max(round_of(3), 1.0)))
    return statistics.median(round_of(count) for _ in range(9))


def _time_graph(call: Callable[[], Any], calls: int = 20) -> float:
    """Median microseconds a call without Python: ``calls`` of them in one CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls * 1e3)
    return statistics.median(times[5:])


def print_count(size: int, dtype: str, tokens: int = 256) -> None:
    """What each operation of the eager form reads and writes, for each number of the result."""
    numbers = tokens * size
    for function in FUNCTIONS:
        arguments = make_arguments(function, tokens, size, DTYPES[dtype], "cpu")
        operations = count_traffic(make_form(function, "eager"), *arguments)
        print(f"{function}, {dtype}, eager: bytes for each number of the result")
        for operation in operations:
            read, written = operation.bytes_read / numbers, operation.bytes_written / numbers
            print(f"  {operation.name:<10} reads {read:4.1f}  writes {written:4.1f}")
        total = sum(operation.bytes for operation in operations) / numbers
        least = LEAST_MOVES[function] * DTYPES[dtype].itemsize
        print(f"  {len(operations)} operations move {total:.1f}; fused into one: {least}\n")


def print_row(row: Timing) -> None:
    alone = "" if row.device_us is None else f"{row.device_us:>12.1f}"
    print(
        f"{row.function:<13} {row.tokens:>7} {row.form:<8} {row.call_us:>12.1f}{alone} "
        f"{row.gigabytes_per_second:>8.1f} {row.error:>9.1e}",
        flush=True,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--count", action="store_true", help="count bytes, measure no time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--tokens", nargs="+", type=int, default=None, metavar="T")
    parser.add_argument("--size", type=int, default=1024, help="numbers a token (Qwen3-0.6B: 1024)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write results")
    parser.add_argument("--keep", action="store_true", help="put the results into the text")
    parser.add_argument("--table", type=Path, default=None, metavar="FILE", help="print results")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not cuda:
        parser.error("--device cuda: PyTorch finds no CUDA device; leave it out to run on the CPU")
    if arguments.size < 1 or min(arguments.tokens or [1]) < 1:
        parser.error("--size and --tokens must be at least 1")
    if arguments.keep:
        # Files and text stand for each other: forms_cpu.json and forms_gpu.json, as they are named.
        arguments.json = FOLDER / f"forms_{'gpu' if arguments.device == 'cuda' else 'cpu'}.json"
    arguments.tokens = arguments.tokens or (
        [1, 256, 4096, 65536] if arguments.device == "cuda" else [1, 256, 4096]
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> list[Timing]:
    arguments = parse(argv)
    if arguments.table:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return []
    if arguments.count:
        print_count(arguments.size, arguments.dtype)
        return []
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    settings = environment(arguments.device)
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    forms = [form for form in arguments.forms if form != "triton" or arguments.device == "cuda"]
    if forms != arguments.forms:
        print("the Triton form is timed on a GPU only: on a CPU it would run in the interpreter")
    if "compile" in forms and arguments.device == "cpu":
        print("torch.compile builds C++ first; that takes some seconds for each size")
    alone = "     GPU us  " if arguments.device == "cuda" else " "
    print(f"{'function':<13} {'tokens':>7} {'form':<8} {'call us':>12}{alone}    GB/s     error")
    rows = []
    for function in FUNCTIONS:
        for tokens in arguments.tokens:
            for form in forms:
                rows.append(
                    measure(
                        function,
                        form,
                        tokens,
                        arguments.size,
                        arguments.dtype,
                        arguments.device,
                    )
                )
                print_row(rows[-1])
    if arguments.json:
        content = {**settings, "dtype": arguments.dtype, "size": arguments.size}
        content["rows"] = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if arguments.keep:
            replace_block(FOLDER / "README.md", f"times {arguments.json.name}", table(content))
    return rows


if __name__ == "__main__":
    main()
