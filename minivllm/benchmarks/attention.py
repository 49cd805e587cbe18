"""How fast attention is here: ``python -m minivllm.benchmarks.attention prefill | decode | check``.

prefill   causal attention of whole prompts, 16,384 tokens in all: TFLOP/s, memory, by length
decode    one token for each of many sequences, over pages: GB/s of keys and values
check     every kernel against float64 on fresh random inputs (see ``attention_check.py``)

The first two begin with the third: on a GPU no kernel is timed that was not right a minute before.
Each prints its table last and writes JSON, the checks in it, and a plot beside it. Small on a CPU,
where the PyTorch forms are compared, unchecked; the interpreter that runs Triton there is not worth
timing.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minivllm.benchmarks import harness
from minivllm.benchmarks.attention_cases import DecodeCase, PrefillCase, Shape
from minivllm.benchmarks.report import write_report
from minivllm.cli_flags import Parser, device_name, positive

PREFILL_TOKENS = {"cuda": 16384, "cpu": 1024}
PREFILL_LENGTHS = {"cuda": (256, 1024, 4096, 16384), "cpu": (128, 512, 1024)}
MEMORY_LENGTHS = {"cuda": (1024, 4096, 16384, 32768, 65536, 131072), "cpu": ()}
DECODE_POINTS = {
    "cuda": [
        *((512, batch) for batch in (1, 8, 32, 128, 256)),
        *((1024, batch) for batch in (1, 8, 32, 128, 256)),
        *((4096, batch) for batch in (1, 8, 32, 128, 256)),
        *((16384, batch) for batch in (1, 8, 32, 128)),
    ],
    "cpu": [(128, 1), (128, 8), (512, 8)],
}
DECODE_HEADS = {"cuda": ((16, 8), (32, 8)), "cpu": ((16, 8),)}
# A graph of a model's step holds its 28 or more layers one after the other: with one or two, the
# start of the graph would count for more than it does there. And what they read must not fit into
# the L2 cache.
MIN_LAYERS = {"cuda": 8, "cpu": 1}
COLD_BYTES = {"cuda": 400_000_000, "cpu": 0}


def bench_prefill(
    shape: Shape, dtype: torch.dtype, device: torch.device, limits: dict[str, float]
) -> tuple[str, list[dict[str, Any]]]:
    """Time every form of causal attention; returns a table and a record for each figure."""
    records: list[dict[str, Any]] = []
    for length in PREFILL_LENGTHS[device.type]:
        count = PREFILL_TOKENS[device.type] // length
        print(f"measuring prefill, {count} x {length}", flush=True)
        case = PrefillCase.make(shape, [length] * count, dtype, device)
        calls = _that_run(case.calls(device))
        timed = calls
        if device.type == "cuda":  # the kernels alone; what the host adds is in another column
            timed = {name: harness.replay_of([call]) for name, call in calls.items()}
        for name, seconds in harness.time_in_turns(timed, device).items():
            rate = case.operations / seconds
            records.append(
                {
                    "form": name,
                    "length": length,
                    "sequences": count,
                    "seconds": seconds,
                    "host_seconds": harness.time_host(calls[name], device),
                    "tflop_per_s": rate / 1e12,
                    "share_of_matmul": rate / limits["matmul_flop_per_s"],
                    "peak_bytes": harness.peak_memory(calls[name], device),
                }
            )
        del case, calls, timed
    shortest = records[0]["length"]
    hosts = {r["form"]: r["host_seconds"] or 0.0 for r in records if r["length"] == shortest}
    table = _pivot(
        records,
        "length",
        lambda r: f"{r['tflop_per_s']:.3g} ({_ms(r['seconds'])})",
        extra=("host us", {form: f"{seconds * 1e6:.0f}" for form, seconds in hosts.items()}),
    )
    title = f"{shape.num_heads}/{shape.num_kv_heads} heads, {PREFILL_TOKENS[device.type]} tokens"
    return f"TFLOP/s (ms), {title} in all, by length\n{table}", records


def measure_memory(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[str, list[dict[str, Any]]]:
    """Peak memory beyond the inputs of one sequence, for every form that can still do it."""
    records: list[dict[str, Any]] = []
    for length in MEMORY_LENGTHS[device.type]:
        print(f"measuring memory, 1 x {length}", flush=True)
        case = PrefillCase.make(shape, [length], dtype, device)
        calls = case.calls(device)
        if "PyTorch, all scores" not in calls and length <= 16384:
            calls["PyTorch, all scores"] = case.naive
        for name, call in _that_run(calls).items():
            peak = harness.peak_memory(call, device)
            records.append({"form": name, "length": length, "peak_bytes": peak})
    if not records:
        return "", records
    table = _pivot(records, "length", lambda r: f"{r['peak_bytes'] / 2**20:.0f}")
    return f"MiB beyond the inputs, one sequence, by length\n{table}", records


def bench_decode(
    shape: Shape, dtype: torch.dtype, device: torch.device, limits: dict[str, float]
) -> tuple[str, list[dict[str, Any]]]:
    """Time every form of decode over pages; returns a table and a record for each figure."""
    on_gpu = device.type == "cuda"
    points = {f"{c} x {b}": [c] * b for c, b in DECODE_POINTS[device.type]}
    if on_gpu:
        chance = random.Random(0)
        points["ragged x 256"] = [chance.randint(100, 2000) for _ in range(256)]
        points["31 x 300, 16384"] = [300] * 31 + [16384]
    records: list[dict[str, Any]] = []
    for point, lengths in points.items():
        heads = f"{shape.num_heads}/{shape.num_kv_heads} heads"
        print(f"measuring decode, {heads}, {point}", flush=True)
        case = DecodeCase.make(
            shape,
            lengths,
            dtype,
            device,
            cold_bytes=COLD_BYTES[device.type],
            min_layers=MIN_LAYERS[device.type],
        )
        times = {}
        calls = case.torch_calls()
        replays: dict[str, harness.Call] = {}
        if on_gpu:
            plan = case.plan()
            replays = {
                name: harness.replay_of(layers) for name, layers in case.kernel_calls(plan).items()
            }
            layers = len(case.k_caches)
            in_turns = harness.time_in_turns(replays, device)
            times = {name: seconds / layers for name, seconds in in_turns.items()}
        times |= harness.time_in_turns(calls, device, rounds=2)
        for name, seconds in times.items():
            rate = case.bytes_read / seconds
            records.append(
                {
                    "form": name,
                    "num_heads": shape.num_heads,
                    "num_kv_heads": shape.num_kv_heads,
                    "point": point,
                    "sequences": len(lengths),
                    "context": lengths[0] if len(set(lengths)) == 1 else None,
                    "seconds": seconds,
                    "gb_per_s": rate / 1e9,
                    "share_of_copy": rate / limits["copy_bytes_per_s"],
                }
            )
        # Gone before the next one's caches are made.
        del case, calls, replays
    table = _pivot(
        records, "point", lambda r: f"{r['gb_per_s']:.4g} ({r['seconds'] * 1e6:.0f})", down=True
    )
    return f"GB/s of K and V (microseconds), {heads}, context x batch\n{table}", records


def _that_run(calls: dict[str, harness.Call]) -> dict[str, harness.Call]:
    """Those of ``calls`` that this machine's libraries and memory can do."""
    good = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:  # torch.OutOfMemoryError is one of them
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"left out: {name}: {reason[:100]}")
        else:
            good[name] = call
    return good


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _pivot(
    records: Sequence[dict[str, Any]],
    column: str,
    show: Any,
    *,
    down: bool = False,
    extra: tuple[str, dict[str, str]] | None = None,
) -> str:
    """Forms against ``column``, as a table; ``down`` puts the forms into the columns.

    extra: one more column, its head and its cell for each form.
    """
    forms = list(dict.fromkeys(r["form"] for r in records))
    keys = list(dict.fromkeys(r[column] for r in records))
    cells = {(r["form"], r[column]): show(r) for r in records}
    if down:
        rows = [[key, *(cells.get((form, key), "") for form in forms)] for key in keys]
        return harness.format_table(["", *forms], rows)
    rows = [[form, *(cells.get((form, key), "") for key in keys)] for form in forms]
    heads = ["", *map(str, keys)]
    if extra is not None:
        heads.append(extra[0])
        rows = [[*row, extra[1].get(str(row[0]), "")] for row in rows]
    return harness.format_table(heads, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(
        prog="minivllm bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["prefill", "decode", "check"])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_name, default=here)
    parser.add_argument(
        "--heads", type=positive, help="query heads (default 16; decode on a GPU: 16, then 32)"
    )
    parser.add_argument("--kv-heads", type=positive, default=8, help="KV heads (default 8)")
    parser.add_argument("--head-size", type=positive, default=128, help="default 128")
    parser.add_argument(
        "--block-size", type=positive, default=64, help="tokens a page (default 64)"
    )
    parser.add_argument("--output", type=Path, help="folder for JSON and plot")
    parser.add_argument("--small", action="store_true", help="check: few small cases")
    options = parser.parse_args(argv)
    options.device = here if options.device == "auto" else options.device
    kv_heads = options.kv_heads
    device_type = torch.device(options.device).type
    if options.heads is not None:
        heads = [(options.heads, kv_heads)]
    elif options.what == "decode" and kv_heads == 8 and device_type in DECODE_HEADS:
        heads = list(DECODE_HEADS[device_type])
    else:
        heads = [(16, kv_heads)]
    return run_attention(
        options.what,
        device=options.device,
        shapes=[Shape(*pair, options.head_size, options.block_size) for pair in heads],
        output=options.output,
        small=options.small,
    )


def run_attention(
    what: str,
    *,
    device: str,
    shapes: Sequence[Shape] = (Shape(),),
    output: Path | None = None,
    small: bool = False,
) -> int:
    """Run one of the three, print its table last, write its files; returns the exit status.

    shapes: of the layers that are timed one after the other; prefill takes the first only.
    """
    place = torch.device(device)
    if place.type not in ("cuda", "cpu"):
        raise ValueError(f"device={device!r} is not known here; use cuda or cpu")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but no CUDA device is here; use cpu")
    checks_text, checks, good = "unchecked", None, True
    if what == "check" or place.type == "cuda":
        from minivllm.benchmarks.attention_check import check_attention

        checks_text, checks = check_attention(place, small=small)
        good = all(record["good"] for record in checks)
        checks_text = f"every kernel against float64, {checks_text}"
    if what == "check" or not good:
        _save("check", output, {"records": checks})
        print(checks_text)
        return 0 if good else 1
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    limits = harness.ceilings(place)
    result: dict[str, Any] = {"shape": vars(shapes[0]), "ceilings": limits}
    if what == "prefill":
        text, result["records"] = bench_prefill(shapes[0], dtype, place, limits)
        memory_text, result["memory"] = measure_memory(shapes[0], dtype, place)
        text = f"{memory_text}\n\n{text}" if memory_text else text
    else:
        texts, records = zip(
            *(bench_decode(shape, dtype, place, limits) for shape in shapes), strict=True
        )
        text, result["records"] = "\n\n".join(texts), [r for some in records for r in some]
    _save(what, output, result | {"checks": checks})
    print(
        f"\n{checks_text}\n\nhead size {shapes[0].head_size}, pages of {shapes[0].block_size}, "
        f"{dtype}; this machine copies {limits['copy_bytes_per_s'] / 1e9:.4g} GB/s and multiplies "
        f"{limits['matmul_flop_per_s'] / 1e12:.3g} TFLOP/s\n\n{text}"
    )
    return 0


def _save(what: str, output: Path | None, result: dict[str, Any]) -> None:
    """JSON always, a plot if matplotlib is there; nothing without a folder."""
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    write_report(str(output / f"attention_{what}.json"), result)
    if what == "check":
        return
    try:
        from minivllm.benchmarks import attention_plots
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    attention_plots.PLOTS[what](result, output / f"attention_{what}.png")


if __name__ == "__main__":
    raise SystemExit(main())
