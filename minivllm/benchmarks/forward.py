"""Forward passes of a GPU's step, side by side: ``python -m minivllm.benchmarks.forward``.

Decode steps are those of the usual throughput workload: after so many steps, whoever is still being
served, with the context it has then; each captured in a CUDA graph, token ids to logits. Prompts
are as many of the workload's first ones as a step takes, without a graph, so the host's time to
launch them is measured too. ``--try`` adds variants of the chain's tuning, as in ``skinny.py``.
Weights, keys and values are random, made on the device. The logits of the forms are compared with
those of the plain model.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.attention.paged_triton import TritonAttention
from minivllm.benchmarks import harness
from minivllm.benchmarks.decode_steps import BLOCK_SIZE, SHAPES, model_config, random_model
from minivllm.benchmarks.report import write_report
from minivllm.benchmarks.skinny import parse_tuning
from minivllm.benchmarks.workload import usual_workload
from minivllm.engine.device_rows import StepInputs
from minivllm.engine.folded_forward import FoldedForward
from minivllm.engine.fused_forward import FusedForward
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.engine.step_forms import decode_batch
from minivllm.models.config import ModelConfig

MAX_LEN = 2048


def contexts_after(step: int, places: int = 256) -> list[int]:
    """Tokens of each sequence that the usual workload still serves after ``step`` steps."""
    workload = usual_workload(places, 1024)
    return [
        len(prompt) + step + 1
        for prompt, count in zip(workload.prompts, workload.max_tokens, strict=True)
        if count > step + 1
    ]


def decode_step(contexts: Sequence[int], vocab_size: int, device: torch.device) -> PagedBatch:
    """A decode step of sequences so long, padded to a multiple of 8 places."""
    places = -(-len(contexts) // 8) * 8
    inputs = StepInputs.allocate(places, MAX_LEN // BLOCK_SIZE, device)
    blocks = [-(-length // BLOCK_SIZE) for length in contexts]
    tables = torch.randperm(sum(blocks), device=device).int().split(blocks)
    for place, (length, table) in enumerate(zip(contexts, tables, strict=True)):
        inputs.block_tables[place, : len(table)] = table
        inputs.context[place] = length
        inputs.positions[place] = length - 1
        inputs.slot_mapping[place] = table[-1] * BLOCK_SIZE + (length - 1) % BLOCK_SIZE
    inputs.input_ids.random_(0, vocab_size)
    return decode_batch(inputs)


def prompt_step(most: int, vocab_size: int, device: torch.device) -> PagedBatch:
    """The usual workload's first prompts, up to ``most`` tokens, in one step."""
    lengths = [len(prompt) for prompt in usual_workload(256, 1024).prompts]
    ends = [end for end in accumulate(lengths) if end <= most]
    lengths = lengths[: len(ends)]
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    tables = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32, device=device)
    slots, positions, first = [], [], 0
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        tables[row, :count] = torch.arange(first, first + count)
        slots += range(first * BLOCK_SIZE, first * BLOCK_SIZE + length)
        positions += range(length)
        first += count
    return PagedBatch(
        input_ids=torch.randint(vocab_size, (ends[-1],), device=device),
        positions=torch.tensor(positions, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        cu_query_lens=torch.tensor([0, *ends], dtype=torch.int32, device=device),
        context=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_tables=tables,
        query_lens=tuple(lengths),
        context_lens=tuple(lengths),
    )


class Contest:
    """One model, its cache, and the steps that all forms run on them."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.model = random_model(config, dtype, device)
        steps = map(contexts_after, range(0, 1024, 16))
        most = max(sum(-(-length // BLOCK_SIZE) for length in contexts) for contexts in steps)
        self.cache = PagedKVCache(config, most + 64, BLOCK_SIZE, dtype=dtype, device=device)
        for pages in (self.cache.k, self.cache.v):
            for layer in pages:
                layer.normal_()
        self.attention = TritonAttention(
            config,
            max_num_seqs=256,
            max_model_len=MAX_LEN,
            block_size=BLOCK_SIZE,
            dtype=dtype,
            device=device,
        )
        # The folded form changes the weights, up to rounding, so the fused one is made beside it.
        twin = random_model(config, dtype, device)
        twin.load_state_dict(self.model.state_dict())
        self.forms = {
            "fused": FusedForward(self.model, pdl=True),
            "folded": FoldedForward(twin, pdl=True),
        }
        self.chains: dict[tuple[str, int], SkinnyForward] = {}

    @torch.inference_mode()
    def run_chain(self, variant: str, batch: PagedBatch) -> torch.Tensor:
        """Logits [B, V] by ``skinny_forward``, its tuning changed as ``variant`` says."""
        rows = len(batch.context)
        chain = self.chains.get((variant, rows))
        if chain is None:
            tuning = parse_tuning(variant, rows)
            chain = SkinnyForward(self.model, self.cache, rows, tuning=tuning)
            self.chains[variant, rows] = chain
        attend = self.attention(self.cache, batch, self.config.head_size**-0.5)
        return chain(
            batch.input_ids,
            batch.positions,
            batch.slot_mapping,
            batch.block_tables,
            batch.context,
            attend=partial(attend.attend_stored, pdl=chain.dependent),
        )

    @torch.inference_mode()
    def run(self, form: str, batch: PagedBatch) -> torch.Tensor:
        """Logits [B, V] of each sequence's last token."""
        forward = self.forms[form]
        attend = self.attention(self.cache, batch, self.config.head_size**-0.5)
        hidden = forward(
            batch.input_ids,
            batch.positions,
            batch.slot_mapping,
            self.cache,
            partial(attend.attend_stored, pdl=True),
        )
        return self._logits(hidden, batch)

    @torch.inference_mode()
    def plain(self, batch: PagedBatch) -> torch.Tensor:
        """The same by the plain model."""
        attend = self.attention(self.cache, batch, self.config.head_size**-0.5)
        return self._logits(self.model(batch.input_ids, batch.positions, attend), batch)

    def _logits(self, hidden: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
        if len(hidden) > len(batch.context):
            hidden = hidden[batch.cu_query_lens[1:].long() - 1]
        return hidden @ self.model.lm_head.weight.t()


def kernel_times(call: Callable[[], Any], repeats: int = 3) -> dict[str, Any]:
    """By kernel: launches a call, and microseconds of each."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name[:60]].append(event.time_range.elapsed_us())
    return {
        name: {"a_step": len(each) / repeats, "us_each": sum(each) / len(each)}
        for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:14]
    }


def measure(
    contest: Contest,
    name: str,
    batch: PagedBatch,
    *,
    graph: bool,
    profile: bool,
    variants: Sequence[str] = (),
) -> dict[str, Any]:
    """Milliseconds of a step in each form, and how far its logits are from the plain model's.

    graph: in a CUDA graph. variants: of the chain, where it can take so many rows.
    """
    device = batch.input_ids.device
    expected = contest.plain(batch).float()
    real = batch.context > 0
    calls = {form: partial(contest.run, form, batch) for form in contest.forms}
    if graph and SkinnyForward.fits(contest.config, len(real), device, torch.bfloat16):
        for variant in ("", *variants):
            calls[f"chain {variant}".rstrip()] = partial(contest.run_chain, variant, batch)
    errors = {
        form: float((call().float() - expected)[real].norm() / expected[real].norm())
        for form, call in calls.items()
    }
    timed = {form: harness.replay_of([call]) if graph else call for form, call in calls.items()}
    times = harness.time_in_turns(timed, device, rounds=3)
    record: dict[str, Any] = {
        "step": name,
        "tokens": len(batch.input_ids),
        "context": int(batch.context.sum()),
        "ms": {form: 1e3 * seconds for form, seconds in times.items()},
        "error": errors,
    }
    line = ", ".join(f"{form} {1e3 * seconds:.3f} ms" for form, seconds in times.items())
    if not graph:
        hosts = {form: 1e3 * (harness.time_host(call, device) or 0) for form, call in calls.items()}
        record["host_ms"] = hosts
        line += "; host " + ", ".join(f"{form} {ms:.2f} ms" for form, ms in hosts.items())
    print(f"{name}: {line}; off by {max(errors.values()):.1e}", flush=True)
    if profile:
        record["kernels"] = {form: kernel_times(call) for form, call in timed.items()}
        for form, kernels in record["kernels"].items():
            print(f"  {form}")
            for kernel, each in kernels.items():
                print(f"    {kernel:60} {each['a_step']:6.1f} x {each['us_each']:8.2f} us")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", choices=list(SHAPES), default="0.6B")
    parser.add_argument(
        "--after", type=int, nargs="*", default=[0, 200, 400, 600, 800, 900], help="decode steps"
    )
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[1024, 8192], help="tokens of prompt steps"
    )
    parser.add_argument("--try", dest="variants", nargs="+", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--profile", action="store_true", help="kernels of the first of each")
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device is here, and its kernels are what this is about")
    device = torch.device("cuda")
    torch.manual_seed(0)
    config = model_config(arguments.shapes)
    contest = Contest(config, device, torch.bfloat16)
    records = []
    for after in arguments.after:
        contexts = contexts_after(after)
        name = f"{len(contexts)} decodes, {sum(contexts)} tokens of context"
        batch = decode_step(contexts, config.vocab_size, device)
        profile = arguments.profile and after == arguments.after[0]
        records.append(
            measure(contest, name, batch, graph=True, profile=profile, variants=arguments.variants)
        )
    for most in arguments.prompts:
        batch = prompt_step(most, config.vocab_size, device)
        name = f"{len(batch.context)} prompts, {len(batch.input_ids)} tokens"
        profile = arguments.profile and most == arguments.prompts[-1]
        records.append(measure(contest, name, batch, graph=False, profile=profile))
    write_report(arguments.output, {"shapes": arguments.shapes, "records": records})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
