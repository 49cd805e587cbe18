"""Text from a model before there is any engine: chapter 2's way of generating.

Every step runs the whole sequence again. It is the simplest loop that is right, and the measure of
everything that the later chapters save.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Attend


def check_request(config: ModelConfig, prompt_token_ids: list[int], max_tokens: int) -> None:
    """Raises ValueError if the prompt is empty or the answer could pass the model's positions."""
    if not prompt_token_ids:
        raise ValueError("prompt_token_ids is empty; give at least one token")
    # The last token is yielded without ever going through the model: it needs no position.
    positions = len(prompt_token_ids) + max_tokens - 1
    if positions > config.max_positions:
        raise ValueError(
            f"prompt_token_ids has {len(prompt_token_ids)} tokens, which with "
            f"max_tokens={max_tokens} need {positions} positions, but the model has "
            f"{config.max_positions}; shorten the prompt or lower max_tokens"
        )


def borrowed_attention(scale: float) -> Attend:
    """PyTorch's own causal attention over the T tokens of one sequence.

    scale: what the scores are multiplied by, D ** -0.5. Chapter 3 replaces it.
    """

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # PyTorch wants heads before tokens: [H, T, D].
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(0, 1)

    return attend


@torch.inference_mode()
def generate_by_recomputing(
    model: nn.Module, prompt_token_ids: list[int], max_tokens: int
) -> Iterator[int]:
    """Yield greedy tokens one by one, each from a forward pass over all tokens before it.

    Stops after ``max_tokens`` or after an end token of the model, which is yielded too. Raises
    ValueError, when the first token is asked for, if :func:`check_request` does.
    """
    config = model.config
    check_request(config, prompt_token_ids, max_tokens)
    device = model.lm_head.weight.device
    attend = borrowed_attention(config.head_size**-0.5)
    token_ids = list(prompt_token_ids)
    for _ in range(max_tokens):
        input_ids = torch.tensor(token_ids, device=device)
        positions = torch.arange(len(token_ids), device=device)
        hidden = model(input_ids, positions, attend)
        token = int(model.compute_logits(hidden[-1:]).argmax())
        yield token
        if token in config.eos_token_ids:
            return
        token_ids.append(token)
