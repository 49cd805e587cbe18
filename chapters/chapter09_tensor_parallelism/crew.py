"""The whole engine on ranks that are threads: scheduler, runner and layers are the package's own.

Rank 0 schedules. What it tells the others travels as bytes, as it does between processes.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from chapters.chapter09_tensor_parallelism.threads import ThreadGroup, Word, on_ranks
from minivllm.distributed.worker import Job
from minivllm.engine.config import EngineConfig
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.step_message import StepMessage
from minivllm.models.hub import model_folder


@dataclass(frozen=True)
class Step:
    """What a step said. message: from rank 0; words: between the ranks, in their order."""

    message: bytes
    words: list[Word]

    @property
    def decodes(self) -> bool:
        return StepMessage.decode(self.message).batch is None


@dataclass
class Talk:
    """An engine's answers, in the order of the prompts, and all of its steps."""

    answers: list[list[int]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


class ThreadCrew:
    """The other ranks, as rank 0's runner sees them."""

    def __init__(self, size: int) -> None:
        self.orders = [queue.SimpleQueue[bytes | None]() for _ in range(size - 1)]
        self.messages: list[tuple[int, bytes]] = []
        self.num_words: Callable[[], int] = lambda: 0

    def send_step(self, message: bytes) -> None:
        self.messages.append((self.num_words(), message))
        for orders in self.orders:
            orders.put(message)

    def working(self) -> Any:
        return nullcontext()

    def check(self) -> None:
        pass

    def close(self) -> None:
        for orders in self.orders:
            orders.put(None)


class SharedEngine(LLMEngine):
    """Rank 0's engine."""

    def __init__(self, group: ThreadGroup, crew: ThreadCrew, job: Job, config: EngineConfig):
        self.group, self.crew, self.job = group, crew, job
        super().__init__(config)

    def load(self, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        return load(self.job, self.group)

    def make_runner(self, model: torch.nn.Module, dtype: Any, device: torch.device) -> Any:
        return self.job.make_runner(model, self.group.named("sampler"), device, self.crew)


def load(job: Job, group: ThreadGroup) -> torch.nn.Module:
    """A rank's share of the model, whose layers say who they are when they speak."""
    model = job.load(group, torch.device("cpu"))
    for path, module in model.named_modules():
        if hasattr(module, "group"):
            module.group = group.named(path.removeprefix("model."))
    return model


def talk(
    size: int,
    prompts: list[list[int]],
    params: SamplingParams | None = None,
    model: str | Path | None = None,
) -> Talk:
    """Answer ``prompts`` on ``size`` ranks, and keep all that was said.

    Raises what a rank raised.
    """
    config = EngineConfig(
        model=model, device="cpu", skip_tokenizer_init=True, num_kv_blocks=64, max_num_seqs=8
    )
    folder = model_folder(config.model)
    settings = asdict(replace(config, model=str(folder), block_size=16, max_model_len=256))
    job = Job(settings, str(folder), 256, "float32", "cpu")
    crew, said = ThreadCrew(size), Talk()

    def work(group: ThreadGroup) -> None:
        if group.rank:
            runner = job.make_runner(load(job, group), group.named("sampler"), torch.device("cpu"))
            while (message := crew.orders[group.rank - 1].get()) is not None:
                runner.execute(StepMessage.decode(message))
            return
        try:
            crew.num_words = lambda: len(group.meeting.words)
            engine = SharedEngine(group, crew, job, EngineConfig(**settings))
            for number, prompt in enumerate(prompts):
                engine.add_request(str(number), prompt, params)
            answers: dict[str, list[int]] = {}
            while engine.has_unfinished_requests:
                for output in engine.step():
                    answers[output.request_id] = output.outputs[0].token_ids
            said.answers = [answers[str(number)] for number in range(len(prompts))]
        finally:
            crew.close()

    _, meeting = on_ranks(size, work)
    starts = [start for start, _ in crew.messages]
    ends = [*starts[1:], len(meeting.words)]
    said.steps = [
        Step(message, meeting.words[start:end])
        for (start, message), end in zip(crew.messages, ends, strict=True)
    ]
    return said
