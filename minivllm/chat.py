"""One question, or a conversation, on the terminal; the answer appears while it is written."""

import sys
from typing import Any

from minivllm.engine.sampling_params import SamplingParams
from minivllm.llm import LLM, Message


def run_chat(
    settings: dict[str, Any],
    question: str | None,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
) -> None:
    """Answer ``question``, or, without one, every line of standard input in turn.

    A line that cannot be answered, as when the conversation has filled the model's context, is
    told on standard error, and the conversation begins anew. A single ``question`` raises
    ValueError.
    """
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    with LLM(**settings) as llm:
        if question is not None:
            answer(llm, [{"role": "user", "content": question}], params)
            return
        history: list[Message] = []
        prompt = "you: " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                return
            if line:
                history.append({"role": "user", "content": line})
                try:
                    text = answer(llm, history, params)
                except ValueError as error:
                    print(f"minivllm: {error} (what was said before is forgotten)", file=sys.stderr)
                    history.clear()
                    continue
                history.append({"role": "assistant", "content": text})


def answer(llm: LLM, messages: list[Message], params: SamplingParams) -> str:
    """Print the answer piece by piece; returns the whole of it."""
    shown = ""
    for output in llm.stream(messages, params):
        text = output.outputs[0].text
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()
    return shown
