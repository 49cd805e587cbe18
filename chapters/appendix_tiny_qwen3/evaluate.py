"""Ask a trained model the held-out questions and count its right answers.

python -m chapters.appendix_tiny_qwen3.evaluate [--model DIR] [--device cpu]
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from chapters.appendix_tiny_qwen3.heldout import HeldOut, heldout_questions, is_right

EMBEDDED_MODEL = Path(__file__).parents[2] / "minivllm" / "assets" / "tiny_qwen3"
MAX_NEW_TOKENS = 320  # the longest reference, the primes up to 200, takes 213


class Result(NamedTuple):
    """Right answers and questions by category, and the wrong answers with their questions."""

    right: Counter[str]
    asked: Counter[str]
    wrong: list[tuple[HeldOut, str]]

    @property
    def accuracy(self) -> float:
        return self.right.total() / self.asked.total()

    def report(self, failures: int = 8) -> str:
        lines = [f"{'category':<14}{'right':>7}{'asked':>7}{'share':>9}"]
        for name in self.asked:
            share = self.right[name] / self.asked[name]
            lines.append(f"{name:<14}{self.right[name]:>7}{self.asked[name]:>7}{share:>9.1%}")
        totals = f"{self.right.total():>7}{self.asked.total():>7}{self.accuracy:>9.1%}"
        lines.append(f"{'together':<14}{totals}")
        for question, answer in self.wrong[:failures]:
            lines += [f"\nasked:  {question.text}", f"answer: {answer}"]
            lines.append(f"right:  {question.reference}")
        return "\n".join(lines)


def evaluate(model: PreTrainedModel, folder: Path, batch_size: int = 64) -> Result:
    """Greedy answers of `model`, with the tokenizer in `folder`, to the held-out questions."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # Answers of like length share a batch, for a batch runs until its longest answer ends.
    questions = sorted(heldout_questions(), key=lambda q: len(q.reference))
    result = Result(Counter(), Counter(q.category for q in heldout_questions()), [])
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": q.text}], tokenize=False, add_generation_prompt=True
            )
            for q in batch
        ]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, return_token_type_ids=False
        ).to(model.device)
        with torch.inference_mode():
            outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new_tokens = outputs[:, inputs["input_ids"].shape[1] :]
        replies = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for question, reply in zip(batch, replies, strict=True):
            if is_right(question, reply):
                result.right[question.category] += 1
            else:
                result.wrong.append((question, reply))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="folder of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--failures", type=int, default=8, help="how many failures to show")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    result = evaluate(model.to(arguments.device).eval(), arguments.model)
    print(result.report(arguments.failures))


if __name__ == "__main__":
    main()
