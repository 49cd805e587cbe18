"""What the tests of the skinny chain share: numbers among NaN, small models, one decode step."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minivllm.attention.flash_hopper import runs_on_hopper
from minivllm.attention.paged import PagedBatch, PagedKVCache
from minivllm.attention.paged_torch import bind_torch_attention
from minivllm.engine.skinny_forward import SkinnyForward
from minivllm.engine.skinny_tuning import SkinnyTuning
from minivllm.layers.rotary_embedding import RopeScaling
from minivllm.models.config import ModelConfig
from minivllm.models.qwen3 import Qwen3ForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
# What Triton's interpreter computes right; bfloat16 is for a GPU.
DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
ON_HOPPER = torch.cuda.is_available() and runs_on_hopper(torch.device("cuda"), torch.bfloat16, 128)
hopper_only = pytest.mark.skipif(
    not ON_HOPPER, reason="needs a GPU of compute capability 9.0, on which the kernel is compiled"
)

# A few tiles wide, for the interpreter.
TINY = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=24,
    hidden_size=48,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=64,
    max_positions=128,
    rms_norm_eps=1e-5,
    rope_base=1e4,
    rope_scaling=RopeScaling(),
    tie_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    dtype=torch.float32,
    eos_token_ids=(),
)
SMALL_TILES = SkinnyTuning(
    gemv_weights=2048,
    block_n=32,
    block_k=32,
    slices=2,
    o_parts=2,
    down_parts=1,
    attention_tile=16,
    attention_split=16,
)
# Layers as wide as those of Qwen3-0.6B.
LAYERS = replace(
    TINY,
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=3,
    num_heads=16,
    num_kv_heads=8,
    head_size=128,
    max_positions=4096,
)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, NAN, dtype=dtype, device=DEVICE)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error.item() <= TOLERANCE[dtype], f"relative error {error.item():.2e}"


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return F.silu(gate) * up


def make_model(
    model_class: type[Qwen3ForCausalLM], config: ModelConfig, dtype: torch.dtype
) -> Qwen3ForCausalLM:
    """Random weights, under which the size of numbers neither grows nor shrinks."""
    model = model_class(config, dtype=dtype, device=DEVICE).requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.normal_(1.0, 0.1)
        else:
            weight.normal_(0.0, weight.shape[1] ** -0.5)
    return model


class Sequences:
    """Random keys and values in shuffled blocks, NaN wherever nobody's tokens lie."""

    def __init__(
        self,
        lengths: list[int],
        *,
        kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: torch.dtype,
        layers: int = 1,
    ) -> None:
        self.lengths = lengths
        used = [-(-length // block_size) for length in lengths]
        free = torch.randperm(sum(used) + 2).tolist()
        self.tables = torch.full((len(lengths), max(used) + 1), -1, dtype=torch.int32)
        slots = []
        for row, count in enumerate(used):
            mine, free = free[:count], free[count:]
            self.tables[row, :count] = torch.tensor(mine, dtype=torch.int32)
            slots.append([block * block_size + i for block in mine for i in range(block_size)])
        shape = (layers, sum(used) + 2, block_size, kv_heads, head_size)
        self.k, self.v = (poisoned(*shape, dtype=dtype) for _ in range(2))
        self.slots = [mine[:length] for mine, length in zip(slots, lengths, strict=True)]
        for mine in self.slots:
            old = mine[:-1]  # the newest token is not there yet
            for cache in (self.k, self.v):
                cache.flatten(1, 2)[:, old] = normal(
                    layers, len(old), kv_heads, head_size, dtype=dtype
                )
        self.tables = self.tables.to(DEVICE)
        self.context = int32(lengths)
        self.positions = (self.context.long() - 1).clamp(min=0)
        newest = [mine[-1] if mine else -1 for mine in self.slots]
        self.slot_mapping = torch.tensor(newest, device=DEVICE)


class Step:
    """One decode step of sequences of ``lengths``, by the model and by the kernels.

    A length of 0 is a row of padding; ``real`` are the others.
    """

    def __init__(
        self, config: ModelConfig, lengths: list[int], dtype: torch.dtype, block_size: int = 16
    ) -> None:
        sizes = {"kv_heads": config.num_kv_heads, "head_size": config.head_size}
        self.made = made = Sequences(
            lengths, block_size=block_size, dtype=dtype, layers=config.num_layers, **sizes
        )
        self.real = [i for i, length in enumerate(lengths) if length]
        self.cache = PagedKVCache(config, made.k.shape[1], block_size, dtype=dtype, device=DEVICE)
        self.cache.k, self.cache.v = made.k, made.v
        self.ids = torch.randint(config.vocab_size, (len(lengths),), device=DEVICE)

    def by_kernels(self, forward: SkinnyForward) -> torch.Tensor:
        made = self.made
        return forward(self.ids, made.positions, made.slot_mapping, made.tables, made.context)

    def by_model(
        self, model: Qwen3ForCausalLM, dtype: torch.dtype
    ) -> tuple[torch.Tensor, PagedKVCache]:
        """Logits of the real rows, and the cache behind them: a copy in ``dtype``."""
        made, real = self.made, self.real
        cache = _copy_of(self.cache, dtype)
        batch = PagedBatch(
            self.ids[real],
            made.positions[real],
            made.slot_mapping[real],
            torch.arange(len(real) + 1, dtype=torch.int32, device=DEVICE),
            made.context[real],
            made.tables[real],
            (1,) * len(real),
            tuple(made.lengths[i] for i in real),
        )
        attend = bind_torch_attention(cache, batch, model.config.head_size**-0.5)
        with torch.inference_mode():
            return model.compute_logits(model(batch.input_ids, batch.positions, attend)), cache

    def assert_stored(self, expected: PagedKVCache) -> None:
        """The new tokens' K and V are in our cache as in that of the model."""
        slots = self.made.slot_mapping[self.real]
        for mine, theirs in ((self.cache.k, expected.k), (self.cache.v, expected.v)):
            mine, theirs = (x.flatten(1, 2)[:, slots] for x in (mine, theirs))
            assert_close(mine, theirs, torch.float32)


def _copy_of(cache: PagedKVCache, dtype: torch.dtype) -> PagedKVCache:
    copy = object.__new__(PagedKVCache)
    copy.num_blocks, copy.block_size = cache.num_blocks, cache.block_size
    # PyTorch's path multiplies masked values by 0, which NaN would survive.
    copy.k, copy.v = (x.nan_to_num(0.0).to(dtype) for x in (cache.k, cache.v))
    return copy
