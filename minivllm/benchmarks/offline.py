"""The demo's prompts by this engine, and by transformers' generate in one padded batch."""

import statistics
import time
from typing import Any

import torch
from torch import nn

from minivllm.benchmarks.report import machine_facts, write_report
from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM
from minivllm.models.config import DTYPES
from minivllm.models.hub import model_folder
from minivllm.prompts import DEMO_PROMPTS

MAX_TOKENS = 256


def run_offline(
    settings: dict[str, Any], *, repeat: int = 30, rounds: int = 3, output: str | None = None
) -> None:
    """Time both on the same prompts, weights and dtype, greedily, in turn, and print the ratio.

    settings: keywords of :class:`minivllm.LLM`. Every round builds a new KV cache for our engine,
    so no round profits from the prefixes of the one before. Tokens are compared first.
    """
    dtype = settings.setdefault("dtype", "float32")
    folder = model_folder(settings.get("model"))
    with LLM(**settings) as llm:
        messages = [[{"role": "user", "content": p}] for p in DEMO_PROMPTS for _ in range(repeat)]
        prompts = [llm.apply_chat_template(m, enable_thinking=False) for m in messages]
        token_ids = [prompt["prompt_token_ids"] for prompt in prompts]
        assert llm.engine.runner is not None
        device = llm.engine.runner.device
        peer = load_peer(folder, DTYPES[dtype], device)
        ends = llm.engine.model_config.eos_token_ids
        ours, theirs = serve(llm, token_ids)[1], generate_padded(peer, token_ids, ends)[1]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"{len(token_ids)} prompts, {sum(map(len, ours)):,} output tokens; ", end="")
    print(f"the same tokens for {same} of {len(token_ids)}")
    times: dict[str, list[float]] = {"minivllm": [], "transformers": []}
    for number in range(rounds):
        with LLM(**settings) as llm:
            times["minivllm"].append(serve(llm, token_ids)[0])
        times["transformers"].append(generate_padded(peer, token_ids, ends)[0])
        print(
            f"round {number + 1}: minivllm {times['minivllm'][-1]:.2f} s, "
            f"transformers {times['transformers'][-1]:.2f} s"
        )
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = zip(times["minivllm"], times["transformers"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"median: minivllm {medians['minivllm']:.2f} s, transformers "
        f"{medians['transformers']:.2f} s: {ratio:.2f} of its time, on {machine_facts()['device']}"
    )
    write_report(
        output,
        {
            "prompts": len(token_ids),
            "equal_outputs": same,
            "seconds": times,
            "median_seconds": medians,
            "median_ratio": ratio,
        },
    )


def serve(llm: LLM, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Our engine: seconds, and the generated tokens of every prompt."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started, [out.outputs[0].token_ids for out in outputs]


def load_peer(folder: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same weights as transformers' own model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


@torch.inference_mode()
def generate_padded(
    model: Any, prompts: list[list[int]], end_token_ids: tuple[int, ...]
) -> tuple[float, list[list[int]]]:
    """transformers' generate on one batch, padded on the left: seconds and tokens."""
    width = max(map(len, prompts))
    pad = end_token_ids[0]
    device = model.device
    input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    started = time.perf_counter()
    result = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        pad_token_id=pad,
    )
    rows = result[:, width:].tolist()
    seconds = time.perf_counter() - started
    return seconds, [_up_to_end(row, end_token_ids) for row in rows]


def _up_to_end(token_ids: list[int], end_token_ids: tuple[int, ...]) -> list[int]:
    """Without the padding after the first end token."""
    for place, token_id in enumerate(token_ids):
        if token_id in end_token_ids:
            return token_ids[: place + 1]
    return token_ids
