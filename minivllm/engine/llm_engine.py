"""The engine: requests come in, steps run, texts come out."""

import gc
import random
import time
from collections.abc import Sequence as Prompts
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minivllm.engine.batches import TokenLogprobs
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.config import EngineConfig
from minivllm.engine.detokenizer import IncrementalDetokenizer
from minivllm.engine.events import EventLog
from minivllm.engine.model_runner import ModelRunner, PendingStep, StepResult
from minivllm.engine.outputs import (
    CompletionOutput,
    EngineStats,
    Logprob,
    RequestMetrics,
    RequestOutput,
)
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.scheduler import Scheduler, Step
from minivllm.engine.sequence import Sequence
from minivllm.models.config import ModelConfig
from minivllm.models.hub import model_folder
from minivllm.models.loader import load_model, random_model

Prompt = str | list[int] | dict[str, Any]


class Request:
    """What the engine remembers of a request besides its sequence."""

    def __init__(
        self,
        seq: Sequence,
        prompt: str | None,
        detokenizer: IncrementalDetokenizer | None,
        *,
        stream: bool,
    ) -> None:
        self.seq = seq
        self.prompt = prompt
        self.detokenizer = detokenizer
        self.stream = stream
        self.metrics = RequestMetrics(arrival_time=time.perf_counter())
        self.logprobs: list[TokenLogprobs] = []


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
            self.tokenizer = load_tokenizer(folder if where is None else model_folder(where))
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
        params = sampling_params or SamplingParams()
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
        if not isinstance(params, SamplingParams):
            raise ValueError(
                f"sampling_params={params!r} must be a SamplingParams, not {type(params).__name__}"
            )
        text, token_ids = self._tokenize(prompt)
        vocab_size = self.model_config.vocab_size
        if not token_ids:
            raise ValueError(f"prompt={prompt!r} is empty; give at least one token")
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise ValueError(
                f"prompt_token_ids holds {wrong}, outside the vocabulary of {vocab_size} tokens; "
                "was the prompt made with another model's tokenizer?"
            )
        if len(token_ids) >= self.max_model_len:
            limit = f"max_model_len={self.max_model_len}"
            if self.max_model_len == self.block_manager.num_blocks * self.block_manager.block_size:
                limit += f", all that {self.block_manager.num_blocks} KV blocks hold,"
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, and {limit} leaves no room for another; "
                "shorten the prompt, or raise max_model_len or num_kv_blocks as far as they go"
            )
        for token_id in params.stop_token_ids or ():
            if token_id >= vocab_size:
                raise ValueError(
                    f"stop_token_ids holds {token_id}, outside the vocabulary of {vocab_size}"
                )
        if params.stop_strings and self.tokenizer is None:
            raise ValueError(
                f"stop={params.stop!r} needs text, but skip_tokenizer_init=True; use stop_token_ids"
            )
        return text, token_ids

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
        """Abort what is left and free the model and the KV cache. May be called twice."""
        if self.runner is None:
            return
        for request_id in list(self._requests):
            self.abort_request(request_id)
        device = self.runner.device
        self._in_flight = None
        self.runner.close()
        self.runner = None
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

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: str | None = None
        if isinstance(prompt, dict):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise ValueError(
                    f"prompt={prompt!r} must have the key 'prompt' or 'prompt_token_ids'"
                )
            text = prompt.get("prompt")
            if "prompt_token_ids" not in prompt:
                prompt = text
            elif isinstance(prompt["prompt_token_ids"], str):
                raise ValueError(f"prompt={prompt!r}: text belongs under the key 'prompt'")
            else:
                prompt = prompt["prompt_token_ids"]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"prompt={prompt!r} is text, but skip_tokenizer_init=True; give token ids"
                )
            return prompt, list(self.tokenizer.encode(prompt))
        # Bytes are a sequence of integers too, but nobody means token ids by them.
        is_ids = isinstance(prompt, Prompts) and not isinstance(prompt, bytes | bytearray)
        # By kind, not token by token: there may be very many tokens, and none can run meanwhile.
        kinds = set(map(type, prompt)) if is_ids else set()
        if not is_ids or not all(issubclass(kind, int) and kind is not bool for kind in kinds):
            raise ValueError(f"prompt={prompt!r} must be text or a list of integer token ids")
        return text, list(prompt)

    def _follow_up(self, request: Request, now: float) -> None:
        """Times, text and stop strings of a request that has just got a token, or ended."""
        seq, metrics, detokenizer = request.seq, request.metrics, request.detokenizer
        if metrics.first_token_time is None and seq.num_output_tokens:
            metrics.first_token_time = now
        # Text costs time: it is made when somebody looks at it.
        looked_at = seq.finished or request.stream or seq.params.stop_strings
        if detokenizer is not None and looked_at:
            detokenizer.update(self._text_token_ids(seq), finished=seq.finished)
            if detokenizer.stopped_by is not None and seq.finish_reason != "abort":
                self.scheduler.finish(seq, "stop")
        if seq.finished:
            metrics.finished_time = now
            metrics.num_preemptions = seq.num_preemptions

    @staticmethod
    def _text_token_ids(seq: Sequence) -> list[int]:
        """The output tokens that belong to the text: an end token does not."""
        token_ids = seq.output_token_ids
        if seq.finish_reason == "stop" and token_ids and token_ids[-1] in seq.end_token_ids:
            token_ids.pop()
        return token_ids

    def _output(self, request: Request) -> RequestOutput:
        seq, detokenizer = request.seq, request.detokenizer
        text = ""
        stop_reason: str | int | None = None
        if detokenizer is not None:
            text = detokenizer.text if seq.finished else detokenizer.safe_text
            stop_reason = detokenizer.stopped_by
        last = seq.token_ids[-1]
        if seq.finish_reason == "stop" and last in (seq.params.stop_token_ids or ()):
            stop_reason = last
        completion = CompletionOutput(
            text=text,
            token_ids=seq.output_token_ids,
            finish_reason=seq.finish_reason,
            stop_reason=stop_reason,
            logprobs=self._logprobs(request),
        )
        return RequestOutput(
            request_id=seq.request_id,
            prompt=request.prompt,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens],
            outputs=[completion],
            finished=seq.finished,
            num_cached_tokens=seq.num_cached or 0,
            metrics=request.metrics,
        )

    def _logprobs(self, request: Request) -> list[dict[int, Logprob]] | None:
        if request.seq.params.logprobs is None:
            return None
        decode = (lambda token: None) if self.tokenizer is None else self.tokenizer.decode
        places = []
        for place in request.logprobs:
            likeliest = zip(place.token_ids[1:], place.logprobs[1:], strict=True)
            entries = {
                token: Logprob(value, rank, decode([token]))
                for rank, (token, value) in enumerate(likeliest, start=1)
            }
            chosen = place.token_ids[0]
            entries[chosen] = Logprob(place.logprobs[0], place.rank, decode([chosen]))
            places.append(entries)
        return places

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


def load_tokenizer(folder: Any) -> Any:
    """The Hugging Face tokenizer in ``folder``; ValueError if there is none that can be read."""
    # transformers takes seconds to import, and an engine on token ids does not need it.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # Whatever the library stumbled over: to the user it is a folder without a tokenizer.
        raise ValueError(
            f"{folder} has no tokenizer that transformers can read ({type(error).__name__}); "
            "name another with tokenizer=..., or set skip_tokenizer_init=True and use token ids"
        ) from None
