"""Requests that arrive over time: a Poisson process, served in real time, and what users saw."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.sampling_params import SamplingParams

LONG_SHARE = 0.2
# Requests of each kind that run alone, to learn what a slowdown is measured against.
NUM_ALONE = 3


@dataclass(frozen=True)
class Arrival:
    """seconds: when it comes, counted from the start; long: of which of the two kinds it is."""

    seconds: float
    prompt: list[int]
    max_tokens: int
    long: bool


@dataclass
class Served:
    """When the tokens of one request came: seconds after the start, one entry a token."""

    arrival: Arrival
    times: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Seconds from arrival to the first token."""
        return self.times[0] - self.arrival.seconds

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def a_token(self) -> float:
        """Mean seconds a token after the first; 0 for an answer of one token."""
        return statistics.fmean(self.gaps) if self.gaps else 0.0

    @property
    def whole(self) -> float:
        """Seconds from arrival to the last token."""
        return self.times[-1] - self.arrival.seconds


def poisson_arrivals(
    num_requests: int, rate: float, *, scale: int = 1, vocab_size: int = 10001, seed: int = 0
) -> list[Arrival]:
    """Requests at ``rate`` a second on average; the same ones for every rate.

    Four in five are short (prompts of 16 to 64 tokens, answers of 16 to 48), the others long (256
    to 512, 32 to 96), all times ``scale``. Raises ValueError unless the rate is positive.
    """
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate={rate} must be a positive number of requests a second")
    # Two sources, so that a rate stretches the same pattern and changes nothing else.
    clock, rng = random.Random(seed), random.Random(seed + 1)
    top = min(10000, vocab_size - 1)
    now, arrivals = 0.0, []
    for _ in range(num_requests):
        now += clock.expovariate(1.0) / rate
        long = rng.random() < LONG_SHARE
        in_range, out_range = ((256, 512), (32, 96)) if long else ((16, 64), (16, 48))
        prompt = [rng.randint(0, top) for _ in range(scale * rng.randint(*in_range))]
        arrivals.append(Arrival(now, prompt, scale * rng.randint(*out_range), long))
    return arrivals


def serve(engine: LLMEngine, arrivals: Sequence[Arrival], bar: Any = None) -> list[Served]:
    """Hand each request to the engine when its time has come, and note when its tokens do.

    A request that comes while a step runs waits for the end of that step, as it would in a server
    with one thread; that wait is part of its time to the first token.
    """
    # No request may find the prompts of an earlier run.
    engine.block_manager.forget_all()
    served = [Served(arrival) for arrival in arrivals]
    began = time.perf_counter()
    added = 0
    while added < len(arrivals) or engine.has_unfinished_requests:
        now = time.perf_counter() - began
        while added < len(arrivals) and arrivals[added].seconds <= now:
            params = SamplingParams(
                temperature=0.6, ignore_eos=True, max_tokens=arrivals[added].max_tokens
            )
            engine.add_request(str(added), arrivals[added].prompt, params)
            added += 1
        if not engine.has_unfinished_requests:
            time.sleep(max(0.0, arrivals[added].seconds - (time.perf_counter() - began)))
            continue
        outputs = engine.step()
        now = time.perf_counter() - began
        for output in outputs:
            times = served[int(output.request_id)].times
            times += [now] * (len(output.outputs[0].token_ids) - len(times))
            if output.finished and bar is not None:
                bar.update()
    return served


def alone(engine: LLMEngine, arrivals: Sequence[Arrival]) -> dict[bool, tuple[float, float]]:
    """For short (False) and long (True) requests: median seconds to the first token, and a token.

    Measured on the first few of each kind, each on an engine that does nothing else. A kind that
    does not occur is left out.
    """
    found = {}
    for long in (False, True):
        chosen = [arrival for arrival in arrivals if arrival.long is long][:NUM_ALONE]
        runs = [
            serve(engine, [Arrival(0.0, each.prompt, each.max_tokens, long)])[0] for each in chosen
        ]
        if runs:
            found[long] = (
                statistics.median(run.first_token for run in runs),
                statistics.median(run.a_token for run in runs),
            )
    return found


def summarise(
    served: Sequence[Served],
    ideal: dict[bool, tuple[float, float]],
    *,
    ttft_limit_s: float,
    itl_limit_s: float,
) -> dict[str, Any]:
    """The figures of one run.

    goodput: requests a second whose first token came within the first limit and whose further
    tokens took at most the second on average. slowdown: a request's whole time by the time that its
    kind needs alone. fairness: Jain's index of the slowdowns (Jain et al. 1984), 1 if all are
    slowed down alike, 1/n if one bears it all.
    """
    span = max(one.times[-1] for one in served)
    good = [one for one in served if one.first_token <= ttft_limit_s and one.a_token <= itl_limit_s]
    slowdowns: dict[bool, list[float]] = {False: [], True: []}
    for one in served:
        first, each = ideal[one.arrival.long]
        expected = first + each * (one.arrival.max_tokens - 1)
        slowdowns[one.arrival.long].append(one.whole / expected)
    every = slowdowns[False] + slowdowns[True]
    return {
        "requests": len(served),
        "seconds": span,
        "served_per_s": len(served) / span,
        "output_tokens_per_s": sum(len(one.times) for one in served) / span,
        "goodput_per_s": len(good) / span,
        "good_share": len(good) / len(served),
        "first_token_ms": percentiles([one.first_token for one in served]),
        "between_tokens_ms": percentiles([gap for one in served for gap in one.gaps]),
        "slowdown": {
            name: percentiles(slowdowns[long], unit=1.0)
            for name, long in (("short", False), ("long", True))
        },
        "fairness": sum(every) ** 2 / (len(every) * sum(value**2 for value in every)),
    }


def percentiles(values: Sequence[float], unit: float = 1e3) -> dict[str, float | None]:
    """The 50th, 90th and 99th, and the largest; None where there are no values."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        f"p{share}": unit * ordered[round(last * share / 100)] if ordered else None
        for share in (50, 90, 99, 100)
    }
