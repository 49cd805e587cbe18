"""The toy of chapter 8: ann, bob, cem and dan, 4 rows, 8 blocks of 16 tokens.

The token at position p of ann is 100 + p, of bob 200 + p, of cem 300 + p, of dan 400 + p: whoever
reads a wrong row, a wrong block or a stale length is seen to do so. The model is pretended, but it
does read the cache through the block table. It goes on counting if it finds an unbroken line there,
and says 999 if not. Scheduler, block manager, rows, ladder and runner are the engine's own.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from chapters.chapter08_cuda_graphs.tape import TapeRecorder
from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.config import EngineConfig
from minivllm.engine.device_rows import StepInputs
from minivllm.engine.graph_runner import GraphRunner
from minivllm.engine.model_runner import ModelRunner
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.scheduler import Scheduler, Step
from minivllm.engine.sequence import Sequence
from minivllm.engine.step_message import StepMessage
from minivllm.layers.rotary_embedding import RopeScaling
from minivllm.models.config import ModelConfig

NUM_ROWS, NUM_BLOCKS, BLOCK_SIZE, MAX_LEN = 4, 8, 16, 64
BROKEN = 999


@dataclass(frozen=True)
class Request:
    """new: how many tokens to generate; arrives: before which step."""

    name: str
    first: int
    prompt: int
    new: int
    arrives: int = 0


REQUESTS = (
    Request("ann", 100, 15, 6),
    Request("bob", 200, 17, 3),
    Request("cem", 300, 32, 5),
    Request("dan", 400, 2, 3, arrives=4),
)

CONFIG = ModelConfig(
    architecture="Pretended",
    vocab_size=1000,
    hidden_size=2,
    intermediate_size=2,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_size=2,
    max_positions=MAX_LEN,
    rms_norm_eps=1e-6,
    rope_base=10000.0,
    rope_scaling=RopeScaling(),
    tie_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    dtype=torch.float32,
    eos_token_ids=(),
)


class PretendModel(torch.nn.Module):
    """Counts on. Its hidden state is the next token, its logits say so."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden[:, 0].long(), CONFIG.vocab_size).float()


def store(ids: torch.Tensor, slots: torch.Tensor, cache: PagedKVCache) -> None:
    """A token's K is the token; slot -1 is written nowhere, any other is."""
    real = slots >= 0
    keys = cache.k[0].flatten(0, 1)[:, 0]
    keys[slots[real]] = ids[real].float()[:, None].expand(-1, 2)


def pretend_prompts(_: ModelRunner, batch: PagedBatch, cache: PagedKVCache) -> torch.Tensor:
    """Hidden states [T, 2] of prompts."""
    store(batch.input_ids, batch.slot_mapping, cache)
    return (batch.input_ids + 1).float()[:, None].expand(-1, 2)


def pretend_decode(runner: ModelRunner, inputs: StepInputs, logits: torch.Tensor) -> None:
    """A decode step of P places, into logits [P, V]."""
    store(inputs.input_ids, inputs.slot_mapping, runner.cache)
    size = runner.cache.block_size
    slots = inputs.block_tables.clamp(min=0)[:, :, None] * size + torch.arange(size)
    keys = runner.cache.k[0].flatten(0, 1)[:, 0, 0][slots.flatten(1).long()]
    places = torch.arange(keys.shape[1])
    after = places >= inputs.context[:, None]
    unbroken = ((keys == keys[:, :1] + places) | after).all(dim=1)
    token = torch.where(unbroken, keys[:, 0] + inputs.context, BROKEN)
    logits.copy_(runner.model.compute_logits(token[:, None]))


@dataclass(frozen=True)
class Note:
    """What happened in a step.

    sent: how many words the host changed. places: the rows that ran; size: of the graph, 0 for a
    step of prompts. inputs: what the step read, by field, padding included. tokens: chosen.
    last_token, length: of all rows, when the step had run.
    """

    step: int
    names: list[str]
    sent: list[tuple[int, int]]
    places: list[int]
    size: int
    inputs: dict[str, list[int]]
    tokens: list[int]
    last_token: list[int]
    length: list[int]


class ToyRunner(GraphRunner):
    """The real runner with a pretended model; ``notes`` are of its steps."""

    def __init__(self, *, num_blocks: int, taped: bool, places: int = NUM_ROWS) -> None:
        self.taped = taped
        self.notes: list[Note] = []
        config = EngineConfig(
            block_size=BLOCK_SIZE, num_kv_blocks=num_blocks, max_num_seqs=places, device="cpu"
        )
        super().__init__(
            PretendModel(),
            config,
            CONFIG,
            max_model_len=MAX_LEN,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def _reserve(self, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> None:
        super()._reserve(config, max_model_len, dtype)
        self.forms = replace(self.forms, forward=pretend_prompts, decode=pretend_decode)
        if self.taped:
            self.ladder.recorder = TapeRecorder()

    def execute(self, message: StepMessage) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """As the runner does, and note what was read."""
        tokens, logprobs = super().execute(message)
        size = 0 if message.batch else self.ladder.size_for(len(message.places))
        read = {
            name: getattr(self.inputs, name)[:size].tolist()
            for name in ("input_ids", "positions", "slot_mapping", "context")
        }
        step = len(self.notes)
        parts = message.updates, message.places, size, read, tokens.tolist()
        rows = self.rows.last_token.tolist(), self.rows.length.tolist()
        self.notes.append(Note(step, [], *parts, *rows))
        return tokens, logprobs


@dataclass
class Game:
    """A toy that was played to its end. answers: the generated tokens by name."""

    runner: ToyRunner
    scheduler: Scheduler
    answers: dict[str, list[int]] = field(default_factory=dict)

    @property
    def notes(self) -> list[Note]:
        return self.runner.notes


def play(
    requests: tuple[Request, ...] = REQUESTS,
    *,
    num_blocks: int = NUM_BLOCKS,
    taped: bool = False,
    most_steps: int = 60,
) -> Game:
    """Run the toy as the engine does: a step is launched before the last one's tokens are read.

    taped: replay the ladder from tapes, as a GPU does from graphs.
    """
    runner = ToyRunner(num_blocks=num_blocks, taped=taped)
    manager = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=False)
    scheduler = Scheduler(manager, max_num_seqs=NUM_ROWS, max_num_batched_tokens=128)
    game = Game(runner, scheduler)
    sequences: list[Sequence] = []
    in_flight: tuple[Step, Any] | None = None
    for number in range(most_steps):
        for arrival, request in enumerate(requests):
            if request.arrives == number:
                sequences.append(sequence_of(request, arrival))
                scheduler.add(sequences[-1])
        if not scheduler.has_unfinished and number > max(r.arrives for r in requests):
            break
        done, in_flight = in_flight, None
        step = scheduler.schedule()
        if step.scheduled:
            in_flight = step, runner.launch(step)
            names = [seq.request_id for seq in step.sampling]
            runner.notes[-1].names.extend(names)
            scheduler.advance(step)
        if done is not None:
            for seq, token in zip(done[0].sampling, done[1].result().token_ids, strict=True):
                scheduler.resolve(seq, token)
    game.answers = {seq.request_id: seq.output_token_ids for seq in sequences}
    return game


def expected(request: Request) -> list[int]:
    """What a request is told if nothing goes wrong."""
    start = request.first + request.prompt
    return list(range(start, start + request.new))


def sequence_of(request: Request, arrival: int) -> Sequence:
    """A request as the scheduler takes it."""
    prompt = list(range(request.first, request.first + request.prompt))
    params = SamplingParams(temperature=0, max_tokens=request.new)
    return Sequence(request.name, prompt, params, arrival=arrival, seed=arrival, max_len=MAX_LEN)
