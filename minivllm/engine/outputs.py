"""What the engine gives back for a request, in the shape that vLLM's users know."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability under the model, before temperature and restrictions.

    rank: 1 is the likeliest token of the vocabulary. decoded_token: None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """A generated text.

    finish_reason: None while it grows, then ``stop`` (an end token or stop string), ``length``
    (max_tokens, or the context is full) or ``abort``.
    stop_reason: the stop string or stop token id that ended it, None for the model's own end token.
    logprobs: for each token, token id -> :class:`Logprob`; None unless asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    index: int = 0


@dataclass
class RequestMetrics:
    """When a request passed each stage: seconds of a monotonic clock, None until it has."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request and what came of it.

    num_cached_tokens: how many prompt tokens were found in the prefix cache. prompt_token_ids: one
    list for all outputs of a request.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics


@dataclass(frozen=True)
class RankStats:
    """What one of several ranks took to be ready.

    load_seconds: to fill its share of the weights. peak_host_bytes: the most that its process held
    in the host's memory (None where nobody counts). weight_bytes: of its share. sums_by: how its
    decode steps reach the other ranks, "one-shot" or "collectives".
    """

    rank: int
    load_seconds: float
    peak_host_bytes: int | None
    weight_bytes: int
    sums_by: str


@dataclass
class EngineStats:
    """What an engine has done since it started; times in seconds.

    A step that runs prompts and decodes together shares its time between both by tokens.
    host_seconds: the host's own work, that is, all but waiting for the device. (Without overlap
    the time of the step itself is in it, since launching and waiting cannot be told apart.)
    ranks: one entry for each, where several share the model.
    """

    num_steps: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    host_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_preemptions: int = 0
    num_kv_blocks: int = 0
    peak_kv_blocks: int = 0
    finished_requests: int = 0
    finish_reasons: dict[str, int] = field(default_factory=dict)
    ranks: list[RankStats] = field(default_factory=list)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed a second; cached ones are not computed and do not count."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second in decode."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def cache_hit_rate(self) -> float:
        """The share of all prompt tokens that the prefix cache held."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
