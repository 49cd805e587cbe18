"""Another engine on a job, in a process of its own: see ``peers.py``."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# generate() works in padded batches of this many.
BATCH = 32


@dataclass(frozen=True)
class Job:
    """What a peer is to do.

    folder: a config, a tokenizer (some peers insist on one), and weights unless ``dummy``.
    prompts, max_tokens: the requests, each to get exactly so many tokens at temperature 0.6.
    max_len: the longest prompt and answer together.
    """

    folder: str
    dummy: bool
    dtype: str
    device: str
    prompts: list[list[int]]
    max_tokens: list[int]
    rounds: int
    max_len: int


Round = Callable[[list[list[int]], list[int]], int]


@contextlib.contextmanager
def _vllm(job: Job) -> Iterator[Round]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job.folder,
        skip_tokenizer_init=True,
        load_format="dummy" if job.dummy else "auto",
        dtype=job.dtype,
        max_model_len=job.max_len + 1,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], counts: list[int]) -> int:
        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count, detokenize=False)
            for count in counts
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(requests, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    yield generate


@contextlib.contextmanager
def _nano_vllm(job: Job) -> Iterator[Round]:
    from nanovllm import LLM, SamplingParams

    # Without weight files it keeps whatever its memory held, which costs the same time.
    llm = LLM(job.folder, enforce_eager=False, max_model_len=job.max_len + 1)

    def generate(prompts: list[list[int]], counts: list[int]) -> int:
        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count) for count in counts
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output["token_ids"]) for output in outputs)

    yield generate


@contextlib.contextmanager
def _transformers(job: Job) -> Iterator[Round]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    dtype = getattr(torch, job.dtype)
    if job.dummy:
        with torch.device(job.device):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(job.folder), dtype=dtype
            )
    else:
        model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype).to(job.device)
    model.eval()
    # No end token: a batch runs to the longest answer that was asked of it.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None
    )

    @torch.inference_mode()
    def generate(prompts: list[list[int]], counts: list[int]) -> int:
        made = 0
        for first in range(0, len(prompts), BATCH):
            batch, asked = prompts[first : first + BATCH], counts[first : first + BATCH]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=job.device)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=job.device
            )
            result = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(asked)
            ).tolist()
            # What a row gets beyond its own count is padding, and does not count.
            made += sum(
                min(len(row) - width, count) for row, count in zip(result, asked, strict=True)
            )
        return made

    yield generate


ADAPTERS = {"vllm": _vllm, "nano-vllm": _nano_vllm, "transformers": _transformers}


def run_job(name: str, job: Job) -> dict[str, Any]:
    """In the peer's own process: start it, warm it up, and time its rounds.

    Raises RuntimeError if it does not make exactly the tokens that were asked for.
    """
    began = time.perf_counter()
    with ADAPTERS[name](job) as generate:
        ready = time.perf_counter() - began
        generate(job.prompts[:1], [4])
        gc.collect()
        seconds = []
        for _ in range(job.rounds):
            began = time.perf_counter()
            made = generate(job.prompts, job.max_tokens)
            seconds.append(time.perf_counter() - began)
            if made != sum(job.max_tokens):
                raise RuntimeError(f"{name} made {made} tokens, not {sum(job.max_tokens)}")
    return {"ready_seconds": ready, "seconds": seconds}


def main(arguments: list[str]) -> None:
    """NAME JOB RESULT: run the job in the file JOB and write what came out to RESULT."""
    name, job_file, result_file = arguments
    job = Job(**json.loads(Path(job_file).read_text(encoding="utf-8")))
    Path(result_file).write_text(json.dumps(run_job(name, job)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
