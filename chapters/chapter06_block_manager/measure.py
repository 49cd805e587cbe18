"""How long the first token takes when the beginning of a prompt is in the cache already.

    python -m chapters.chapter06_block_manager.measure
    python -m chapters.chapter06_block_manager.measure --json shared.json

A CPU is timed with one thread and in CPU seconds, so that other programs disturb less; a GPU by the
clock on the wall. Chapter 5's attention in PyTorch runs on both.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence as Tokens

import torch
from torch import nn

from chapters.chapter06_block_manager.driver import Request
from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.attention.paged_torch import TorchPagedAttention
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sequence import Sequence
from minivllm.models.hub import model_folder
from minivllm.models.loader import load_model

LENGTH, BLOCK_SIZE = 1040, 16
FOUND = (0, 512, 768, 1024)
REPEATS = 7


@dataclasses.dataclass(frozen=True)
class First:
    """Of a prompt, ``found`` tokens were cached: medians in ms, to admit it and to run the rest."""

    found: int
    admit: float
    run: float


class PagedModel:
    """A model with a pool of blocks; the driver's place is taken by whoever calls it."""

    def __init__(self, model: nn.Module, num_blocks: int) -> None:
        self.model = model
        weight = model.lm_head.weight
        self.device = weight.device
        self.manager = BlockManager(num_blocks, BLOCK_SIZE)
        self.cache = PagedKVCache(
            model.config, num_blocks, BLOCK_SIZE, dtype=weight.dtype, device=self.device
        )

    @torch.inference_mode()
    def run(self, seq: Sequence) -> int:
        """Run all pending tokens of an admitted sequence; the likeliest next token."""
        start, end, table = seq.num_computed, len(seq), seq.block_table
        self.manager.cache_full_blocks(seq, end)
        positions = range(start, end)
        slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        batch = PagedBatch(
            input_ids=self._tensor(seq.token_ids[start:]),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(slots),
            cu_query_lens=self._tensor([0, end - start], torch.int32),
            context=self._tensor([end], torch.int32),
            block_tables=self._tensor([table], torch.int32),
            query_lens=(end - start,),
            context_lens=(end,),
        )
        attend = TorchPagedAttention(self.cache, batch, self.model.config.head_size**-0.5)
        hidden = self.model(batch.input_ids, batch.positions, attend)
        token = int(self.model.compute_logits(hidden[-1:]).argmax())
        seq.num_computed = end
        return token

    def _tensor(self, values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        values = list(values) if isinstance(values, range) else values
        return torch.tensor(values, dtype=dtype, device=self.device)


def first_token(paged: PagedModel, found: int, repeats: int = REPEATS) -> First:
    """Admit and run prompts of LENGTH tokens whose first ``found`` are in the cache."""
    clock = time.process_time if paged.device.type == "cpu" else time.perf_counter
    admit, run = [], []
    generator = torch.Generator().manual_seed(found)
    vocabulary = paged.model.config.vocab_size
    for _ in range(repeats):
        prompt = torch.randint(vocabulary, (LENGTH,), generator=generator).tolist()
        paged.manager.forget_all()
        for tokens in (prompt[: found + 1], prompt):
            seq = Request("r", tokens, 1).sequence()
            begun = clock()
            admitted = paged.manager.admit(seq)
            between = clock()
            assert admitted
            if tokens is prompt:
                assert seq.num_computed == found, f"{seq.num_computed} tokens were found"
            paged.run(seq)
            ended = clock()
            paged.manager.release(seq)
        admit.append((between - begun) * 1e3)
        run.append((ended - between) * 1e3)
    return First(found, statistics.median(admit), statistics.median(run))


def main(argv: Tokens[str] | None = None) -> int:
    from minivllm.benchmarks.report import machine_facts, write_report

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or a name on the hub; the embedded model if none")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        folder = model_folder(arguments.model)
        dtype = torch.float32 if device.type == "cpu" else None
        paged = PagedModel(load_model(folder, dtype=dtype, device=device), 256)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    facts = machine_facts()
    print(f"{facts['device']}; torch {torch.__version__}; {facts['date']}")
    print(f"{'prompt':>6}  {'found':>6}  {'run':>6}  {'admit, ms':>9}  {'first token, ms':>15}")
    first_token(paged, 0)  # the first run of anything is slower
    rows = []
    for found in FOUND:
        rows.append(first_token(paged, found))
        print(
            f"{LENGTH:>6,}  {found:>6,}  {LENGTH - found:>6,}  {rows[-1].admit:>9.2f}"
            f"  {rows[-1].run:>15.1f}",
            flush=True,
        )
    result = {"model": folder.name, "rows": [dataclasses.asdict(row) for row in rows]}
    write_report(arguments.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
