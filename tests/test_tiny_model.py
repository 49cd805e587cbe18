"""The embedded model through the whole engine: does it still know what it was taught?"""

import pytest

from chapters.appendix_tiny_qwen3.heldout import heldout_questions, is_right
from minivllm import LLM, SamplingParams
from minivllm.models.hub import EMBEDDED_MODEL
from minivllm.prompts import DEMO_PROMPTS

GREEDY = SamplingParams(temperature=0, max_tokens=400)


@pytest.fixture(scope="module")
def llm():
    with LLM() as llm:
        yield llm


def _ask(llm, questions):
    conversations = [[{"role": "user", "content": question}] for question in questions]
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def test_the_folder_is_small():
    size = sum(file.stat().st_size for file in EMBEDDED_MODEL.iterdir())
    assert size < 8 * 2**20


def test_it_lists_primes_and_introduces_itself(llm):
    introduction, primes = _ask(llm, DEMO_PROMPTS)
    assert introduction.finish_reason == primes.finish_reason == "stop"
    assert "minivllm" in introduction.text
    numbers = [int(word) for word in primes.text.split(":")[1].strip(" .").split(",")]
    assert numbers == [n for n in range(2, 101) if all(n % d for d in range(2, n))]


def test_held_out_questions_are_answered_rightly(llm, capsys):
    asked = heldout_questions()
    assert len(asked) >= 200
    answers = _ask(llm, [question.text for question in asked])
    right = [is_right(q, a.text) for q, a in zip(asked, answers, strict=True)]
    wrong = [(q.text, a.text) for q, a, ok in zip(asked, answers, right, strict=True) if not ok]
    with capsys.disabled():
        print(f"\nheld-out questions answered rightly: {sum(right)} of {len(asked)}")
    assert sum(right) >= 0.95 * len(asked), wrong
