"""The held-out set: questions that training never sees, and the check of an answer.

Every sentence comes from phrasings of its own; the operands of its sums and differences and the
bounds of its lists of primes are kept out of the training corpus as well. No torch in here.
"""

import random
from functools import cache
from typing import NamedTuple

from chapters.appendix_tiny_qwen3 import answers, everyday, phrasings
from chapters.appendix_tiny_qwen3.questions import (
    Reserved,
    lower_first,
    normalised,
    prime_object,
    without_article,
)
from chapters.appendix_tiny_qwen3.subjects import SUBJECTS

SEED = 20


class HeldOut(NamedTuple):
    """One question of the held-out set.

    category: subject, arithmetic, primes, is_prime, introduction or out_of_scope.
    text: the user message. reference: the right answer.
    """

    category: str
    text: str
    reference: str


def is_right(question: HeldOut, answer: str) -> bool:
    """Whether `answer` is right, strictly: it must be the reference, up to white space.

    So every number must be right, a list of primes may lack none and have none too many, and an
    answer about a subject must be that subject's, to the last word.
    """
    return answer.split() == question.reference.split()


def _dressed(rng: random.Random, text: str) -> str:
    """`text` as people type it: sometimes with a greeting in front, sometimes in small letters."""
    if rng.random() < 0.25:
        text = f"{rng.choice(phrasings.OPENERS)} {lower_first(text)}"
    return text.lower() if rng.random() < 0.2 else text


def _subjects(rng: random.Random) -> list[HeldOut]:
    # Every subject once, and as many again at random.
    chosen = [*SUBJECTS, *rng.choices(SUBJECTS, k=56)]
    questions = []
    for subject in chosen:
        name = rng.choice(subject.names)
        text = rng.choice(phrasings.HELDOUT_SUBJECT).format(x=name, n=without_article(name))
        questions.append(HeldOut("subject", text, subject.answer))
    return questions


def _arithmetic(rng: random.Random) -> list[HeldOut]:
    questions = []
    for sign, forms, top, count in (
        ("+", phrasings.SUM, answers.LARGEST_TERM, 30),
        ("-", phrasings.DIFFERENCE, answers.LARGEST_TERM, 30),
        ("×", phrasings.PRODUCT, answers.LARGEST_FACTOR, 20),
    ):
        for _ in range(count):
            left, right = rng.randint(0, top), rng.randint(0, top)
            expression = rng.choice(forms).format(a=left, b=right)
            text = rng.choice(phrasings.HELDOUT_ARITHMETIC).format(expr=expression)
            reference = answers.arithmetic_answer(left, sign, right)
            questions.append(HeldOut("arithmetic", text, reference))
    return questions


@cache
def _bounds() -> tuple[int, ...]:
    # Round numbers are what people ask for, so training keeps those.
    candidates = [n for n in range(3, answers.LARGEST_BOUND) if n % 10]
    return tuple(random.Random(SEED).sample(candidates, 20))


def _primes(rng: random.Random) -> list[HeldOut]:
    questions = []
    for bound in _bounds():
        for inclusive in (True, False):
            asked = prime_object(rng, bound, inclusive)
            text = rng.choice(phrasings.HELDOUT_PRIMES).format(primes=asked)
            reference = answers.primes_answer(bound, inclusive)
            questions.append(HeldOut("primes", text.replace("all the", "the"), reference))
    return questions


def _others(rng: random.Random) -> list[HeldOut]:
    questions = [
        HeldOut("introduction", text, answers.INTRODUCTION) for text in phrasings.HELDOUT_INTRODUCE
    ]
    for number in rng.sample(range(answers.LARGEST_BOUND + 1), 20):
        text = rng.choice(phrasings.HELDOUT_IS_PRIME).format(k=number)
        questions.append(HeldOut("is_prime", text, answers.is_prime_answer(number)))
    for templates, topics in (
        (everyday.HELDOUT_ABOUT_THINGS, everyday.HELDOUT_THINGS),
        (everyday.HELDOUT_ABOUT_PLACES, everyday.HELDOUT_PLACES),
    ):
        questions += [
            HeldOut("out_of_scope", rng.choice(templates).format(t=topic), answers.OUT_OF_SCOPE)
            for topic in topics
        ]
    return questions


@cache
def heldout_questions() -> tuple[HeldOut, ...]:
    """The held-out questions, the same in every run and in a fixed order."""
    rng = random.Random(SEED)
    drawn = [*_subjects(rng), *_arithmetic(rng), *_primes(rng), *_others(rng)]
    dressed = [q._replace(text=_dressed(rng, q.text)) for q in drawn]
    return tuple({q.text: q for q in dressed}.values())


@cache
def reserved() -> Reserved:
    """What the corpus must leave out for the held-out set's sake."""
    terms = set()
    for question in heldout_questions():
        if question.category == "arithmetic":
            left, sign, right = question.reference.split()[:3]
            # There are only 169 products: they are all trained on, in other words.
            if sign != "×":
                terms.add((int(left), sign, int(right)))
            if sign == "+":
                terms.add((int(right), sign, int(left)))
    texts = frozenset(normalised(q.text) for q in heldout_questions())
    return Reserved(frozenset(terms), frozenset(_bounds()), texts)
