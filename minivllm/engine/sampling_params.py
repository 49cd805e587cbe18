"""What a request asks of the sampler, and when it ends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

# Below, dividing the logits by it could overflow; the result is the likeliest token anyway.
SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop; checked once, here.

    temperature: 0 is greedy; larger is more random. top_k: sample among the k likeliest tokens (0
    or -1: all). top_p: among the likeliest that make up this probability mass, in (0, 1]. min_p:
    among those at least this fraction as likely as the likeliest, in [0, 1].
    max_tokens: end after so many tokens; None: when the model's context is full.
    seed: the same seed gives the same tokens, whatever else is in the batch; None: drawn from the
    engine's own seed.
    stop: strings that end the text (and are cut off); stop_token_ids: tokens that end it.
    ignore_eos: go on after the model's end token.
    logprobs: report the log-probabilities of the chosen and of so many likeliest tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = 16
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    stop_strings: tuple[str, ...] = field(init=False, repr=False)

    def __new__(cls, **settings: Any) -> "SamplingParams":
        refuse_unknown(settings, [field.name for field in fields(cls) if field.init])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, at_least=0, hint="0 is greedy")
        _number("top_p", self.top_p, above=0, at_most=1, hint="1 keeps every token")
        _number("min_p", self.min_p, at_least=0, at_most=1, hint="0 keeps every token")
        _integer("top_k", self.top_k, at_least=-1, hint="0 keeps every token")
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, at_least=1, hint="None has no limit")
        if self.seed is not None:
            _integer("seed", self.seed)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, at_least=0, at_most=100, hint="None reports none")
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            one_text = name == "stop" and isinstance(value, str)
            # An iterator would be used up by the checks below.
            if not one_text and not isinstance(value, list | tuple | set | frozenset | None):
                raise ValueError(f"{name}={value!r} must be a list")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r} must be True or False")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={self.stop!r} must hold non-empty strings")
        for token in self.stop_token_ids or ():
            _integer("stop_token_ids", token, at_least=0, hint="token ids count from 0")
        object.__setattr__(self, "stop_strings", stop)

    @property
    def reshapes(self) -> bool:
        """Whether tokens are cut off before one is drawn, which takes more than a temperature."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < SMALLEST_TEMPERATURE


def refuse_unknown(keywords: Mapping[str, Any], known: list[str]) -> None:
    """ValueError for a keyword argument that does not exist, with the likeliest one that does."""
    for name, value in keywords.items():
        if name not in known:
            close = get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"unknown argument {name}={value!r}; {remedy}")


def _number(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    hint: str,
) -> None:
    try:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and math.isfinite(value)
    except OverflowError:
        # An integer beyond the range of floating point.
        good = False
    if not good:
        raise ValueError(f"{name}={value!r} must be a finite number ({hint})")
    if value < at_least or value <= above or value > at_most:
        lower = f"above {above}" if above > -math.inf else f"at least {at_least}"
        upper = f" and at most {at_most}" if at_most < math.inf else ""
        raise ValueError(f"{name}={value} must be {lower}{upper} ({hint})")


def _integer(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    hint: str = "",
) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be an integer")
    if not at_least <= value <= at_most:
        upper = f" and at most {at_most}" if at_most < math.inf else ""
        raise ValueError(f"{name}={value} must be at least {at_least}{upper} ({hint})")
