"""Tiny Qwen3's tokenizer: byte-level BPE, trained on the corpus, and the chat template."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from chapters.appendix_tiny_qwen3.answers import SYSTEM_PROMPT
from chapters.appendix_tiny_qwen3.corpus import END, END_OF_TEXT, START

VOCABULARY_SIZE = 2048
MAX_POSITIONS = 4096

# ChatML, as Qwen writes it: <|im_start|>ROLE\nCONTENT<|im_end|>\n for each message.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}\n"
    f"{{{{- '{START}system\\n{SYSTEM_PROMPT}{END}\\n' -}}}}\n"
    "{%- endif -%}\n"
    "{%- for message in messages -%}\n"
    f"{{{{- '{START}' + message['role'] + '\\n' + message['content'] + '{END}\\n' -}}}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    f"{{{{- '{START}assistant\\n' -}}}}\n"
    "{%- endif -%}\n"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the tokenizer on `texts`.

    Byte-pair encoding after Sennrich et al., "Neural Machine Translation of Rare Words with
    Subword Units" (2016), over bytes, so that every text can be written. Digits stay single:
    a number is then spelt the same way everywhere, which arithmetic needs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in (END_OF_TEXT, START, END)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer` to `folder` in the form that transformers' AutoTokenizer reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
