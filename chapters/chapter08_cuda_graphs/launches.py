"""How many operations a decode step is, and what starting them takes.

    python -m chapters.chapter08_cuda_graphs.launches

A model of 28 layers that are only 2 numbers wide has next to nothing to compute: what its step
takes on a CPU is what Python and PyTorch need to start it. That can be measured without a GPU.
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch

from chapters.chapter01_layers.traffic import count_traffic
from minivllm.models.config import ModelConfig
from minivllm.models.hub import model_folder
from minivllm.models.loader import random_model

LAYERS = 28
# Attention: K and V to their pages, and one kernel that attends.
IN_ATTENTION = 2
# Between two matrix products of a layer, see engine/fused_forward.py.
FUSED_A_LAYER = 9


@dataclass(frozen=True)
class Count:
    """operations: of a decode step in the plain form; milliseconds: to start them, on this CPU."""

    operations: int
    milliseconds: float


def narrow_model(layers: int = LAYERS) -> torch.nn.Module:
    """As many layers as Qwen3-0.6B, each as narrow as can be."""
    config = ModelConfig.from_folder(model_folder(None))
    narrow = replace(
        config,
        vocab_size=8,
        hidden_size=2,
        intermediate_size=2,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_size=2,
    )
    return random_model(narrow, dtype=torch.bfloat16, device=torch.device("cpu"))


@torch.inference_mode()
def count(layers: int = LAYERS, repeats: int = 30) -> Count:
    """Run a step of one token: counted as chapter 1 counts, and by the clock."""
    model = narrow_model(layers)
    token, position = torch.zeros(1, dtype=torch.int64), torch.full((1,), 17)

    def step() -> None:
        hidden = model(token, position, lambda layer, q, k, v: q)
        model.compute_logits(hidden).argmax(dim=-1)

    step()
    kernels = len(count_traffic(step))
    times = []
    for _ in range(repeats):
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    return Count(kernels + layers * IN_ATTENTION, 1e3 * statistics.median(times))


def main() -> int:
    torch.set_num_threads(1)
    found = count()
    print(f"a decode step of {LAYERS} layers, for one token:")
    print(f"  plain form    {found.operations} operations, each a kernel on a GPU")
    print(f"  fused form    {FUSED_A_LAYER * LAYERS} kernels in the layers, and a few around them")
    print(f"starting the plain form's takes this CPU {found.milliseconds:.1f} ms,", end=" ")
    print(f"{1e3 * found.milliseconds / found.operations:.1f} us each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
