"""A rank's share of a model, filled from its slices of a checkpoint, or of random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from minivllm.distributed.group import Group
from minivllm.distributed.parallel_layers import shard_model, share_of
from minivllm.layers.checkpoint import LoadsItself
from minivllm.models.config import ModelConfig
from minivllm.models.loader import load_model, model_class


def load_share(
    folder: Path, whole: ModelConfig, group: Group, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """This rank's share of the model in ``folder``: of sharded tensors, only its slices are read.

    Raises ValueError, before any memory is taken, if the model cannot be shared out to the group,
    or for a checkpoint that does not fit ``whole``.
    """
    change = partial(shard_model, whole=whole, group=group)
    share = share_of(whole, group.size)
    return load_model(folder, share, dtype=dtype, device=device, change=change)


@torch.no_grad()
def random_share(
    whole: ModelConfig,
    group: Group,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> nn.Module:
    """This rank's share of the very model that :func:`minivllm.models.loader.random_model` makes.

    Every rank draws all weights, one layer's at a time, and keeps its slices.
    """
    cls = model_class(whole.architecture)
    share = cls(share_of(whole, group.size), dtype=dtype, device=device)
    model = shard_model(share, whole, group)
    drawn = cls(whole, dtype=dtype, device="meta")
    ours = dict(model.named_modules())
    generator = torch.Generator(device=device).manual_seed(seed)
    for path, module in drawn.named_modules():
        # As in random_model, a tied head comes with the embedding.
        if not isinstance(module, LoadsItself) or getattr(module, "tied", False):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            if values.dim() > 1:
                values.normal_(0, 0.02, generator=generator)
            else:
                values.fill_(1)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
        tensors = {source.name: source.target for source in module.checkpoint_sources(path)}
        for source in ours[path].checkpoint_sources(path):
            source.target.copy_(tensors[source.name][source.index or ...])
        module.to("meta")
    return model.eval()
