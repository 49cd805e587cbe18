"""Turns prompts into token ids, and refuses bad requests.

A request is checked whole, prompt and parameters, before it is queued. So a list of prompts can be
refused before the first of them has begun.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm.engine.sampling_params import SamplingParams

Prompt = str | list[int] | dict[str, Any]
# What the files begin with that a tokenizer's vocabulary may be in.
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


@dataclass(frozen=True, kw_only=True)
class InputProcessor:
    """Tokenises prompts, and refuses requests that this engine cannot serve.

    tokenizer: a Hugging Face tokenizer; None: prompts must be token ids. vocab_size: of the model.
    max_model_len: the most tokens of a sequence, prompt and output together. num_blocks: of the KV
    cache, of block_size tokens each.
    """

    tokenizer: Any
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int

    def process(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, list[int]]:
        """The prompt's text, if it came as one, and its token ids; ValueError if it is no good."""
        if not isinstance(params, SamplingParams):
            raise ValueError(
                f"sampling_params={params!r} must be a SamplingParams, not {type(params).__name__}"
            )
        text, token_ids = self._tokenize(prompt)
        if not token_ids:
            raise ValueError(f"prompt={prompt!r} is empty; give at least one token")
        self._check_tokens(token_ids)
        for token_id in params.stop_token_ids or ():
            if token_id >= self.vocab_size:
                raise ValueError(
                    f"stop_token_ids holds {token_id}, outside the vocabulary of {self.vocab_size}"
                )
        if params.stop_strings and self.tokenizer is None:
            raise ValueError(
                f"stop={params.stop!r} needs text, but skip_tokenizer_init=True; use stop_token_ids"
            )
        return text, token_ids

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: str | None = None
        if isinstance(prompt, dict):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise ValueError(
                    f"prompt={prompt!r} must have the key 'prompt' or 'prompt_token_ids'"
                )
            text = prompt.get("prompt")
            if "prompt_token_ids" not in prompt:
                prompt = text
            elif isinstance(prompt["prompt_token_ids"], str):
                raise ValueError(f"prompt={prompt!r}: text belongs under the key 'prompt'")
            else:
                prompt = prompt["prompt_token_ids"]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"prompt={prompt!r} is text, but skip_tokenizer_init=True; give token ids"
                )
            try:
                prompt.encode()
            except UnicodeEncodeError:
                # A lone surrogate, which stands for a byte that is no UTF-8.
                raise ValueError(
                    f"prompt={prompt!r} is no text that UTF-8 can hold; decode its bytes with "
                    "errors='replace'"
                ) from None
            # Not verbose: what is too long is refused below, and not with a warning from there.
            return prompt, list(self.tokenizer.encode(prompt, verbose=False))
        # Bytes are a sequence of integers too, but nobody means token ids by them.
        is_ids = isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray)
        # By kind, not token by token: there may be very many tokens, and none can run meanwhile.
        kinds = set(map(type, prompt)) if is_ids else set()
        if not is_ids or not all(issubclass(kind, int) and kind is not bool for kind in kinds):
            raise ValueError(f"prompt={prompt!r} must be text or a list of integer token ids")
        return text, list(prompt)

    def _check_tokens(self, token_ids: list[int]) -> None:
        vocab_size = self.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise ValueError(
                f"prompt_token_ids holds {wrong}, outside the vocabulary of {vocab_size} tokens; "
                "was the prompt made with another model's tokenizer?"
            )
        if len(token_ids) >= self.max_model_len:
            limit = f"max_model_len={self.max_model_len}"
            if self.max_model_len == self.num_blocks * self.block_size:
                limit += f", all that {self.num_blocks} KV blocks hold,"
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, and {limit} leaves no room for another; "
                "shorten the prompt, or raise max_model_len or num_kv_blocks as far as they go"
            )


def load_tokenizer(folder: Any) -> Any:
    """The Hugging Face tokenizer in ``folder``; ValueError if there is none that can be read."""
    # transformers takes seconds to import, and an engine on token ids does not need it.
    from transformers import AutoTokenizer

    remedy = "name another with tokenizer=..., or set skip_tokenizer_init=True and use token ids"
    # Where there is none, the library makes one up, of a single token.
    names = [file.name for file in Path(folder).iterdir()]
    if not any(name.startswith(TOKENIZER_FILES) and "config" not in name for name in names):
        raise ValueError(
            f"{folder} has no tokenizer: no tokenizer.json, and no vocabulary; {remedy}"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # Whatever the library stumbled over: to the user it is a folder without a tokenizer.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{folder} has no tokenizer that transformers can read ({reason}); {remedy}"
        ) from None
