"""The engine: requests come in, steps run, texts come out."""

import gc
import random
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.config import EngineConfig
from minivllm.engine.detokenizer import IncrementalDetokenizer
from minivllm.engine.events import EventLog
from minivllm.engine.input_processor import InputProcessor, Prompt, load_tokenizer
from minivllm.engine.model_runner import ModelRunner, PendingStep, StepResult
from minivllm.engine.outputs import EngineStats, RequestOutput
from minivllm.engine.request import Request
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.scheduler import Scheduler, Step
from minivllm.engine.sequence import Sequence
from minivllm.models.config import ModelConfig
from minivllm.models.hub import model_folder
from minivllm.models.loader import load_model, random_model


class InFlight(NamedTuple):
    """A step on its way: ``pending`` has its tokens, ``started`` is when it was scheduled."""

    step: Step
    pending: PendingStep | None
    started: float


class LLMEngine:
    """Serves many requests at once: :meth:`add_request`, then :meth:`step` until none is left.

    Settings are those of :class:`EngineConfig`. events: where to record what the scheduler and the
    block manager decide; None: nowhere. Raises ValueError for settings, files or memory that will
    not do, before any request is taken.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        events: EventLog | None = None,
        **keywords: Any,
    ) -> None:
        if config is not None and keywords:
            raise ValueError(
                f"config was given, and so were {', '.join(keywords)}; put them into the config"
            )
        self.config = config or EngineConfig.from_keywords(keywords)
        folder = model_folder(self.config.model)
        self.model_config = ModelConfig.from_folder(folder)
        self.max_model_len = self._context_limit()
        device = self.config.resolve_device()
        self.config = replace(self.config, block_size=self.config.resolve_block_size(device))
        dtype = self.config.resolve_dtype(self.model_config.dtype, device)
        self.tokenizer = None
        if not self.config.skip_tokenizer_init:
            where = self.config.tokenizer
            self.tokenizer = load_tokenizer(
                folder if where is None else model_folder(where, name="tokenizer")
            )
        model = self.load(folder, dtype, device)
        self.runner: ModelRunner | None = self.make_runner(model, dtype, device)
        num_blocks = self.runner.cache.num_blocks
        capacity = num_blocks * self.config.block_size
        if capacity < self.max_model_len:
            if self.config.max_model_len is not None:
                raise ValueError(
                    f"max_model_len={self.max_model_len} is more than the {num_blocks} KV blocks "
                    f"of {self.config.block_size} tokens hold; lower it to {capacity} or give the "
                    "KV cache more memory"
                )
            self.max_model_len = capacity
        self.block_manager = BlockManager(
            num_blocks,
            self.config.block_size,
            enable_prefix_caching=self.config.enable_prefix_caching,
            events=events,
        )
        self.scheduler = Scheduler(
            self.block_manager,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            policy=self.config.policy,
            events=events,
        )
        self.input_processor = InputProcessor(
            tokenizer=self.tokenizer,
            vocab_size=self.model_config.vocab_size,
            max_model_len=self.max_model_len,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
        )
        self._stats = EngineStats(num_kv_blocks=num_blocks)
        self._requests: dict[str, Request] = {}
        self._seeds = random.Random(self.config.seed)
        self._num_arrivals = 0
        self._overlaps = self.config.async_scheduling and self.runner.overlaps
        self._in_flight: InFlight | None = None
        self._last_resolved = 0.0

    def load(self, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The model of this engine; chapter 9 loads only this rank's share of it."""
        if self.config.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size={self.config.tensor_parallel_size}: this engine runs on one "
                "device; use minivllm.LLMEngine, or leave it at 1"
            )
        if self.config.load_format == "dummy":
            return random_model(self.model_config, dtype=dtype, device=device)
        return load_model(folder, self.model_config, dtype=dtype, device=device)

    def make_runner(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> ModelRunner:
        """The runner of this engine; later chapters put theirs here."""
        return self._build(ModelRunner, model, dtype, device)

    def _build(
        self, runner: type[ModelRunner], model: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> ModelRunner:
        return runner(
            model,
            self.config,
            self.model_config,
            max_model_len=self.max_model_len,
            dtype=dtype,
            device=device,
        )

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = True,
    ) -> None:
        """Queue a request.

        prompt: text, token ids, or a dict with ``prompt`` or ``prompt_token_ids``. stream: report
        it at every step, not only when it has finished. Raises ValueError for a request that
        cannot be served; then nothing has changed.
        """
        self._check_open()
        if request_id in self._requests:
            raise ValueError(f"request_id={request_id!r} is still being served; choose another")
        params = SamplingParams() if sampling_params is None else sampling_params
        text, token_ids = self.check_request(prompt, params)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed & (2**63 - 1)
        seq = Sequence(
            request_id,
            token_ids,
            params,
            arrival=self._num_arrivals,
            seed=seed,
            max_len=self.max_model_len,
            eos_token_ids=self.model_config.eos_token_ids,
        )
        self._num_arrivals += 1
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = IncrementalDetokenizer(self.tokenizer, params.stop_strings)
        self._requests[request_id] = Request(seq, text, detokenizer, stream=stream)
        self.scheduler.add(seq)

    def check_request(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, list[int]]:
        """The prompt's text, if it came as one, and its token ids; ValueError if it is no good."""
        return self.input_processor.process(prompt, params)

    def step(self) -> list[RequestOutput]:
        """Run one step.

        Returns the requests that got a token and are streamed, and all that have finished. If the
        step fails, every request is kept, to be computed again, and the error goes on.

        With a runner that overlaps, the step that is scheduled now is only launched, and what comes
        back are the tokens of the step before it, which ran while this one was being prepared.
        """
        self._check_open()
        if not self.scheduler.has_unfinished:
            self._in_flight = None
            return []
        assert self.runner is not None
        started = time.perf_counter()
        step = self.scheduler.schedule()
        for item in step.scheduled:
            metrics = self._requests[item.seq.request_id].metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = started
        try:
            if self._overlaps:
                done, self._in_flight = self._in_flight, self._launch(step, started)
                launched = time.perf_counter()
                result = done.pending.result() if done is not None else None
            else:
                done = InFlight(step, None, started)
                result = self.runner.run(step)
                launched = time.perf_counter()
                self.scheduler.advance(step)
        except BaseException:
            self._in_flight = None
            self.scheduler.recover()
            raise
        now = time.perf_counter()
        self._stats.host_seconds += launched - started
        if done is None or result is None:
            return []
        outputs = self._take_tokens(done.step, result, now)
        self.scheduler.record_end(done.step)
        self._stats.host_seconds += time.perf_counter() - now
        self._count(done.step, now - max(done.started, self._last_resolved))
        self._last_resolved = now
        return outputs

    def _launch(self, step: Step, started: float) -> "InFlight | None":
        """Send a step to the device; None if nobody can run before the last one's tokens."""
        if not step.scheduled:
            return None
        assert self.runner is not None
        pending = self.runner.launch(step)
        self.scheduler.advance(step)
        return InFlight(step, pending, started)

    def _take_tokens(self, step: Step, result: StepResult, now: float) -> list[RequestOutput]:
        """Hand a step's tokens to the sequences that sampled them."""
        outputs = []
        for seq, token_id, logprobs in zip(
            step.sampling, result.token_ids, result.logprobs, strict=True
        ):
            if not self.scheduler.resolve(seq, token_id):
                continue
            request = self._requests[seq.request_id]
            if logprobs is not None:
                request.logprobs.append(logprobs)
            self._follow_up(request, now)
            if seq.finished or request.stream:
                outputs.append(self._output(request))
            if seq.finished:
                self._forget(request)
        return outputs

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request at once and give back its blocks; others are not affected.

        Returns what it had come to, with finish_reason ``abort``, or None if no such request is
        being served (it may just have finished).
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self.scheduler.finish(request.seq, "abort")
        self._follow_up(request, time.perf_counter())
        output = self._output(request)
        self._forget(request)
        return output

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished

    def is_serving(self, request_id: str) -> bool:
        """Whether this request is queued or running."""
        return request_id in self._requests

    @property
    def stats(self) -> EngineStats:
        """What this engine has done so far; a live object."""
        self._stats.peak_kv_blocks = self.block_manager.peak_held
        self._stats.num_preemptions = self.scheduler.num_preemptions
        return self._stats

    def shutdown(self) -> None:
        """Abort what is left and free the model and the KV cache. May be called twice.

        If they are not free then, a garbage collection is run, of what gc.freeze() hides, too.
        """
        if self.runner is None:
            return
        for request_id in list(self._requests):
            self.abort_request(request_id)
        device = self.runner.device
        self._in_flight = None
        self.runner.close()
        large = [weakref.ref(x) for x in (self.runner, self.runner.model, self.runner.cache)]
        self.runner = None
        if any(part() is not None for part in large):
            # Parts of them refer to one another; and gc.freeze() may have hidden that.
            gc.unfreeze()
            gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _context_limit(self) -> int:
        limit = self.model_config.max_positions
        asked = self.config.max_model_len
        if asked is not None and asked > limit:
            raise ValueError(
                f"max_model_len={asked} is more than the model's max_position_embeddings={limit}; "
                "lower it, or use a config with RoPE scaling"
            )
        return limit if asked is None else asked

    def _check_open(self) -> None:
        if self.runner is None:
            raise RuntimeError("this engine has been shut down; build a new one")

    def _follow_up(self, request: Request, now: float) -> None:
        """Times, text and stop strings of a request that has just got a token, or ended."""
        seq = request.seq
        if request.update(now) and seq.finish_reason != "abort":
            self.scheduler.finish(seq, "stop")
        if seq.finished:
            request.note_end(now)

    def _output(self, request: Request) -> RequestOutput:
        return request.output(self.tokenizer)

    def _forget(self, request: Request) -> None:
        seq = request.seq
        del self._requests[seq.request_id]
        reasons = self._stats.finish_reasons
        reasons[seq.finish_reason or ""] = reasons.get(seq.finish_reason or "", 0) + 1
        self._stats.finished_requests += 1
        if seq.num_cached is not None:
            self._stats.prompt_tokens += seq.num_prompt_tokens
            self._stats.cached_tokens += seq.num_cached

    def _count(self, step: Step, seconds: float) -> None:
        stats = self._stats
        num_decode = sum(item.decodes for item in step.scheduled)
        num_prefill = step.num_tokens - num_decode
        stats.num_steps += 1
        stats.prefill_tokens += num_prefill
        stats.decode_tokens += num_decode
        stats.prefill_seconds += seconds * num_prefill / step.num_tokens
        stats.decode_seconds += seconds * num_decode / step.num_tokens
