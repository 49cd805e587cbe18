"""The main job: 60 chat prompts through the engine, and a summary a person can read."""

import json
import math
import statistics
import textwrap
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

from minivllm.engine.outputs import EngineStats, RequestOutput
from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM
from minivllm.models.loader import checkpoint_sources
from minivllm.prompts import DEMO_PROMPTS


def run_demo(
    settings: dict[str, Any],
    *,
    repeat: int = 30,
    max_tokens: int = 256,
    temperature: float = 0.0,
    as_json: bool = False,
) -> None:
    """Answer every demo prompt ``repeat`` times, and print what came out and how fast.

    settings: keywords of :class:`minivllm.LLM`. as_json: print one JSON object and nothing else.
    """
    if repeat < 1:
        raise ValueError(f"repeat={repeat} must be at least 1")
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    started = time.perf_counter()
    with LLM(**settings) as llm:
        ready = time.perf_counter()
        model = describe(llm)
        if not as_json:
            print(model)
            print(f"ready in {ready - started:.1f} s\n")
        conversations = [
            [{"role": "user", "content": prompt}] for _ in range(repeat) for prompt in DEMO_PROMPTS
        ]
        generating = time.perf_counter()
        # Qwen3 would otherwise think aloud for longer than a demo lasts.
        outputs = llm.chat(conversations, params, use_tqdm=not as_json, enable_thinking=False)
        seconds = time.perf_counter() - generating
        summary = summarise(outputs, llm.stats, seconds)
    if as_json:
        summary = {"model": model, "start_up_seconds": ready - started, **summary}
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        print(render(summary))


def describe(llm: LLM) -> str:
    """One line on the model and where it runs."""
    engine = llm.engine
    runner = engine.runner
    assert runner is not None
    weight = runner.model.lm_head.weight
    # Of the whole model, of which a rank holds a share.
    parameters = sum(math.prod(source.shape) for source in checkpoint_sources(runner.model))
    name = engine.config.model or "the embedded tiny Qwen3"
    where = str(runner.device)
    if runner.device.type == "cuda":
        where = torch.cuda.get_device_name(runner.device)
    dtype = str(weight.dtype).removeprefix("torch.")
    return (
        f"minivllm serves {name}: {parameters / 1e6:,.1f} M parameters in {dtype} on {where}; "
        f"{runner.cache.num_blocks:,} KV blocks of {runner.cache.block_size} tokens"
    )


def summarise(outputs: list[RequestOutput], stats: EngineStats, seconds: float) -> dict[str, Any]:
    """The figures of a run: completions by prompt, speeds in tokens a second, cache and blocks."""
    first_tokens = [output.metrics.time_to_first_token or 0.0 for output in outputs]
    answers = Counter(output.outputs[0].text for output in outputs)
    return {
        "requests": len(outputs),
        "seconds": seconds,
        "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        "completions": [{"count": count, "text": text} for text, count in answers.most_common()],
        "prefill_tokens_per_second": stats.prefill_rate,
        "decode_tokens_per_second": stats.decode_rate,
        "time_to_first_token": {
            "median": statistics.median(first_tokens),
            "max": max(first_tokens),
        },
        "prefix_cache_hit_rate": stats.cache_hit_rate,
        "stats": asdict(stats),
    }


def render(summary: dict[str, Any]) -> str:
    """The summary as lines of text, the completions first."""
    stats = summary["stats"]
    completions = summary["completions"]
    shown = completions[:6]
    lines = [f"\n{summary['requests']} requests, {len(completions)} distinct completions\n"]
    for completion in shown:
        text = textwrap.fill(
            completion["text"].strip() or "(empty)",
            width=88,
            initial_indent=f"{completion['count']:4d} x  ",
            subsequent_indent=" " * 8,
        )
        lines += [text, ""]
    if len(completions) > len(shown):
        lines += [f"        ... and {len(completions) - len(shown)} more", ""]
    first = summary["time_to_first_token"]
    rows = [
        (
            "prefill",
            f"{summary['prefill_tokens_per_second']:,.0f} tokens/s",
            f"{stats['prefill_tokens']:,} tokens computed, {stats['cached_tokens']:,} more found "
            "in the prefix cache",
        ),
        (
            "decode",
            f"{summary['decode_tokens_per_second']:,.0f} tokens/s",
            f"{stats['decode_tokens']:,} tokens in {stats['decode_seconds']:.2f} s",
        ),
        (
            "first token",
            f"{first['median']:.2f} s",
            f"median; the last request waited {first['max']:.2f} s",
        ),
        (
            "prefix cache",
            f"{summary['prefix_cache_hit_rate']:.0%}",
            "of all prompt tokens were cached",
        ),
        (
            "KV blocks",
            f"{stats['peak_kv_blocks']:,}",
            f"at the peak, of {stats['num_kv_blocks']:,}",
        ),
        ("preemptions", f"{stats['num_preemptions']}", ""),
        (
            "in all",
            f"{summary['seconds']:.2f} s",
            f"{summary['output_tokens'] / summary['seconds']:,.0f} output tokens/s",
        ),
    ]
    lines += [f"{name:14}{value:>16}   {remark}".rstrip() for name, value, remark in rows]
    return "\n".join(lines)
