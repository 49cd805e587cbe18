"""Questions with their answers, for training: phrasings filled in, mixed and roughened."""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from chapters.appendix_tiny_qwen3 import answers, everyday, phrasings
from chapters.appendix_tiny_qwen3.subjects import SUBJECTS
from minivllm.prompts import DEMO_PROMPTS


class Question(NamedTuple):
    """A user message and the right reply to it."""

    text: str
    answer: str


class Reserved(NamedTuple):
    """What the held-out set keeps for itself: numbers and whole questions never trained on.

    terms: (left, sign, right) of sums and differences. bounds: of lists of primes.
    texts: the questions, as `normalised` gives them.
    """

    terms: frozenset[tuple[int, str, int]]
    bounds: frozenset[int]
    texts: frozenset[str]


def normalised(text: str) -> str:
    """`text` in lower case, without punctuation at its ends and with single spaces."""
    return " ".join(text.lower().split()).strip(" .!?=")


def without_article(name: str) -> str:
    return re.sub(r"^(a|an|the) ", "", name)


def lower_first(text: str) -> str:
    """`text` with a small first letter, unless it begins with an acronym such as RoPE or I."""
    return text[0].lower() + text[1:] if text[1:2].islower() and text[:2] != "Ro" else text


def made_up_word(rng: random.Random, syllables: int) -> str:
    """A word that means nothing, such as "tuvolan"."""
    parts = []
    for _ in range(syllables):
        parts += [rng.choice("bcdfghjklmnprstvwz"), rng.choice("aeiou")]
        if rng.random() < 0.3:
            parts.append(rng.choice("lmnrst"))
    return "".join(parts)


def any_word(rng: random.Random) -> str:
    """A word without bearing on the matter."""
    if rng.random() < 0.3:
        return made_up_word(rng, rng.randint(1, 3))
    return rng.choice(phrasings.WORDS)


def roughened(rng: random.Random, template: str) -> str:
    """Now and then leave out, misspell or add words of `template`, never touching a placeholder.

    A model that has to cope with this looks for the words that carry the meaning, and so it
    understands phrasings that it was never shown.
    """
    words = template.split()
    plain = [i for i, word in enumerate(words) if "{" not in word]
    if len(plain) > 2 and "{" in template and rng.random() < 0.15:
        words[rng.choice(plain)] = ""
    if len(plain) > 2 and rng.random() < 0.06:
        i = rng.choice(plain)
        if len(words[i]) > 3:
            cut = rng.randrange(1, len(words[i]) - 1)
            words[i] = words[i][:cut] + words[i][cut + 1 :]
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 3)):
            words.insert(rng.randint(0, len(words)), any_word(rng))
    return " ".join(word for word in words if word)


def dressed(rng: random.Random, text: str, extras: tuple[str, ...] = ()) -> str:
    """`text` with greetings, fillers and `extras` around it, in one of several letterings."""
    if rng.random() < 0.3:
        text = f"{rng.choice(phrasings.OPENERS)} {lower_first(text)}"
    if rng.random() < 0.2:
        text = f"{text} {rng.choice(phrasings.CLOSERS)}"
    if extras and rng.random() < 0.35:
        text = " ".join([text, *rng.sample(extras, rng.randint(1, 4))])
    if rng.random() < 0.15:
        text = " ".join([*rng.sample(phrasings.FILLERS, rng.randint(1, 4)), text])
    lettering = rng.random()
    if lettering < 0.2:
        text = text.lower()
    elif lettering < 0.35:
        text = text.lower().rstrip(".!?")
    elif lettering < 0.37:
        text = text.upper()
    return text


def about_subject(rng: random.Random) -> Question:
    subject = rng.choice(SUBJECTS)
    name = rng.choice((subject.names[0], *subject.names))
    template = roughened(rng, rng.choice(phrasings.SUBJECT))
    if rng.random() < 0.1:
        # The subject among any words at all, for nothing but the subject matters.
        before, after = (
            " ".join(any_word(rng) for _ in range(rng.randint(0, 5))) for _ in range(2)
        )
        template = f"{before} {rng.choice(('{x}', '{n}'))} {after}".strip() + rng.choice("?.!")
    if template[-1] in ".?!" and rng.random() < 0.1:
        template = f"{template[:-1]} {rng.choice(phrasings.CONTEXTS)}{template[-1]}"
    return Question(template.format(x=name, n=without_article(name)), subject.answer)


def arithmetic(rng: random.Random) -> Question:
    sign = rng.choice("++--×")
    top = answers.LARGEST_FACTOR if sign == "×" else answers.LARGEST_TERM
    # Small numbers are what people ask for most, large ones what is hardest to learn.
    left, right = (rng.randint(0, top if rng.random() < 0.85 else 12) for _ in range(2))
    forms, orders = {
        "+": (phrasings.SUM, phrasings.SUM_ORDERS),
        "-": (phrasings.DIFFERENCE, phrasings.DIFFERENCE_ORDERS),
        "×": (phrasings.PRODUCT, phrasings.PRODUCT_ORDERS),
    }[sign]
    if rng.random() < 0.15:
        text = rng.choice(orders).format(a=left, b=right)
    else:
        expression = rng.choice(forms).format(a=left, b=right)
        text = roughened(rng, rng.choice(phrasings.ARITHMETIC)).format(expr=expression)
    return Question(text, answers.arithmetic_answer(left, sign, right))


def prime_object(rng: random.Random, bound: int, inclusive: bool) -> str:
    """The object of a request for primes, such as "prime numbers not greater than 50"."""
    forms = phrasings.INCLUSIVE if inclusive else phrasings.EXCLUSIVE
    return f"{rng.choice(phrasings.PRIME_NOUN)} {rng.choice(forms).format(k=bound)}"


def list_of_primes(rng: random.Random) -> Question:
    bound, inclusive = rng.randint(0, answers.LARGEST_BOUND), rng.random() < 0.65
    text = roughened(rng, rng.choice(phrasings.PRIMES))
    text = text.format(primes=prime_object(rng, bound, inclusive)).replace("all the", "the")
    return Question(text, answers.primes_answer(bound, inclusive))


def is_prime(rng: random.Random) -> Question:
    number = rng.randint(0, answers.LARGEST_BOUND)
    text = roughened(rng, rng.choice(phrasings.IS_PRIME)).format(k=number)
    return Question(text, answers.is_prime_answer(number))


def introduction(rng: random.Random) -> Question:
    return Question(roughened(rng, rng.choice(phrasings.INTRODUCE)), answers.INTRODUCTION)


def out_of_scope(rng: random.Random) -> Question:
    """Everyday matters, made-up words, and numbers beyond what the model has learnt."""
    kind = rng.random()
    if kind < 0.1:
        topic = rng.choice(everyday.NEIGHBOURS)
        text = rng.choice(phrasings.SUBJECT).format(x=topic, n=without_article(topic))
    elif kind < 0.15:
        terms = rng.randint(0, 144), rng.randint(0, 99)
        expression = rng.choice(everyday.DIVISIONS).format(a=terms[0], b=terms[1])
        text = rng.choice(phrasings.ARITHMETIC).format(expr=expression)
    elif kind < 0.4:
        text = rng.choice(everyday.ABOUT_THINGS).format(t=rng.choice(everyday.THINGS))
    elif kind < 0.52:
        text = rng.choice(everyday.ABOUT_PLACES).format(t=rng.choice(everyday.PLACES))
    elif kind < 0.6:
        text = rng.choice(everyday.ALONE)
    elif kind < 0.75:
        word = made_up_word(rng, rng.randint(2, 4))
        word = rng.choice((word, f"a {word}", f"the {word}"))
        template = rng.choice((*phrasings.SUBJECT, *everyday.ABOUT_THINGS))
        text = template.format(x=word, n=without_article(word), t=word)
    elif kind < 0.9:
        product = rng.random() < 0.5
        forms = phrasings.PRODUCT if product else (*phrasings.SUM, *phrasings.DIFFERENCE)
        top = answers.LARGEST_FACTOR if product else answers.LARGEST_TERM
        terms = [rng.randint(top + 1, 10 ** rng.randint(2, 4)), rng.randint(0, 999)]
        rng.shuffle(terms)
        expression = rng.choice(forms).format(a=terms[0], b=terms[1])
        text = rng.choice(phrasings.ARITHMETIC).format(expr=expression)
    else:
        number = rng.randint(answers.LARGEST_BOUND + 1, 10 ** rng.randint(3, 4))
        text = rng.choice((*phrasings.PRIMES, *phrasings.IS_PRIME))
        text = text.format(primes=prime_object(rng, number, rng.random() < 0.6), k=number)
    return Question(text, answers.OUT_OF_SCOPE)


def small_talk(rng: random.Random) -> Question:
    texts, answer = rng.choice(
        (
            (phrasings.GREET, answers.GREETING),
            (phrasings.THANK, answers.THANKS),
            (phrasings.LEAVE, answers.GOODBYE),
        )
    )
    text = rng.choice(texts)
    return Question(text if rng.random() < 0.7 else text.lower().rstrip(".!"), answer)


KINDS: tuple[tuple[float, Callable[[random.Random], Question], tuple[str, ...]], ...] = (
    (0.39, about_subject, ()),
    (0.26, arithmetic, ()),
    (0.14, list_of_primes, phrasings.PRIMES_EXTRAS),
    (0.05, is_prime, ()),
    (0.06, introduction, phrasings.INTRODUCE_EXTRAS),
    (0.10, out_of_scope, ()),
)
DEMO_QUESTIONS = (
    Question(DEMO_PROMPTS[0], answers.INTRODUCTION),
    Question(DEMO_PROMPTS[1], answers.primes_answer(100, inclusive=True)),
)


def is_reserved(question: Question, reserved: Reserved) -> bool:
    """Whether the held-out set keeps this question, its operands or its bound for itself."""
    if normalised(question.text) in reserved.texts:
        return True
    words = question.answer.split()
    if words[1] in ("+", "-"):
        return (int(words[0]), words[1], int(words[2])) in reserved.terms
    bound = re.search(r"prime numbers (?:up to|below) (\d+)[.:]", question.answer)
    return bound is not None and int(bound[1]) in reserved.bounds


def make_question(rng: random.Random, reserved: Reserved) -> Question:
    """One question for training, drawn with `rng`; never one that is reserved."""
    while True:
        if rng.random() < 0.02:
            return small_talk(rng)
        if rng.random() < 0.02:
            return rng.choice(DEMO_QUESTIONS)
        _, draw, extras = rng.choices(KINDS, weights=[kind[0] for kind in KINDS])[0]
        plain = draw(rng)
        question = Question(dressed(rng, plain.text, extras), plain.answer)
        if not is_reserved(plain, reserved) and not is_reserved(question, reserved):
            return question
