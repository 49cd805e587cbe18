"""A runner whose decode steps need the host for next to nothing.

    host     schedule t+1 | send what changed | replay | read the tokens of t | schedule t+2 | ...
    device   ...... step t ......  | ...... step t+1 ......  | ...... step t+2 ......

Three things make that possible. The state of every decoding sequence lies on the device and is
carried on there (``device_rows``); the host only sends changes, such as a new block. The tokens
that a step samples are the next step's input without a detour through the host, which reads them a
step late. And a step is replayed from a CUDA graph (``cuda_graphs``), one launch instead of 250.

A step that runs prompts, or anything else that is not one token for each of some known rows, runs
without a graph, from tensors made for it; but its tokens go to the rows all the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.engine.batches import (
    TokenLogprobs,
    cut_logprobs,
    make_batch,
    make_sampling_tensors,
    to_device,
)
from minivllm.engine.config import EngineConfig
from minivllm.engine.cuda_graphs import CudaGraphRecorder, GraphLadder, NoRecorder, ladder_sizes
from minivllm.engine.device_rows import DeviceRows, RowUpdates, StepInputs
from minivllm.engine.model_runner import ModelRunner, StepResult
from minivllm.engine.row_table import RowTable
from minivllm.engine.scheduler import Step
from minivllm.engine.sequence import Sequence
from minivllm.engine.step_forms import StepForms, choose_forms
from minivllm.layers.sampler import top_logprobs

# What recorded graphs take outside PyTorch's allocator and in their pool: measured 0.2 GiB for 35
# sizes of Qwen3-0.6B; more layers mean more nodes.
GRAPH_BYTES_PER_NODE = 8 << 10


class PendingTokens:
    """Tokens on their way from the device."""

    def __init__(
        self, sequences: list[Sequence], tokens: torch.Tensor, logprobs: tuple[torch.Tensor, ...]
    ) -> None:
        self._sequences = sequences
        self._tokens = _to_host(tokens)
        self._logprobs = tuple(map(_to_host, logprobs))
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> StepResult:
        """Wait for the step, and read its tokens."""
        if self._event is not None:
            self._event.synchronize()
        logprobs: list[TokenLogprobs | None] = [None] * len(self._sequences)
        if self._logprobs:
            logprobs = cut_logprobs(self._sequences, *self._logprobs)
        return StepResult(self._tokens.tolist(), logprobs)


@dataclass(frozen=True)
class GraphFacts:
    """What recording cost: the sizes, seconds, and bytes of GPU memory."""

    sizes: list[int]
    seconds: float
    num_bytes: int


class GraphRunner(ModelRunner):
    """Decodes from CUDA graphs; :meth:`launch` returns while the step runs.

    On a CPU, or with ``enforce_eager``, the same steps run without graphs.
    """

    overlaps = True

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.facts = self._record_graphs()

    def _reserve(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> None:
        assert config.block_size is not None
        self.block_size = config.block_size
        self.eager = config.enforce_eager or self.device.type != "cuda"
        places = config.max_num_seqs
        max_blocks = -(-max_model_len // config.block_size)
        self.rows = DeviceRows.allocate(places, max_blocks, self.device)
        self.table = RowTable(places)
        self.inputs = StepInputs.allocate(places, max_blocks, self.device)
        self.active = torch.full((places,), -1, dtype=torch.int32, device=self.device)
        self._active: list[int] = []
        self.tokens = torch.zeros(places, dtype=torch.int64, device=self.device)
        self.logits = torch.zeros(
            places, self.model_config.vocab_size, dtype=dtype, device=self.device
        )
        self.forms: StepForms = choose_forms(self.model, self.device)
        self.ladder = GraphLadder(
            ladder_sizes(places),
            self._decode,
            NoRecorder() if self.eager else CudaGraphRecorder(self.device),
        )

    def _bytes_to_come(self) -> int:
        nodes = 12 * self.model_config.num_layers * len(self.ladder.sizes)
        return 0 if self.eager else nodes * GRAPH_BYTES_PER_NODE

    @torch.inference_mode()
    def _record_graphs(self) -> GraphFacts:
        started = time.perf_counter()
        before = 0 if self.eager else torch.cuda.mem_get_info(self.device)[0]
        self.ladder.record()
        num_bytes = 0 if self.eager else before - torch.cuda.mem_get_info(self.device)[0]
        return GraphFacts(self.ladder.sizes, time.perf_counter() - started, num_bytes)

    def run(self, step: Step) -> StepResult:
        """Launch the step and wait for its tokens."""
        return self.launch(step).result()

    @torch.inference_mode()
    def launch(self, step: Step) -> PendingTokens:
        """Send the step to the device."""
        self.table.drop_stale()
        sequences = [item.seq for item in step.scheduled]
        if all(item.decodes and item.seq in self.table for item in step.scheduled):
            return self._launch_decode(sequences)
        return self._launch_mixed(step)

    def close(self) -> None:
        """Free the graphs."""
        self.ladder.clear()

    def _launch_decode(self, sequences: list[Sequence]) -> PendingTokens:
        """One token for each of these, all of which have rows."""
        updates = RowUpdates(len(self.active), self.rows.block_tables.shape[1])
        self.table.follow(sequences, updates)
        self._send(updates)
        self._activate(self.table.places(sequences))
        batch = len(sequences)
        size = self.ladder.replay(batch)
        logits, tokens = self.logits[:batch], self.tokens[:batch]
        if any(seq.params.reshapes for seq in sequences):
            # The graph knows temperatures only; these want more, so their tokens are chosen again.
            tokens.copy_(self._sample(sequences, logits))
            self.forms.finish_step(
                self.rows, self.active[:size], self.inputs.first(size), self.tokens[:size]
            )
        return PendingTokens(sequences, tokens, self._top_logprobs(sequences, logits, tokens))

    def _decode(self, size: int) -> None:
        """A decode step of ``size`` places on memory that stays: what a graph records."""
        active, inputs = self.active[:size], self.inputs.first(size)
        self.forms.begin_step(self.rows, active, inputs, self.block_size)
        batch = PagedBatch(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            # Nobody reads it where every sequence has one query.
            cu_query_lens=self.active[:0],
            context=inputs.context,
            block_tables=inputs.block_tables,
            query_lens=(1,) * size,
            context_lens=(),
        )
        logits, tokens = self.logits[:size], self.tokens[:size]
        self.forms.logits(self.model, self.forward(batch, self.cache), logits)
        self.forms.sample(logits, inputs, tokens)
        self.forms.finish_step(self.rows, active, inputs, tokens)

    def _launch_mixed(self, step: Step) -> PendingTokens:
        """Prompts, chunks of prompts, and decodes beside them."""
        batch = make_batch(step.scheduled, self.block_size, self.device)
        ends = accumulate(item.num_tokens for item in step.scheduled)
        unknown = [
            (end - 1, item.seq)
            for end, item in zip(ends, step.scheduled, strict=True)
            if item.seq.num_unknown
        ]
        if unknown:
            # What the host does not know yet lies in the rows.
            at, sequences = map(list, zip(*unknown, strict=True))
            at = to_device(at, torch.int64, self.device)
            rows = to_device(self.table.places(sequences), torch.int64, self.device)
            batch.input_ids[at] = self.rows.last_token[rows].long()
        hidden = self.forward(batch, self.cache)
        sampling = step.sampling
        if not sampling:
            return PendingTokens([], self.tokens[:0], ())
        logits = self.model.compute_logits(self.last_rows(step, hidden))
        tokens = self._sample(sampling, logits)
        updates = RowUpdates(len(self.active), self.rows.block_tables.shape[1])
        places = [self.table.enter(seq, updates) for seq in sampling]
        self._send(updates)
        entered = to_device(places, torch.int64, self.device)
        self.rows.last_token[entered] = tokens.int()
        return PendingTokens(sampling, tokens, self._top_logprobs(sampling, logits, tokens))

    def forward(self, batch: PagedBatch, cache: PagedKVCache) -> torch.Tensor:
        return self.forms.forward(self, batch, cache)

    def _send(self, updates: RowUpdates) -> None:
        """Bring the host's changes to the rows: one copy, one launch, and none without a change."""
        if updates.words:
            pairs = updates.pairs()
            if self.device.type == "cuda":
                pairs = pairs.pin_memory().to(self.device, non_blocking=True)
            self.forms.apply_updates(self.rows.flat, pairs)

    def _activate(self, places: list[int]) -> None:
        """Let the places of a decode step be these rows."""
        if places == self._active:
            return
        padding = [-1] * (len(self.active) - len(places))
        self.active.copy_(to_device(places + padding, torch.int32, self.device))
        self._active = places

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
        params = make_sampling_tensors(sequences, logits.shape[-1], self.device)
        return self.sampler(logits, params)

    @staticmethod
    def _top_logprobs(
        sequences: list[Sequence], logits: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        wanted = [seq.params.logprobs for seq in sequences if seq.params.logprobs is not None]
        return top_logprobs(logits, tokens, max(wanted)) if wanted else ()


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which is complete once the device has come so far."""
    if not x.is_cuda:
        return x.clone()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
