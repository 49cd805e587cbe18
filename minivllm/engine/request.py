"""A request while it is served: its text, its times, and the output that is made of them.

What the scheduler knows of it is its :class:`Sequence`; all here is for whoever asked.
"""

import time
from typing import Any

from minivllm.engine.batches import TokenLogprobs
from minivllm.engine.detokenizer import IncrementalDetokenizer
from minivllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minivllm.engine.sequence import Sequence


class Request:
    """What the engine remembers of a request besides its sequence.

    prompt: its text, if it came as one. detokenizer: what makes the output's text; None: there is
    none. stream: whether it is reported at every step, not only when it has finished.
    """

    def __init__(
        self,
        seq: Sequence,
        prompt: str | None,
        detokenizer: IncrementalDetokenizer | None,
        *,
        stream: bool,
    ) -> None:
        self.seq = seq
        self.prompt = prompt
        # One list for all outputs: whoever streams gets one at every step.
        self._prompt_token_ids = seq.token_ids[: seq.num_prompt_tokens]
        self.detokenizer = detokenizer
        self.stream = stream
        self.metrics = RequestMetrics(arrival_time=time.perf_counter())
        self.logprobs: list[TokenLogprobs] = []

    def update(self, now: float) -> bool:
        """Note when the first token came, and make the text.

        Returns whether a stop string has ended the text.
        """
        seq, metrics, detokenizer = self.seq, self.metrics, self.detokenizer
        if metrics.first_token_time is None and seq.num_output_tokens:
            metrics.first_token_time = now
        # Text costs time: it is made when somebody looks at it.
        looked_at = seq.finished or self.stream or seq.params.stop_strings
        if detokenizer is None or not looked_at:
            return False
        detokenizer.update(self._text_token_ids(), finished=seq.finished)
        return detokenizer.stopped_by is not None

    def note_end(self, now: float) -> None:
        """Complete the times of a request whose sequence has finished."""
        self.metrics.finished_time = now
        self.metrics.num_preemptions = self.seq.num_preemptions

    def output(self, tokenizer: Any) -> RequestOutput:
        """What has come of it so far; tokenizer: for the text of logprobs' tokens, or None."""
        seq, detokenizer = self.seq, self.detokenizer
        text = ""
        stop_reason: str | int | None = None
        if detokenizer is not None:
            text = detokenizer.text if seq.finished else detokenizer.safe_text
            stop_reason = detokenizer.stopped_by
        last = seq.token_ids[-1]
        if seq.finish_reason == "stop" and last in (seq.params.stop_token_ids or ()):
            stop_reason = last
        completion = CompletionOutput(
            text=text,
            token_ids=seq.output_token_ids,
            finish_reason=seq.finish_reason,
            stop_reason=stop_reason,
            logprobs=self._logprobs(tokenizer),
        )
        return RequestOutput(
            request_id=seq.request_id,
            prompt=self.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[completion],
            finished=seq.finished,
            num_cached_tokens=seq.num_cached or 0,
            metrics=self.metrics,
        )

    def _text_token_ids(self) -> list[int]:
        """The output tokens that belong to the text: an end token does not."""
        seq = self.seq
        token_ids = seq.output_token_ids
        if seq.finish_reason == "stop" and token_ids and token_ids[-1] in seq.end_token_ids:
            token_ids.pop()
        return token_ids

    def _logprobs(self, tokenizer: Any) -> list[dict[int, Logprob]] | None:
        if self.seq.params.logprobs is None:
            return None
        decode = (lambda token: None) if tokenizer is None else tokenizer.decode
        places = []
        for place in self.logprobs:
            likeliest = zip(place.token_ids[1:], place.logprobs[1:], strict=True)
            entries = {
                token: Logprob(value, rank, decode([token]))
                for rank, (token, value) in enumerate(likeliest, start=1)
            }
            chosen = place.token_ids[0]
            entries[chosen] = Logprob(place.logprobs[0], place.rank, decode([chosen]))
            places.append(entries)
        return places
