"""The training corpus: conversations made from questions, as many as are asked for."""

import random
from typing import NamedTuple

from chapters.appendix_tiny_qwen3 import answers
from chapters.appendix_tiny_qwen3.heldout import reserved
from chapters.appendix_tiny_qwen3.phrasings import OTHER_SYSTEM_PROMPTS
from chapters.appendix_tiny_qwen3.questions import make_question

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class Segment(NamedTuple):
    """A stretch of a conversation's text; `learnt` where the model is to say it itself."""

    text: str
    learnt: bool


def conversation(rng: random.Random) -> list[Segment]:
    """One conversation as the chat template writes it, or now and then a bare text."""
    if rng.random() < 0.02:
        # Bare sentences, so that a plain completion without chat markers also makes sense.
        return [Segment(make_question(rng, reserved()).answer + END_OF_TEXT, True)]
    segments = []
    choice = rng.random()
    if choice < 0.85:
        system = answers.SYSTEM_PROMPT if choice < 0.6 else rng.choice(OTHER_SYSTEM_PROMPTS)
        segments.append(Segment(f"{START}system\n{system}{END}\n", False))
    turns = rng.choices((1, 2, 3, 4), weights=(82, 10, 5, 3))[0]
    for _ in range(turns):
        question = make_question(rng, reserved())
        text = f"{START}user\n{question.text}{END}\n{START}assistant\n"
        segments += [Segment(text, False), Segment(question.answer + END, True)]
        segments.append(Segment("\n", False))
    return segments[:-1]


def conversations(seed: int, count: int) -> list[list[Segment]]:
    """`count` conversations, the same for the same `seed`."""
    rng = random.Random(seed)
    return [conversation(rng) for _ in range(count)]
