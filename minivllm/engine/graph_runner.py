"""A runner whose decode steps need the host for next to nothing.

    host     schedule t+1 | send what changed | replay | read the tokens of t | schedule t+2 | ...
    device   ...... step t ......  | ...... step t+1 ......  | ...... step t+2 ......

Three things make that possible. The state of every decoding sequence lies on the device and is
carried on there (``device_rows``); the host only sends changes, such as a new block. The tokens
that a step samples are the next step's input without a detour through the host, which reads them a
step late. And a step is replayed from a CUDA graph (``cuda_graphs``), one launch instead of 250.

A step that runs prompts, or anything else that is not one token for each of some known rows, has
graphs of its own while it is small (``prompt_graphs``), and runs without one where it is large; its
tokens go to the rows all the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from minivllm.attention.flash_hopper import runs_on_hopper
from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.engine.batches import (
    HostBatch,
    HostSampling,
    lay_out,
    sampling_of,
    to_device,
)
from minivllm.engine.config import EngineConfig
from minivllm.engine.cuda_graphs import CudaGraphRecorder, GraphLadder, NoRecorder, ladder_sizes
from minivllm.engine.device_rows import DeviceRows, RowUpdates, StepInputs
from minivllm.engine.model_runner import ModelRunner, StepResult
from minivllm.engine.pending_tokens import PendingTokens
from minivllm.engine.prompt_graphs import WORK_OF_DECODES, PromptGraphs
from minivllm.engine.row_table import RowTable
from minivllm.engine.scheduler import Step
from minivllm.engine.step_forms import StepForms, choose_forms
from minivllm.engine.step_message import StepMessage
from minivllm.layers.sampler import top_logprobs

# What recorded graphs take outside PyTorch's allocator and in their pool, rounded up (``graphs`` in
# the report of ``bench throughput`` tells what they took).
GRAPH_BYTES_PER_NODE = 16 << 10


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
        self.vocab_size = self.model_config.vocab_size
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

        self.prompts: PromptGraphs | None = None
        if not self.eager:
            most_tokens, most_seqs = self._most_in_prompt_graphs(config, dtype)
            self.prompts = PromptGraphs(
                self._prompt,
                self.ladder.recorder,
                max_tokens=most_tokens,
                max_seqs=most_seqs,
                max_blocks=max_blocks,
                context_of_decodes=self._most_context_of_decodes(dtype),
                vocab_size=self.model_config.vocab_size,
                dtype=dtype,
                device=self.device,
            )
        if self.device.type == "cuda":
            self._compile_ahead(dtype)

    def _most_in_prompt_graphs(self, config: EngineConfig, dtype: torch.dtype) -> tuple[int, int]:
        """Up to how many tokens, of how many sequences, a step with prompts comes from a graph."""
        if runs_on_hopper(self.device, dtype, self.model_config.head_size):
            return config.max_num_batched_tokens, config.max_num_seqs
        # Other kernels have a program for every block of every sequence that there might be: with
        # more room, those that find nothing to do would take longer than the launches that we save.
        return min(config.max_num_batched_tokens, 512), min(config.max_num_seqs, 8)

    def _most_context_of_decodes(self, dtype: torch.dtype) -> int:
        """With how much context, in all, sequences may decode in a graph of prompts."""
        config = self.model_config
        work = WORK_OF_DECODES
        if not runs_on_hopper(self.device, dtype, config.head_size):
            work //= 4  # a slower chip, with slower kernels, and the same Python
        return work // (config.num_heads * config.head_size)

    def _compile_ahead(self, dtype: torch.dtype) -> None:
        """Compile what the steps to come will launch, before a request has to wait for it."""
        from minivllm.engine.compile_ahead import compile_ahead

        # All layers share one block, which nobody's tokens are in.
        config = replace(self.model_config, num_layers=1)
        cache = PagedKVCache(config, 1, self.block_size, dtype=dtype, device=self.device)
        layers = self.model_config.num_layers
        cache.k, cache.v = (x.expand(layers, -1, -1, -1, -1) for x in (cache.k, cache.v))
        self.cache = cache
        compile_ahead(self._rehearse, self.device)
        del self.cache
        # The old ones may hold on to that block.
        self.forms = choose_forms(self.model, self.device)

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Launch every kernel that a step can need; on nothing but padding."""
        for size in self.ladder.sizes:
            # Tile sizes change where a power of two is passed; how attention is split, anywhere.
            if size <= 32 or size & (size - 1) == 0 or size == self.ladder.sizes[-1]:
                self._decode(size)
        if self.prompts is not None:
            self.prompts.run(self.prompts.ladder.sizes[0])
        places, most_blocks = self.inputs.block_tables.shape
        for decodes, prompt in ((1, 2), (places, 2), (1, 64), (1, 1024)):
            query_lens = [1] * decodes + [min(prompt, most_blocks * self.block_size)]
            none = [0] * sum(query_lens)
            tables = [[0] * -(-count // self.block_size) for count in query_lens]
            batch = HostBatch(none, none, [-1] * len(none), query_lens, query_lens, tables)
            logits = self._run_unrecorded(StepMessage(batch=batch, last=[0]))
            self._choose(logits, HostSampling([1.0], [0], [0], None, None, None))
        self.forms.apply_updates(self.rows.flat, to_device([[0, 0]], torch.int32, self.device))

    def _bytes_to_come(self) -> int:
        if self.prompts is None:
            return 0
        config = self.model_config
        graphs = len(self.ladder.sizes) + len(self.prompts.ladder.sizes)
        # What lies between the kernels of the largest prompt graph, in which the others find room:
        # the residual stream and what is added, queries and all heads twice, the MLP's three parts.
        heads = config.num_heads + 2 * config.num_kv_heads
        numbers = 5 * config.hidden_size + 2 * heads * config.head_size
        numbers += 3 * config.intermediate_size
        between = self.prompts.ladder.sizes[-1] * numbers * self.logits.element_size()
        return 12 * config.num_layers * graphs * GRAPH_BYTES_PER_NODE + between

    @torch.inference_mode()
    def _record_graphs(self) -> GraphFacts:
        started = time.perf_counter()
        if not self.eager:
            # Recording does both, and what they free must not be taken for memory of the graphs.
            gc.collect()
            torch.cuda.empty_cache()
        before = 0 if self.eager else torch.cuda.mem_get_info(self.device)[0]
        self.ladder.record()
        if self.prompts is not None:
            self.prompts.ladder.record()
        num_bytes = 0 if self.eager else before - torch.cuda.mem_get_info(self.device)[0]
        return GraphFacts(self.ladder.sizes, time.perf_counter() - started, num_bytes)

    def run(self, step: Step) -> StepResult:
        """Launch the step and wait for its tokens."""
        return self.launch(step).result()

    def launch(self, step: Step) -> PendingTokens:
        """Send the step to the device, where one more may be on its way by then.

        Read the tokens of that one before the next launch: there is room for those of two steps.
        """
        message = self.prepare(step)
        return self._pending(step, message, *self.execute(message))

    def _pending(
        self,
        step: Step,
        message: StepMessage,
        tokens: torch.Tensor,
        logprobs: tuple[torch.Tensor, ...],
    ) -> PendingTokens:
        """What :meth:`execute` gave, before the scheduler counts the step's tokens."""
        if message.batch is not None:
            return PendingTokens(step.sampling, tokens, logprobs, device=self.device)
        sampling = step.sampling
        numbers = [seq.num_output_tokens for seq in sampling]
        places = self.rows.places_of(message.places, numbers)
        posted = self.rows.posted
        return PendingTokens(sampling, posted, logprobs, device=self.device, places=places)

    def prepare(self, step: Step) -> StepMessage:
        """What the device must be told for ``step``; the host's half of it."""
        self.table.drop_stale()
        updates = RowUpdates(len(self.active), self.rows.block_tables.shape[1])
        sampling = step.sampling
        wanted = [seq.params.logprobs for seq in sampling if seq.params.logprobs is not None]
        num_logprobs = max(wanted) if wanted else None
        if all(item.decodes and item.seq in self.table for item in step.scheduled):
            self.table.follow(sampling, updates)
            # Of cutting tokens off the rows know nothing: then they are chosen once more.
            cuts = any(seq.params.reshapes for seq in sampling)
            return StepMessage(
                updates=list(updates.words.items()),
                places=self.table.places(sampling),
                sampling=sampling_of(sampling, self.vocab_size) if cuts else None,
                num_logprobs=num_logprobs,
            )
        ends = list(accumulate(item.num_tokens for item in step.scheduled))
        pairs = list(zip(ends, step.scheduled, strict=True))
        waiting = [(end - 1, item.seq) for end, item in pairs if item.seq.num_unknown]
        rows = self.table.places([seq for _, seq in waiting])
        return StepMessage(
            places=[self.table.enter(seq, updates) for seq in sampling],
            updates=list(updates.words.items()),
            batch=lay_out(step.scheduled, self.block_size),
            last=[end - 1 for end, item in pairs if item.samples],
            waiting=[(at, row) for (at, _), row in zip(waiting, rows, strict=True)],
            sampling=sampling_of(sampling, self.vocab_size),
            num_logprobs=num_logprobs,
        )

    @torch.inference_mode()
    def execute(self, message: StepMessage) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The device's half: returns the tokens int64 [n], and what :func:`top_logprobs` finds."""
        if message.batch is None:
            logits, tokens = self._decode_rows(message)
        else:
            logits, tokens = self._run_batch(message)
        if message.num_logprobs is None or not len(tokens):
            return tokens, ()
        return tokens, top_logprobs(self.whole_rows(logits), tokens, message.num_logprobs)

    def whole_rows(self, logits: torch.Tensor) -> torch.Tensor:
        """logits as this runner computes them -> [n, V]; here they are that already."""
        return logits

    def close(self) -> None:
        """Free the graphs."""
        self.ladder.clear()
        if self.prompts is not None:
            self.prompts.ladder.clear()
            self.prompts = None

    def _decode_rows(self, message: StepMessage) -> tuple[torch.Tensor, torch.Tensor]:
        """One token for each row in ``places``: logits [n, V] and tokens [n]."""
        self._send(message.updates)
        self._activate(message.places)
        batch = len(message.places)
        size = self.ladder.replay(batch)
        logits, tokens = self.logits[:batch], self.tokens[:batch]
        if message.sampling is not None:
            tokens.copy_(self._choose(logits, message.sampling))
            self.forms.finish_step(
                self.rows, self.active[:size], self.inputs.first(size), self.tokens[:size]
            )
        return logits, tokens

    def _decode(self, size: int) -> None:
        """A decode step of ``size`` places on memory that stays: what a graph records."""
        active, inputs = self.active[:size], self.inputs.first(size)
        self.forms.begin_step(self.rows, active, inputs, self.block_size)
        logits, tokens = self.logits[:size], self.tokens[:size]
        self.forms.decode(self, inputs, logits)
        self.forms.sample(logits, inputs, tokens)
        self.forms.finish_step(self.rows, active, inputs, tokens)

    def _run_batch(self, message: StepMessage) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts, chunks of prompts, and decodes beside them."""
        assert message.batch is not None
        if self.prompts is not None and self.prompts.fits(message.batch):
            self._fill_in(self.prompts.load(message.batch, message.last), message.waiting)
            logits = self.prompts.replay(message.batch, message.last)
        else:
            logits = self._run_unrecorded(message)
        if not message.places:
            return logits, self.tokens[:0]
        tokens = self._choose(logits, message.sampling)
        self._send(message.updates)
        (places,) = self._indices(message.places)
        self.rows.last_token[places] = tokens.int()
        return logits, tokens

    def _run_unrecorded(self, message: StepMessage) -> torch.Tensor:
        """Logits [n, V] of a batch that no graph holds."""
        assert message.batch is not None
        batch = message.batch.to(self.device)
        self._fill_in(batch.input_ids, message.waiting)
        hidden = self.forward(batch, self.cache)
        if not message.last:
            return self.logits[:0]
        (last,) = self._indices(message.last)
        return self.model.compute_logits(hidden[last])

    def _fill_in(self, input_ids: torch.Tensor, waiting: list[tuple[int, int]]) -> None:
        """Tokens that only the device knows as yet: (place in the batch, row)."""
        if waiting:
            at, rows = self._indices(*zip(*waiting, strict=True))
            input_ids[at] = self.rows.last_token[rows].long()

    def _prompt(self, batch: PagedBatch, last: torch.Tensor, logits: torch.Tensor) -> None:
        """A step with prompts: what a graph of :class:`PromptGraphs` records."""
        hidden = self.forward(batch, self.cache)
        self.forms.head(self.model, hidden[last], logits)

    def _choose(self, logits: torch.Tensor, sampling: HostSampling | None) -> torch.Tensor:
        """Tokens int64 [n] from logits [n, V]."""
        if sampling is None:
            return logits.argmax(dim=-1)
        params = sampling.to(self.device)
        if sampling.top_k or sampling.top_p or sampling.min_p:
            return self.sampler(logits, params)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=self.device)
        self.forms.sample(logits, params, tokens)
        return tokens

    def _indices(self, *lists: Sequence[int]) -> list[torch.Tensor]:
        return [to_device(list(values), torch.int64, self.device) for values in lists]

    def forward(self, batch: PagedBatch, cache: PagedKVCache) -> torch.Tensor:
        return self.forms.forward(self, batch, cache)

    def _send(self, updates: list[tuple[int, int]]) -> None:
        """Bring the host's changes to the rows: one copy, one launch, and none without a change."""
        if updates:
            self.forms.apply_updates(self.rows.flat, to_device(updates, torch.int32, self.device))

    def _activate(self, places: list[int]) -> None:
        """Let the places of a decode step be these rows."""
        if places == self._active:
            return
        self._active = []  # whatever may interrupt us
        padding = [-1] * (len(self.active) - len(places))
        self.active.copy_(to_device(places + padding, torch.int32, self.device))
        self._active = places
