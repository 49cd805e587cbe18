"""Train Tiny Qwen3 from scratch and save it as a Hugging Face folder.

    python -m chapters.appendix_tiny_qwen3.train --out DIR

makes the corpus and the tokenizer, trains, saves, asks the held-out questions and writes what it
found to DIR/training_report.json. A smoke test: --device cpu --steps 20.
"""

import argparse
import datetime
import json
import math
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from chapters.appendix_tiny_qwen3 import corpus
from chapters.appendix_tiny_qwen3.evaluate import evaluate
from chapters.appendix_tiny_qwen3.tokenizer import (
    MAX_POSITIONS,
    VOCABULARY_SIZE,
    save_tokenizer,
    train_tokenizer,
)

SEED = 0
STEPS = 6500
CONVERSATIONS = 200_000
TOKENIZER_CONVERSATIONS = 20_000
TOKENS_PER_STEP = 65_536
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 200
WEIGHT_DECAY = 0.1
# The model is to learn the answers; a little weight on the questions helps it to read them.
QUESTION_WEIGHT = 0.1
LENGTH_STEP = 64  # rows are padded to a multiple of this


def make_config(tokenizer: Tokenizer) -> Qwen3Config:
    """The shape of the model: 3.3 million parameters, 4 query heads over 2 key/value heads."""
    end_of_text = tokenizer.token_to_id(corpus.END_OF_TEXT)
    return Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(corpus.END),
        pad_token_id=end_of_text,
    )


def make_rows(
    tokenizer: Tokenizer, conversations: list[list[corpus.Segment]], device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokenise, sort into buckets of like length and pad.

    Returns: for each bucket the token ids, (rows, length) int16, and the weight that each token
    has as a target, same shape, float16: 1 in answers, QUESTION_WEIGHT elsewhere, 0 in padding.
    """
    segments = [segment for conversation in conversations for segment in conversation]
    encoded = iter(tokenizer.encode_batch_fast([segment.text for segment in segments]))
    buckets: dict[int, list[tuple[list[int], list[float]]]] = {}
    for conversation in conversations:
        ids: list[int] = []
        weights: list[float] = []
        for segment in conversation:
            piece = next(encoded).ids
            ids += piece
            weights += [1.0 if segment.learnt else QUESTION_WEIGHT] * len(piece)
        length = math.ceil(len(ids) / LENGTH_STEP) * LENGTH_STEP
        padding = length - len(ids)
        buckets.setdefault(length, []).append((ids + [0] * padding, weights + [0.0] * padding))
    return [
        (
            torch.tensor([ids for ids, _ in rows], dtype=torch.int16).to(device),
            torch.tensor([weights for _, weights in rows], dtype=torch.float16).to(device),
        )
        for _, rows in sorted(buckets.items())
    ]


def epoch(
    buckets: list[tuple[torch.Tensor, torch.Tensor]], tokens: int, generator: torch.Generator
) -> list[tuple[int, torch.Tensor]]:
    """Batches of about `tokens` tokens in random order: (bucket, row numbers) pairs."""
    batches = []
    for number, (ids, _) in enumerate(buckets):
        rows = torch.randperm(len(ids), generator=generator).to(ids.device)
        batches += [(number, part) for part in rows.split(max(1, tokens // ids.shape[1]))]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return LEARNING_RATE * warm_up * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def train(
    model: Qwen3ForCausalLM,
    buckets: list[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    tokens_per_step: int,
) -> float:
    """Train `model` in place and return the mean loss of the last 100 steps, in nats a token."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    generator = torch.Generator().manual_seed(SEED)
    batches: list[tuple[int, torch.Tensor]] = []
    losses = []
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        if not batches:
            batches = epoch(buckets, tokens_per_step, generator)
        bucket, rows = batches.pop()
        ids, weights = (tensor[rows] for tensor in buckets[bucket])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1].int(), use_cache=False).logits
        each = F.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten().long(), reduction="none"
        )
        weights = weights[:, 1:].flatten().float()
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if (step + 1) % max(1, min(500, steps // 4)) == 0:
            recent = torch.stack(losses[-100:]).mean().item()
            seconds = time.perf_counter() - started
            print(f"step {step + 1:>6}  loss {recent:.4f}  {seconds:.0f} s", flush=True)
    return torch.stack(losses[-100:]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tokens-per-step", type=int, help="default: 65536, on a CPU 4096")
    arguments = parser.parse_args()
    device, steps = torch.device(arguments.device), arguments.steps
    tokens_per_step = arguments.tokens_per_step
    if tokens_per_step is None:
        tokens_per_step = 4096 if device.type == "cpu" else TOKENS_PER_STEP
    arguments.out.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    # A short run needs no more conversations than it can read; 100 tokens is a short one.
    wanted = max(TOKENIZER_CONVERSATIONS, steps * tokens_per_step // 100)
    conversations = corpus.conversations(SEED, min(CONVERSATIONS, wanted))
    sample = conversations[:TOKENIZER_CONVERSATIONS]
    tokenizer = train_tokenizer(segment.text for part in sample for segment in part)
    save_tokenizer(tokenizer, arguments.out)
    buckets = make_rows(tokenizer, conversations, device)
    corpus_tokens = sum(int((weights > 0).sum()) for _, weights in buckets)
    corpus_seconds = time.perf_counter() - started
    print(f"corpus: {len(conversations)} conversations, {corpus_tokens} tokens", flush=True)

    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(make_config(tokenizer)).to(device)
    started = time.perf_counter()
    loss = train(model, buckets, steps, tokens_per_step)
    training_seconds = time.perf_counter() - started

    model = model.eval().to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.token_to_id(t) for t in (corpus.END, corpus.END_OF_TEXT)],
        pad_token_id=tokenizer.token_to_id(corpus.END_OF_TEXT),
    )
    model.save_pretrained(arguments.out)
    result = evaluate(model if device.type != "cpu" else model.float(), arguments.out)
    print(result.report())
    report = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "parameters": model.num_parameters(),
        "conversations": len(conversations),
        "corpus_tokens": corpus_tokens,
        "corpus_seconds": round(corpus_seconds, 1),
        "steps": steps,
        "tokens_per_step": tokens_per_step,
        "training_seconds": round(training_seconds, 1),
        "loss": round(loss, 5),
        "heldout_questions": result.asked.total(),
        "heldout_right": result.right.total(),
        "heldout_accuracy": round(result.accuracy, 4),
    }
    text = json.dumps(report, indent=2) + "\n"
    (arguments.out / "training_report.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
