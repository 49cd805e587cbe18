"""The stages of ``bench tensor-parallel``, each in a process of its own.

    python -m minivllm.benchmarks.tensor_parallel_stages '{"stage": "engine", ...}' result.json

So a stage that fails or hangs takes nothing with it but itself, and finds its GPUs empty.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minivllm.benchmarks.profile import profile_decode
from minivllm.benchmarks.shapes import shape_folder
from minivllm.benchmarks.throughput import build
from minivllm.benchmarks.workload import Margins, margins_of, usual_workload, verdict_of
from minivllm.distributed.ranks import RankFailure
from minivllm.engine.outputs import RequestOutput
from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM
from minivllm.models.config import ModelConfig
from minivllm.models.loader import random_model

NUM_INPUT = 100
# Names of kernels whose time is the ranks' exchange.
EXCHANGES = ("nccl", "sum_rows_kernel", "sum_parts_kernel", "best_kernel")


def main() -> None:
    """Run the stage that the first argument describes; its result goes to the file."""
    options = json.loads(sys.argv[1])
    stages = {
        "engine": engine_stage,
        "exact": exact_stage,
        "faults": faults_stage,
        "check": check_stage,
    }
    result = stages[options.pop("stage")](**options)
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def engine_stage(
    shapes: str, ranks: int, batches: list[int], tokens: int, requests: int, device: str
) -> dict[str, Any]:
    """An engine of this shape on ``ranks`` ranks: decode by batch, throughput, greedy answers."""
    began = time.perf_counter()
    settings = {
        "tensor_parallel_size": ranks,
        "max_num_seqs": max([8, requests, *batches]),
        "max_model_len": 1024,
        "gpu_memory_utilization": 0.6,
        "device": device,
    }
    llm, _ = build(settings, shapes)
    with llm:
        facts: dict[str, Any] = {"ready_seconds": time.perf_counter() - began}
        facts["stats_of_ranks"] = [asdict(rank) for rank in llm.engine.stats.ranks]
        # Prompts are made from a seed; answers are kept, so that later runs can be compared.
        facts["greedy"] = [out.outputs[0].token_ids for out in _greedy(llm)]
        for batch in batches:
            facts[str(batch)] = measure(llm, batch, tokens)
        if requests:
            facts["throughput"] = _throughput(llm, requests)
    return facts


def measure(llm: LLM, batch: int, tokens: int) -> dict[str, Any]:
    """Milliseconds from token to token of ``batch`` sequences that decode together."""
    engine = llm.engine
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=tokens + 24)
    times = []
    for _ in range(3):
        for place in range(batch):
            engine.add_request(str(place), [1 + place % 1000] * NUM_INPUT, params)
        while engine.scheduler.waiting or any(
            seq.num_output_tokens < 8 for seq in engine.scheduler.running
        ):
            engine.step()
        began = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        times.append(1e3 * (time.perf_counter() - began) / tokens)
        while engine.has_unfinished_requests:
            engine.step()
    middle = sorted(times)[1]
    facts: dict[str, Any] = {
        "ms_per_token": middle,
        "tokens_per_s": 1e3 * batch / middle,
        "rounds_ms": times,
    }
    if torch.cuda.is_available():
        profile = profile_decode(llm, batch, NUM_INPUT + 32)
        # With the wait for the slowest rank, and, as kernels are launched early, for the kernel in
        # front; the exchanges' own time is in the report of the stage "exchange".
        facts["communication_ms"] = sum(
            kernel["ms_a_step"]
            for kernel in profile["kernels"]
            if any(name in kernel["name"].lower() for name in EXCHANGES)
        )
        facts["profile"] = {
            name: profile[name]
            for name in ("step_ms", "busy_ms", "idle_share", "kernels_a_step", "parts_ms")
        }
        facts["kernels"] = profile["kernels"][:10]
    return facts


def exact_stage(ranks: int, device: str) -> dict[str, Any]:
    """Greedy tokens of small models in float32, with 8 and with 2 KV heads, on ``ranks`` ranks."""
    answers = {}
    for kv_heads in (8, 2):
        folder = shape_folder("Qwen3-0.6B", num_hidden_layers=4, num_key_value_heads=kv_heads)
        settings = {
            "model": folder,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "tensor_parallel_size": ranks,
            "dtype": "float32",
            "device": device,
            "max_num_seqs": 8,
            "max_model_len": 1024,
            "num_kv_blocks": 256,
        }
        with LLM(**settings) as llm:
            outputs = _greedy(llm)
        answers[f"{kv_heads} KV heads"] = [output.outputs[0].token_ids for output in outputs]
        gc.collect()
    return answers


def faults_stage(ranks: int, device: str) -> dict[str, Any]:
    """Kill a rank, and stop one, in the middle of the work: how long until the engine has ended?

    Raises AssertionError if a process is left behind.
    """
    found: dict[str, Any] = {}
    for name, sign in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP), ("next", None)):
        began = time.monotonic()
        llm = LLM(
            shape_folder("Qwen3-0.6B"),
            load_format="dummy",
            skip_tokenizer_init=True,
            tensor_parallel_size=ranks,
            device=device,
            max_num_seqs=8,
            max_model_len=2048,
            num_kv_blocks=400,
        )
        with llm:
            facts: dict[str, Any] = {"start_seconds": time.monotonic() - began}
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)
            processes = list(llm.engine._ranks._processes.values())
            if sign is not None:
                last = processes[-1].pid
                threading.Timer(1.0, os.kill, (last, sign)).start()
                began = time.monotonic()
                params = SamplingParams(temperature=0.5, ignore_eos=True, max_tokens=1500)
                try:
                    while time.monotonic() - began < 60:
                        llm.generate([[1, 2, 3]] * 4, params, use_tqdm=False)
                except RankFailure as error:
                    facts["error"] = str(error)
                facts["seconds_until_error"] = time.monotonic() - began - 1.0
            began = time.monotonic()
        facts["seconds_to_close"] = time.monotonic() - began
        assert all(process.poll() is not None for process in processes), "left behind"
        found[name] = facts
        print(name, facts, flush=True)
        del llm
        gc.collect()
    return found


def check_stage(shapes: str, answers: dict[str, list[list[int]]], device: str) -> dict[str, Any]:
    """Answers of each number of ranks beside the plain model of chapter 2 in float32."""
    config = ModelConfig.from_folder(shape_folder(shapes))
    where = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    dtype = torch.float32 if where.type == "cpu" else config.dtype
    model = random_model(config, dtype=dtype, device=where)
    prompts = greedy_prompts(config.vocab_size)
    margins: dict[str, Margins] = {}
    verdicts = {}
    for ranks, tokens in answers.items():
        for place, pair in enumerate(zip(prompts, tokens, strict=True)):
            # Most answers are the same on any number of ranks.
            key = json.dumps([place, pair[1]])
            margins[key] = margins.get(key) or margins_of(model, *pair)
        keys = [json.dumps([place, answer]) for place, answer in enumerate(tokens)]
        verdicts[ranks] = verdict_of([margins[key] for key in keys])
    return verdicts


def _throughput(llm: LLM, requests: int) -> dict[str, Any]:
    """A quarter of the field's usual workload: fewer requests, of up to 512 tokens in and out."""
    workload = usual_workload(requests, 512, vocab_size=llm.engine.model_config.vocab_size)
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=min(count, 500))
        for count in workload.max_tokens
    ]
    few = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=8)] * len(params)
    llm.generate(workload.prompts, few, use_tqdm=False)
    began = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    count = sum(len(out.outputs[0].token_ids) for out in outputs)
    return {
        "requests": requests,
        "input_tokens": workload.num_input_tokens,
        "output_tokens": count,
        "seconds": seconds,
        "output_tokens_per_s": count / seconds,
    }


def _greedy(llm: LLM) -> list[RequestOutput]:
    """Short and long prompts, one after the other and then together: every form of a step."""
    prompts = greedy_prompts(llm.engine.model_config.vocab_size)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=32)
    alone = llm.generate(prompts[:1], params, use_tqdm=False)
    return alone + llm.generate(prompts[1:], params, use_tqdm=False)


def greedy_prompts(vocab_size: int) -> list[list[int]]:
    """The prompt that is answered alone, and those that are answered together."""
    prompts = usual_workload(6, 300, 9, vocab_size).prompts
    return [prompts[0], *prompts]


if __name__ == "__main__":
    main()
