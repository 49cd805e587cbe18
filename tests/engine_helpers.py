"""Small engines for tests: a checkpoint with a tokenizer of our own, and a runner with a script."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_checkpoint, tiny_qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minivllm import LLMEngine
from minivllm.engine.graph_runner import GraphRunner
from minivllm.engine.model_runner import ModelRunner, StepResult
from minivllm.engine.outputs import RequestOutput
from minivllm.engine.scheduler import Step

# Characters of one to four bytes, some made of several characters.
MULTIBYTE = "naïve Größe 分页注意力 ключ 🙂👩‍👩‍👧 end"
TEXTS = ["the block table lists the blocks", "the key and the value of the token", MULTIBYTE]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not thinking %}.{% endif %}{% endif %}"
)
VOCAB_SIZE = 320
END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges, so that tokens cut characters in two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, chat_template=TEMPLATE
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the other kind: a token's text begins with a space, unless it comes first."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_checkpoint(folder: Path, **changes: Any) -> Path:
    """A random Qwen3 with :func:`byte_tokenizer` beside it; it has no end token of its own."""
    save_checkpoint(tiny_qwen3(vocab_size=VOCAB_SIZE, **changes), folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def drain(engine: LLMEngine, most_steps: int = 2000) -> dict[str, RequestOutput]:
    """Step until nothing is left; the finished outputs by request id."""
    finished = {}
    for _ in range(most_steps):
        if not engine.has_unfinished_requests:
            return finished
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
    raise AssertionError(f"not done after {most_steps} steps")


def assert_idle(engine: LLMEngine) -> None:
    """Nothing is being served, and every block is back."""
    assert not engine.has_unfinished_requests
    assert engine.block_manager.num_free == engine.block_manager.num_blocks
    engine.block_manager.check([])


def refuses(message: str, call: Callable[..., object], *args: object, **settings: object) -> None:
    """``call`` raises a ValueError whose text, read as one line, matches ``message``."""
    with pytest.raises(ValueError) as caught:
        call(*args, **settings)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text


def follow_script(engine: LLMEngine, script: Sequence[int]) -> None:
    """Let every request of ``engine`` generate these tokens, whatever the model would say."""

    def run(step: Step) -> StepResult:
        sampling = [item.seq for item in step.scheduled if item.samples]
        return StepResult(
            [script[seq.num_output_tokens] for seq in sampling], [None] * len(sampling)
        )

    engine.runner.run = run


def fail_once(engine: LLMEngine, at_step: int = 0) -> None:
    """Let the step after ``at_step`` more break off once the KV cache has been scribbled over."""
    runner = engine.runner
    name = "launch" if runner.overlaps else "run"
    right = getattr(runner, name)
    left = [at_step]

    def break_off(step: Step) -> Any:
        left[0] -= 1
        result = right(step)
        if left[0] == -1:
            for item in step.scheduled:
                runner.cache.k[:, item.seq.block_table] = 1e3
            assert result is not None
            raise RuntimeError("the device caught fire")
        return result

    setattr(runner, name, break_off)


class OverlappingEngine(LLMEngine):
    """What a GPU gets, on a CPU: the next step is launched before the last one's tokens are read.

    Nothing is recorded here, so graphs are replayed by doing their work again.
    """

    def make_runner(self, model: Any, dtype: Any, device: Any) -> ModelRunner:
        return self._build(GraphRunner, model, dtype, device)


def one_thread() -> Iterator[None]:
    """For a fixture: models this small are faster without a second thread to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
