"""The offline interface: hand over prompts, get texts back, in the order of the prompts."""

import itertools
import reprlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from minivllm.attention.paged_triton import triton_runs_on
from minivllm.engine import llm_engine
from minivllm.engine.config import EngineConfig
from minivllm.engine.input_processor import Prompt
from minivllm.engine.model_runner import ModelRunner
from minivllm.engine.outputs import EngineStats, RequestOutput
from minivllm.engine.sampling_params import SamplingParams

Message = dict[str, str]


class LLMEngine(llm_engine.LLMEngine):
    __doc__ = llm_engine.LLMEngine.__doc__
    # The ranks that share the model, once they have met; on one device there are none.
    _ranks: Any = None

    def __init__(self, config: EngineConfig | None = None, **keywords: Any) -> None:
        try:
            super().__init__(config, **keywords)
        except BaseException:
            # Half built: no rank may be left waiting for the rest of it.
            owner = getattr(self, "runner", None) or self._ranks
            if self._ranks is not None:
                owner.close()
            raise
        if self._ranks is not None:
            self._stats.ranks = self._ranks.stats

    def load(self, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The model, or this rank's share of it."""
        size = self.config.tensor_parallel_size
        if size == 1:
            return super().load(folder, dtype, device)
        # Here, since one device has no use for it.
        from minivllm.distributed.launcher import assemble
        from minivllm.distributed.worker import Job

        settings = asdict(replace(self.config, model=str(folder), tokenizer=None))
        name = str(dtype).removeprefix("torch.")
        job = Job(settings, str(folder), self.max_model_len, name, device.type)
        self._ranks = assemble(job, size)
        return self._ranks.load()

    def make_runner(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device
    ) -> ModelRunner:
        """On a GPU that our kernels run on, the runner with CUDA graphs; else the plain one."""
        if self._ranks is not None:
            return self._ranks.make_runner(model)
        kernels = self.config.attention_backend != "torch" and triton_runs_on(device)
        if device.type != "cuda" or not kernels:
            return super().make_runner(model, dtype, device)
        # Here, since CPUs have no use for it.
        from minivllm.engine.graph_runner import GraphRunner

        return self._build(GraphRunner, model, dtype, device)


class LLM:
    """A model that is ready to generate.

    model: a Hugging Face folder, a name on the hub, or None for the embedded model; all other
    settings as in :class:`minivllm.engine.config.EngineConfig`. Use it as a context manager, or
    call :meth:`shutdown`, to free its memory at a definite time.

    With ``tensor_parallel_size`` above 1 the model is shared out to as many ranks. This process is
    one, and starts the others; or torchrun has started all, and then only rank 0 gets past this
    constructor (see :mod:`minivllm.distributed.launcher`).

    Who streams to many at a time may call ``gc.freeze()`` when this is built: otherwise Python goes
    through all that has been imported now and then, in search of garbage, and a step waits for it.
    """

    def __init__(self, model: Any = None, **settings: Any) -> None:
        self.engine = LLMEngine(model=model, **settings)
        self._request_ids = map(str, itertools.count())
        # Outputs that a step brought for a request which somebody else is following.
        self._mail: dict[str, deque[RequestOutput]] = {}

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; the outputs come in the order of the prompts.

        prompts: one or many, each a text, a list of token ids, or a dict with ``prompt`` or
        ``prompt_token_ids``. sampling_params: one for all, or one for each. use_tqdm: show a
        progress bar. Raises ValueError, before any prompt runs, if one of them cannot be served.
        """
        every = _as_list(prompts)
        params = self._params_for(every, sampling_params)
        checked = [
            self.engine.check_request(prompt, each)
            for prompt, each in zip(every, params, strict=True)
        ]
        return self._run(checked, params, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many.

        messages: ``[{"role": "user", "content": "..."}, ...]``, or a list of such lists. template:
        further arguments of the tokenizer's chat template, such as ``enable_thinking=False``.
        """
        many = _conversations(messages)
        prompts = [self.apply_chat_template(conversation, **template) for conversation in many]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, or answer one conversation, while it is written.

        Yields the request at every new token, its text complete so far. Leaving the loop early
        aborts the request.
        """
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], dict):
            prompt = self.apply_chat_template(prompt)
        params = SamplingParams() if sampling_params is None else sampling_params
        # Now, so that a prompt that is no good is refused here and not in the caller's loop.
        text, token_ids = self.engine.check_request(prompt, params)
        return self._follow({"prompt": text, "prompt_token_ids": token_ids}, params)

    def apply_chat_template(self, messages: Sequence[Message], **template: Any) -> Prompt:
        """The prompt that the model's chat template makes of a conversation.

        Raises ValueError for messages, or arguments, that the template cannot use.
        """
        for field in fields(SamplingParams):
            # Templates ignore what they do not know, so this would go unnoticed.
            if field.name in template:
                raise ValueError(
                    f"{field.name}={template[field.name]!r} is no argument of a chat template; "
                    f"give SamplingParams({field.name}=...)"
                )
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ValueError("chat needs a tokenizer, but skip_tokenizer_init=True")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("this model's tokenizer has no chat template; use generate instead")
        every = list(messages) if isinstance(messages, Iterable) else [messages]
        for message in every or [None]:
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise ValueError(
                    f"message {message!r} must be a dict with the keys 'role' and 'content'"
                )
        try:
            text = tokenizer.apply_chat_template(
                every, tokenize=False, add_generation_prompt=True, **template
            )
            # Here a lone surrogate is refused, which stands for a byte that is no UTF-8.
            text.encode()
        except Exception as error:
            # A template is a program of the model's, and may raise anything.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            given = {"messages": every, **template}
            values = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in given.items())
            raise ValueError(
                f"the model's chat template cannot use {values} ({reason}); give roles that it "
                "knows, each content as text, and only arguments that it takes"
            ) from None
        # The template has written every special token already; encode must not add its own.
        # Not verbose: what is too long is refused later, and by us, not with a warning from there.
        token_ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return {"prompt": text, "prompt_token_ids": token_ids}

    @property
    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self.engine.stats

    def shutdown(self) -> None:
        """Free the model and the KV cache."""
        self.engine.shutdown()

    def _params_for(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * len(prompts)
        if isinstance(params, str | dict) or not isinstance(params, Iterable):
            raise ValueError(
                f"sampling_params={params!r} must be a SamplingParams, or a list of one for each "
                "prompt"
            )
        every = list(params)
        if len(every) != len(prompts):
            raise ValueError(
                f"sampling_params has {len(every)} entries for {len(prompts)} prompts; give one "
                "for all, or one for each"
            )
        return every

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        params: list[SamplingParams],
        *,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        request_ids: list[str] = []
        outputs: dict[str, RequestOutput] = {}
        try:
            for (text, token_ids), each in zip(prompts, params, strict=True):
                prompt = {"prompt": text, "prompt_token_ids": token_ids}
                request_ids.append(self._add(prompt, each, stream=False))
            ours = set(request_ids)
            with _progress_bar(len(prompts), enabled=use_tqdm) as bar:
                while len(outputs) < len(ours):
                    if not self.engine.has_unfinished_requests:
                        raise RuntimeError("a request was aborted while generate waited for it")
                    # Not streamed, so what comes of our requests is the finished output.
                    done = [request_id for request_id in self._step() if request_id in ours]
                    outputs.update((each, self._mail[each].popleft()) for each in done)
                    if use_tqdm:
                        _show(bar, len(done), self.engine.stats)
        finally:
            # Interrupted: what has not finished must not go on holding blocks.
            for request_id in request_ids:
                self._drop(request_id)
        return [outputs[request_id] for request_id in request_ids]

    def _follow(self, prompt: Prompt, params: SamplingParams) -> Iterator[RequestOutput]:
        request_id = self._add(prompt, params, stream=True)
        try:
            while True:
                while self._mail[request_id]:
                    output = self._mail[request_id].popleft()
                    yield output
                    if output.finished:
                        return
                self._step()
                if not self._mail[request_id] and not self.engine.is_serving(request_id):
                    # Aborted through the engine, which gave the last output to whoever did it.
                    return
        finally:
            self._drop(request_id)

    def _add(self, prompt: Prompt, params: SamplingParams, *, stream: bool) -> str:
        request_id = next(self._request_ids)
        self.engine.add_request(request_id, prompt, params, stream=stream)
        self._mail[request_id] = deque()
        return request_id

    def _step(self) -> list[str]:
        """Run a step and put its outputs where they belong; returns the ids that got one."""
        # Requests that somebody added to the engine directly have no box here.
        outputs = [output for output in self.engine.step() if output.request_id in self._mail]
        for output in outputs:
            self._mail[output.request_id].append(output)
        return [output.request_id for output in outputs]

    def _drop(self, request_id: str) -> None:
        self.engine.abort_request(request_id)
        del self._mail[request_id]


def _conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[Sequence[Message]]:
    """One conversation or many: a list of dicts is one, made of messages."""
    if isinstance(messages, dict) or not isinstance(messages, Iterable):
        raise ValueError(
            f"messages={messages!r} must be a list of dicts with the keys 'role' and 'content', or "
            "a list of such lists"
        )
    every = list(messages)
    return [every] if every and isinstance(every[0], dict) else every


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list of integers is one, made of tokens."""
    if isinstance(prompts, str | bytes | dict) or not isinstance(prompts, Iterable):
        return [prompts]
    every = list(prompts)
    if every and all(isinstance(item, int) for item in every):
        return [every]
    return every


def _progress_bar(total: int, *, enabled: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="generating", unit="req", disable=not enabled)


def _show(bar: Any, count: int, stats: EngineStats) -> None:
    bar.set_postfix_str(
        f"prefill {stats.prefill_rate:,.0f} tok/s, decode {stats.decode_rate:,.0f} tok/s",
        refresh=False,
    )
    bar.update(count)
