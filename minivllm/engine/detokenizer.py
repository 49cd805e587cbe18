"""From tokens to text, one token at a time.

A token is a piece of bytes, and a character may need several: text is given out only when its last
character is whole. And a token's text can depend on the one before it, so each new piece is cut out
of the text of a short run of tokens instead of being decoded alone.
"""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Grows the text of one sequence.

    tokenizer: a Hugging Face tokenizer. stop: strings that end the text. After each call of
    :meth:`update`, ``text`` is all text so far, without a character cut in two; once a stop string
    appears, ``text`` ends before it and ``stopped_by`` names it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        # The text of tokens up to ``_done`` is out; those from ``_context`` on are its context.
        self._context = 0
        self._done = 0

    @property
    def safe_text(self) -> str:
        """``text`` less an end that may turn out to be the beginning of a stop string."""
        if self.stopped_by is not None:
            return self.text
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return self.text[: len(self.text) - longest]

    def update(self, token_ids: Sequence[int], *, finished: bool) -> None:
        """Take all tokens generated so far; ``finished``: no more will come."""
        if self.stopped_by is not None:
            return
        new = token_ids[len(self._token_ids) :]
        # Only a stop string has to be noticed at the very token that completes it.
        for piece in [[token_id] for token_id in new] if self._stop else [new]:
            self._token_ids += piece
            self._extend(self._new_text())
            if self.stopped_by is not None:
                return
        if finished and self._done < len(self._token_ids):
            # A character that was never completed: show what is there.
            self._extend(self._new_text(whole=False))

    def _new_text(self, *, whole: bool = True) -> str:
        before = self._decode(self._token_ids[self._context : self._done])
        after = self._decode(self._token_ids[self._context :])
        if whole and (len(after) <= len(before) or after.endswith(REPLACEMENT)):
            return ""
        self._context, self._done = self._done, len(self._token_ids)
        return after[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _extend(self, new_text: str) -> None:
        if not new_text:
            return
        known = len(self.text)
        self.text += new_text
        # A stop string may have begun in the text before.
        found = [
            (at, stop)
            for stop in self._stop
            if (at := self.text.find(stop, max(0, known - len(stop) + 1))) >= 0
        ]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[:at]
