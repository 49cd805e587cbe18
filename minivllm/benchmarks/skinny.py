"""A decode step at small batch: ``python -m minivllm.benchmarks.skinny --shapes 0.6B --batch 1 8``.

For each batch, on random weights made on the device: first whether the logits are right (against
the model in float32, and hardly further from it than the model in bfloat16 is), then milliseconds
of a whole step in a CUDA graph, token ids to logits, beside the bytes it has to read; then what
each kernel adds to the chain, by PyTorch's profiler.

``--try attention_waves=2,block_n=32`` adds a variant of the tuning; several may be given.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from minivllm.attention.paged import PagedKVCache
from minivllm.attention.paged_triton import TritonAttention
from minivllm.benchmarks import harness
from minivllm.benchmarks.decode_steps import (
    BLOCK_SIZE,
    SHAPES,
    DecodeStep,
    model_config,
    random_model,
)
from minivllm.benchmarks.report import write_report
from minivllm.cli_flags import positive
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.engine.skinny_tuning import SkinnyTuning
from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Qwen3ForCausalLM

MARGIN = 1.5  # how much further from float32 than the bfloat16 model the kernels may be


def check(
    model: Qwen3ForCausalLM,
    wide: Qwen3ForCausalLM,
    step: DecodeStep,
    forward: SkinnyForward,
    attention: TritonAttention,
) -> dict[str, Any]:
    """Relative errors of the kernels' and the model's logits against the float32 model's."""
    cache = PagedKVCache(
        model.config,
        step.cache.num_blocks,
        BLOCK_SIZE,
        dtype=torch.float32,
        device=step.cache.k.device,
    )
    cache.k.copy_(step.cache.k)
    cache.v.copy_(step.cache.v)
    exact = replace(step, cache=cache).plain(wide)
    plain = step.plain(model).float()
    # The slots of the new tokens are poisoned: the kernels must write them, or not read them.
    for layer in (*step.cache.k, *step.cache.v):
        layer.flatten(0, 1)[step.batch.slot_mapping] = torch.nan
    forward.logits.fill_(torch.nan)
    ours = step.skinny(forward, attention).float()

    def error(logits: torch.Tensor) -> float:
        return ((logits - exact).norm() / exact.norm()).item()

    top = exact.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > 4 * (plain - exact).abs().max()
    same = ours.argmax(-1) == exact.argmax(-1)
    stored = max(
        ((mine - theirs).norm() / theirs.norm()).item()
        for mine, theirs in ((step.cache.k.float(), cache.k), (step.cache.v.float(), cache.v))
    )
    record = {
        "error": error(ours),
        "model_error": error(plain),
        "stored_error": stored,
        "clear_rows": int(clear.sum()),
        "tokens_same": int(same.sum()),
    }
    good = record["error"] <= MARGIN * record["model_error"] and bool(same[clear].all())
    return {**record, "good": good and stored < 0.01}


def bytes_of_step(config: ModelConfig, tokens: int) -> int:
    """What has to be read of weights and ``tokens`` in the cache, in bytes, 2 for each number."""
    size, head = config.hidden_size, config.head_size
    attention = size * head * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = attention + 3 * size * config.intermediate_size
    cached = tokens * 2 * config.num_kv_heads * head
    return 2 * (config.num_layers * (layer + cached) + config.vocab_size * size)


def chain_times(replay: Callable[[], Any], layers: int, repeats: int = 3) -> list[dict[str, Any]]:
    """By kernel: launches a step, and microseconds from the end of the one in front to its end.

    Kernels overlap here, so that their own durations say little.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            replay()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.end)
    added: dict[str, list[float]] = defaultdict(list)
    per_step = len(kernels) // repeats
    launches = Counter(kernel.name for kernel in kernels[:per_step])
    seen: Counter[str] = Counter()
    seen[kernels[0].name] = 1
    for place, (before, kernel) in enumerate(pairwise(kernels), start=1):
        # A kernel that is launched several times a layer has a name for each of them.
        in_layer = launches[kernel.name] // layers
        which = f" {seen[kernel.name] % in_layer + 1}" if in_layer > 1 else ""
        seen[kernel.name] += 1
        if place % per_step == 0:  # from one step to the next
            seen.clear()
            seen[kernel.name] = 1
        else:
            added[kernel.name + which].append(kernel.time_range.end - before.time_range.end)
    return [
        {
            "kernel": name,
            "launches": round(len(times) / repeats, 1),
            "median_us": statistics.median(times),
            "sum_us": sum(times) / repeats,
        }
        for name, times in sorted(added.items(), key=lambda item: -sum(item[1]))
    ]


def parse_tuning(text: str, rows: int) -> SkinnyTuning:
    """``name=value,name=value`` -> the tuning for ``rows`` rows with these fields changed."""
    kinds = {field.name: type(field.default) for field in fields(SkinnyTuning)}
    changes: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in kinds:
            raise ValueError(f"--try {text!r}: {name!r} is not one of {list(kinds)}")
        kind = kinds[name]
        changes[name] = value == "True" if kind is bool else kind(value)
    return replace(SkinnyTuning.for_rows(rows), **changes)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Check and time every batch and variant; returns a record for each."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    config = model_config(arguments.shapes)
    dtype = torch.bfloat16
    model = random_model(config, dtype, device)
    bandwidth = harness.copy_bandwidth(device)
    print(f"copies {bandwidth / 1e12:.2f} TB/s", flush=True)
    records = []
    for rows in arguments.batch:
        contexts = [arguments.longest or arguments.context] + [arguments.context] * (rows - 1)
        step = DecodeStep.make(config, contexts, dtype, device)
        least = bytes_of_step(config, sum(contexts)) / bandwidth
        attention = TritonAttention(
            config,
            max_num_seqs=rows,
            max_model_len=step.batch.block_tables.shape[1] * BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            dtype=dtype,
            device=device,
        )
        if not arguments.no_model:
            replay = harness.replay_of([lambda s=step, a=attention: s.plain(model, backend=a)])
            seconds = harness.time_calls(replay, device, budget_s=0.2)
            print(f"batch {rows}: the model in a graph {seconds * 1e3:.3f} ms", flush=True)
            records.append({"rows": rows, "variant": "model", "ms": seconds * 1e3})
        wide = None
        for variant in ["", *arguments.variants]:
            try:
                forward = SkinnyForward(model, step.cache, rows, tuning=parse_tuning(variant, rows))
                record: dict[str, Any] = {"rows": rows, "variant": variant}
                if not arguments.no_check:
                    if wide is None:
                        wide = Qwen3ForCausalLM(config, dtype=torch.float32, device=device)
                        wide.requires_grad_(False).load_state_dict(model.state_dict())
                    record |= check(model, wide, step, forward, attention)
                replay = harness.replay_of([partial(step.skinny, forward, attention)])
                seconds = harness.time_calls(replay, device, budget_s=arguments.budget)
            except Exception as error:  # a variant may ask for more than the chip has
                print(f"batch {rows} {variant}: {type(error).__name__}: {str(error)[-150:]}")
                continue
            record |= {"ms": seconds * 1e3, "least_ms": least * 1e3, "share": least / seconds}
            if variant == "" or arguments.profile_all:
                record["kernels"] = chain_times(replay, config.num_layers)
            records.append(record)
            print(_line(record), flush=True)
        del wide
    return records


def _line(record: dict[str, Any]) -> str:
    text = f"batch {record['rows']}: {record['ms']:.3f} ms, {record['share']:.2f} of the limit"
    if "error" in record:
        text += (
            f"; error {record['error']:.2e} (model {record['model_error']:.2e}), stored "
            f"{record['stored_error']:.1e}, tokens {record['tokens_same']}/{record['rows']} "
            f"({record['clear_rows']} clear): {'good' if record['good'] else 'WRONG'}"
        )
    text += f"  {record['variant']}"
    for kernel in record.get("kernels", ()):
        text += (
            f"\n    {kernel['kernel'][:40]:40} x {kernel['launches']:5}  median "
            f"{kernel['median_us']:6.2f} us, in all {kernel['sum_us']:7.1f}"
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", choices=list(SHAPES), default="0.6B")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--longest", type=positive, help="tokens of the first one")
    parser.add_argument("--try", dest="variants", nargs="+", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds of timing for each")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-model", action="store_true", help="do not time the plain model")
    parser.add_argument("--profile-all", action="store_true", help="kernels of variants too")
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device is here, and the interpreter is not worth timing")
    records = run(arguments)
    write_report(arguments.output, {"shapes": arguments.shapes, "records": records})
    return 0 if all(record.get("good", True) for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
