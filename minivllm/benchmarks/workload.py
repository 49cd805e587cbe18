"""The field's usual workload, what it must move and compute, and whether an engine did it right."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minivllm.engine.outputs import RequestOutput
from minivllm.models.config import ModelConfig
from minivllm.models.generate import borrowed_attention


@dataclass(frozen=True)
class Workload:
    """prompts: token ids; max_tokens: how many each gets, whatever it generates."""

    prompts: list[list[int]]
    max_tokens: list[int]

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.max_tokens)


def usual_workload(
    num_requests: int = 256, most: int = 1024, seed: int = 0, vocab_size: int = 10001
) -> Workload:
    """Random prompts and answers of 100 to ``most`` tokens each, of the first 10,001 tokens.

    With the defaults this is the workload by which small engines compare themselves (nano-vllm's
    bench.py): 142,827 tokens in, 133,966 out.
    """
    rng = random.Random(seed)
    least, top = min(100, most), min(10000, vocab_size - 1)
    prompts = [
        [rng.randint(0, top) for _ in range(rng.randint(least, most))] for _ in range(num_requests)
    ]
    return Workload(prompts, [rng.randint(least, most) for _ in range(num_requests)])


@dataclass(frozen=True)
class Work:
    """What a workload asks of a machine, however well it is served.

    kv_bytes: keys and values read by decode steps. weight_bytes: weights, once a decode step.
    flop: multiplications and additions of the prompts. (Those of decode steps fit into the time
    that their bytes take.)
    """

    kv_bytes: float
    weight_bytes: float
    flop: float

    def seconds(self, bytes_per_s: float, flop_per_s: float) -> float:
        """The least time for it: decode moves at bandwidth, prompts compute at the peak rate."""
        return (self.kv_bytes + self.weight_bytes) / bytes_per_s + self.flop / flop_per_s


def work_of(workload: Workload, config: ModelConfig, dtype: torch.dtype) -> Work:
    """Count it: everybody decodes together, so steps are as many as the longest answer."""
    size = dtype.itemsize
    kv_token = 2 * config.num_layers * config.num_kv_heads * config.head_size * size
    params = matrix_parameters(config)
    head = config.vocab_size * config.hidden_size
    steps = max(workload.max_tokens)
    contexts = flop = 0.0
    for prompt, count in zip(workload.prompts, workload.max_tokens, strict=True):
        n = len(prompt)
        # The prompt's own pass chooses the first token; each further one reads all before it.
        contexts += sum(range(n + 1, n + count))
        scores = config.num_layers * config.num_heads * config.head_size * n * (n + 1) / 2
        flop += 2 * (params - head) * n + 2 * head + 4 * scores
    return Work(contexts * kv_token, steps * params * size, flop)


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that every decode step reads: all matrices, the head among them."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_size
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    return config.num_layers * layer + config.vocab_size * config.hidden_size


@dataclass(frozen=True)
class Margins:
    """How a greedy answer stands to the plain model in float32.

    tokens: how many; likeliest: how many of them are the likeliest; worst: the most that one falls
    short of the likeliest, in logits; noise: the largest difference between the plain model's
    logits in its own dtype and in float32.
    """

    tokens: int
    likeliest: int
    worst: float
    noise: float


@torch.inference_mode()
def margins_of(model: Any, prompt: list[int], answer: list[int]) -> Margins:
    """Compare an answer with the plain model (chapter 2, no kernel of ours), read as a whole."""
    attend = borrowed_attention(model.config.head_size**-0.5)
    device = model.lm_head.weight.device
    ids = torch.tensor(prompt + answer[:-1], device=device)
    positions = torch.arange(len(ids), device=device)
    start = len(prompt) - 1
    plain = model.compute_logits(model(ids, positions, attend)[start:]).float()
    exact = float32_logits(model, ids, positions, start)
    chosen = exact.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0]
    short = exact.amax(dim=1) - chosen
    return Margins(
        tokens=len(answer),
        likeliest=int((short == 0).sum()),
        worst=float(short.max()),
        noise=float((plain - exact).abs().max()),
    )


def verdict_of(margins: list[Margins]) -> dict[str, float]:
    """The shares of tokens that are the likeliest, both distances, and whether all agree.

    A token agrees if it is the likeliest, or if it falls short of it by no more than rounding
    moves a logit: three times the noise, and 1e-5 for the order of float32 sums.
    """
    total = sum(one.tokens for one in margins)
    worst = max(one.worst for one in margins)
    noise = max(one.noise for one in margins)
    return {
        "tokens": total,
        "likeliest_share": sum(one.likeliest for one in margins) / total,
        "worst_shortfall": worst,
        "rounding_of_plain_model": noise,
        "agrees": float(worst <= 3 * noise + 1e-5),
    }


def check_greedy(model: Any, outputs: list[RequestOutput]) -> dict[str, float]:
    """:func:`verdict_of` the answers of an engine."""
    return verdict_of(
        [margins_of(model, out.prompt_token_ids, out.outputs[0].token_ids) for out in outputs]
    )


@torch.inference_mode()
def float32_logits(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, start: int = 0
) -> torch.Tensor:
    """The plain model's logits [T - start, V] of ids[start:], in float32 from the same weights.

    ids, positions: [T], one sequence. One layer's weights at a time are copied to float32, so that
    a large model can be checked beside an engine that holds nearly all of the memory.
    """
    decoder = model.model
    attend = borrowed_attention(model.config.head_size**-0.5)
    x, residual = decoder.embed_tokens(ids).float(), None
    for layer in decoder.layers:
        x, residual = _in_float32(layer)(x, residual, positions, decoder.rotary, attend)
    hidden = _in_float32(decoder.norm).add(x, residual)[0]
    return _in_float32(model.lm_head)(hidden[start:])


def _in_float32(module: nn.Module) -> nn.Module:
    if all(parameter.dtype == torch.float32 for parameter in module.parameters()):
        return module
    return deepcopy(module).float()
