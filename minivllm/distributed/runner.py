"""The runner of chapter 8 on every rank: rank 0 schedules and tells, all execute.

    rank 0    prepare(step) -> message -> execute(message) -> tokens to the host
                                  |
    rank 1..                      +-----> execute(message)     tokens stay on the device

A rank is told what changed, as rank 0's own device is: rows, new blocks, prompts. The tokens
themselves never travel, for every rank knows them when a step ends.
"""

from __future__ import annotations

import atexit
import logging
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from minivllm.distributed.exchange import Exchange
from minivllm.distributed.one_shot import OneShot, most_rows
from minivllm.distributed.sampling import GatheringSampler, Vocabulary
from minivllm.distributed.sharded_forms import chain_places, shard_forms
from minivllm.engine.batches import HostSampling
from minivllm.engine.config import EngineConfig
from minivllm.engine.graph_runner import GraphRunner
from minivllm.engine.model_runner import StepResult
from minivllm.engine.pending_tokens import PendingTokens
from minivllm.engine.scheduler import Step
from minivllm.models.config import ModelConfig

logger = logging.getLogger(__name__)


class Crew(Protocol):
    """The other ranks, as rank 0 sees them; see :class:`minivllm.distributed.ranks.Ranks`."""

    def send_step(self, message: bytes) -> None: ...

    def working(self) -> Any: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


class SharedPending:
    """Tokens on their way, which will not come if a rank fails."""

    def __init__(self, pending: PendingTokens, crew: Crew) -> None:
        self._pending = pending
        self._crew = crew

    def result(self) -> StepResult:
        """Wait for the step, and read its tokens; RankFailure if a rank has failed."""
        try:
            result = self._pending.result()
        except RuntimeError:
            self._crew.check()
            raise
        # A step that was broken off ends, too, with whatever its memory held.
        self._crew.check()
        return result


class TensorParallelRunner(GraphRunner):
    """One rank's runner.

    model, model_config: this rank's share. vocabulary: who owns which tokens, and this rank's
    group. crew: the other ranks, on rank 0.
    """

    def __init__(
        self,
        model: Any,
        config: EngineConfig,
        model_config: ModelConfig,
        *,
        vocabulary: Vocabulary,
        crew: Crew | None = None,
        **settings: Any,
    ) -> None:
        self.vocabulary = vocabulary
        self.crew = crew
        self.exchange: Exchange | None = None
        self._closed = False
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)
        super().__init__(model, config, model_config, **settings)

    def _reserve(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> None:
        super()._reserve(config, max_model_len, dtype)
        self.vocab_size = self.vocabulary.size
        self.sampler = GatheringSampler(self.vocabulary)
        if self.device.type == "cuda":
            self.exchange = self._connect(config, dtype)
        self.forms = shard_forms(
            self.forms, self.model, self.device, self.vocabulary, self.exchange
        )

    def _compile_ahead(self, dtype: torch.dtype) -> None:
        """Nothing: if a rehearsal broke off on one rank, the others would wait for it forever."""

    def _connect(self, config: EngineConfig, dtype: torch.dtype) -> Exchange:
        """How this rank's kernels reach the others; decided here, by all ranks together."""
        model, group = self.model_config, self.vocabulary.group
        pdl = torch.cuda.get_device_capability(self.device) >= (9, 0)
        rows = most_rows(group.size, model.hidden_size, dtype)
        one_shot = OneShot.connect(
            group,
            width=model.hidden_size,
            dtype=dtype,
            most_rows=rows,
            most_parts=chain_places(model, dtype, self.device),
            most_sampled=config.max_num_seqs,
            pdl=pdl,
        )
        exchange = one_shot or Exchange(group, pdl=pdl)
        logger.info("rank %d of %d sums by %s", group.rank, group.size, exchange.name)
        return exchange

    def _blocks_that_fit(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> int:
        """What fits on every rank: block tables are the same on all of them."""
        group = self.vocabulary.group
        if self.device.type != "cuda":
            # Every rank of a host asks for a part of the same memory.
            share = config.gpu_memory_utilization / group.size
            config = replace(config, gpu_memory_utilization=share)
        return group.least(super()._blocks_that_fit(config, max_model_len, dtype))

    def launch(self, step: Step) -> SharedPending:  # type: ignore[override]
        """Tell the others, and send the step to this rank's device. Only rank 0 schedules."""
        assert self.crew is not None
        # From the message on, the ranks must do the same: an interrupt has to wait.
        with interrupts_later(), self.crew.working():
            message = self.prepare(step)
            self.crew.send_step(message.encode())
            pending = self._pending(step, message, *self.execute(message))
        return SharedPending(pending, self.crew)

    def _choose(self, logits: torch.Tensor, sampling: HostSampling | None) -> torch.Tensor:
        if sampling is None:
            count = len(logits)
            none = [0] * count
            sampling = HostSampling([0.0] * count, none, none, None, None, None)
        return super()._choose(logits, sampling)

    def whole_rows(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [n, V / P] of every rank -> [n, V]."""
        return self.vocabulary.gather(logits)

    def close(self) -> None:
        """Free the graphs, and then, on rank 0, dismiss the others. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        # It may be that building it broke off anywhere.
        if hasattr(self, "prompts"):
            super().close()
        if self.exchange is not None:
            self.exchange.close()
        if self.crew is not None:
            self.crew.close()

    def __del__(self) -> None:
        self.close()


def _close(ref: weakref.ref[TensorParallelRunner]) -> None:
    """At exit: an engine that nobody has shut down must not keep the process."""
    runner = ref()
    if runner is not None:
        runner.close()


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block. Signals are the main thread's business."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        handler(*caught[0])
