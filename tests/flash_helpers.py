"""What chapter 4's tests share: attention in float64, random batches, an explaining comparison."""

import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float
) -> torch.Tensor:
    """Causal attention of each sequence in float64, scores and all: [T, H, D]."""
    group = q.shape[1] // k.shape[1]
    outs, begin = [], 0
    for length in lengths:
        rows = slice(begin, begin + length)
        begin += length
        q64, k64, v64 = (x[rows].double() for x in (q, k, v))
        k64, v64 = (x.repeat_interleave(group, dim=1) for x in (k64, v64))
        scores = torch.einsum("qhd,khd->hqk", q64, k64) * scale
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v64))
    return torch.cat(outs)


def norm_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the deviation as a share of the norm of what is expected."""
    return ((out.double() - expected).norm() / expected.norm()).item()


def assert_close(out: torch.Tensor, expected: torch.Tensor, limit: float, what: str) -> None:
    """Fail with a sentence unless ``out`` is ``expected`` up to ``limit``."""
    assert out.shape == expected.shape, (
        f"{what}: the shape is {tuple(out.shape)}, not {tuple(expected.shape)}"
    )
    missing = int(out.isnan().sum())
    assert not missing, f"{what}: {missing} of {out.numel()} numbers are NaN"
    error = norm_error(out, expected)
    assert error < limit, f"{what}: the relative error is {error:.2g}, more than {limit:.1g}"


def assert_toy(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Compare numbers small enough to be shown."""
    ours = ours.cpu()
    assert torch.allclose(ours, expected, atol=1e-4), (
        f"{what}\nis        {_shown(ours.tolist())},\nshould be {_shown(expected.tolist())}"
    )


def _shown(numbers: list | float) -> list | float:
    return [_shown(x) for x in numbers] if isinstance(numbers, list) else round(numbers, 3)


def make_batch(
    lengths: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> Batch:
    """q, k, v as views of one fused tensor, the way a fused projection leaves them; cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    width = (num_heads + 2 * num_kv_heads) * head_size
    qkv = torch.randn(sum(lengths), width, generator=generator).to(DEVICE, dtype)
    sizes = [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
    q, k, v = (x.unflatten(1, (-1, head_size)) for x in qkv.split(sizes, dim=1))
    return q, k, v, boundaries(lengths)


def boundaries(lengths: list[int]) -> torch.Tensor:
    """Lengths -> cu_seqlens [B + 1] int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
