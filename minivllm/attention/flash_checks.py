"""What the attention functions demand of their arguments, checked before any launch."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256


def check_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Raise ValueError unless q [..., H, D] may look at k and v [..., G, D], all of ``dtypes``.

    k and v may be a batch's keys and values or the layer's KV cache.
    """
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} but v {tuple(v.shape)}; they must be equal")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q has head size {q.shape[-1]} but k and v have {k.shape[-1]}; they must be equal"
        )
    if not 1 <= q.shape[-1] <= MAX_HEAD_SIZE:
        raise ValueError(f"head size {q.shape[-1]} of q is outside 1 to {MAX_HEAD_SIZE}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"q has {q.shape[-2]} heads but k and v have {k.shape[-2]}; "
            "the first must be a multiple of the second"
        )
    if q.dtype not in dtypes:
        raise ValueError(f"q is {q.dtype}; use float32, float16 or bfloat16")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype} but {name} is {tensor.dtype}; cast one of them")
        if tensor.device != q.device:
            raise ValueError(f"q is on {q.device} but {name} on {tensor.device}; move one of them")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} between the numbers of a head; "
                f"call {name}.contiguous() first"
            )


def check_scale(scale: float) -> None:
    """Raise ValueError unless ``scale`` is positive and finite."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale} must be positive and finite, usually head_size ** -0.5")


def check_index(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], like: torch.Tensor
) -> None:
    """Raise ValueError unless ``tensor`` is int32, contiguous, of ``shape``, and beside ``like``.

    None in ``shape`` stands for any size.
    """
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} but must have [{wanted}]")
    if tensor.dtype != torch.int32:
        raise ValueError(f"{name} is {tensor.dtype}; it must be int32")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the rest on {like.device}; move one")
    if tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(f"{name} is strided in its last dimension; call {name}.contiguous()")


def check_flash_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    max_seqlen: int,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Raise ValueError unless the arguments of ``flash_attention`` fit together.

    q: [T, H, D]; k, v: [T, G, D]; cu_seqlens: [B + 1] int32.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give [tokens, heads, size]")
    if len(q) != len(k):
        raise ValueError(f"q has {len(q)} tokens but k and v have {len(k)}; they must be equal")
    check_heads(q, k, v, dtypes)
    check_scale(scale)
    check_index("cu_seqlens", cu_seqlens, (None,), q)
    if len(cu_seqlens) < 1:
        raise ValueError("cu_seqlens is empty; it needs a 0 and the end of each sequence")
    if not 0 <= max_seqlen <= len(q):
        raise ValueError(f"max_seqlen={max_seqlen} is outside 0 to the {len(q)} tokens of q")


def check_out(out: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    """``out`` if it can take the result for q [T, H, D], a new tensor if it is None."""
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device} but q is {q.dtype} "
            f"{tuple(q.shape)} on {q.device}; they must be equal"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, its strides are {out.stride()}")
    return out
