"""Attention over a sequence in pieces, and their merge, in plain PyTorch (split-KV).

    keys 0 ... 3     piece 0:  out_0, lse_0 \\
                                              out = w_0 * out_0 + w_1 * out_1,
    keys 4 ... 5     piece 1:  out_1, lse_1 /       w = softmax(lse_0, lse_1)

A piece needs nothing from the others, so a GPU can work on all of them at once, even where there is
a single sequence. What it leaves is its output, as if there were no other keys, and ``lse``, the
logarithm of its softmax denominator.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023). The Triton form, which takes
its logarithms to the base 2, is in `paged_split_kernels.py`; this one is its twin.
"""

import torch

from minivllm.attention.paged import slots_of


def attend_to_piece(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query to some of its keys, none of them hidden.

    q: [H, D]; k, v: [n, G, D], H a multiple of G. Returns the output over these keys alone, float32
    [H, D], and lse = log(sum(exp(score * scale))), float32 [H]. Without keys: zeros and -inf.
    """
    group = q.shape[0] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,nhd->hn", q.float(), k.float()) * scale
    lse = scores.logsumexp(dim=1)
    weights = (scores - lse[:, None]).exp()
    return torch.einsum("hn,nhd->hd", weights, v.float()), lse


def merge_pieces(outs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """The output over all keys, from the outputs over P pieces of them.

    outs: [P, H, D]; lses: [P, H], -inf for a piece without keys, which not all may be. Returns
    [H, D].
    """
    weights = lses.softmax(dim=0)
    return (weights[:, :, None] * outs).sum(dim=0)


def paged_decode_in_pieces(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    piece_len: int,
) -> torch.Tensor:
    """Decode over pages, each sequence in pieces of ``piece_len`` tokens.

    q: [B, H, D]; k_cache, v_cache: [N, S, G, D]; block_tables: [B, max_blocks] int32; context_lens:
    [B] int32, 0 for a padded row. Returns [B, H, D], zeros where context_lens is 0.
    """
    block_size = k_cache.shape[1]
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    out = torch.zeros_like(q)
    for row, (table, length) in enumerate(
        zip(block_tables.tolist(), context_lens.tolist(), strict=True)
    ):
        pieces = []
        for start in range(0, length, piece_len):
            slots = slots_of(table, start, min(start + piece_len, length), block_size)
            pieces.append(attend_to_piece(q[row], keys[slots], values[slots], scale))
        if pieces:
            outs, lses = zip(*pieces, strict=True)
            out[row] = merge_pieces(torch.stack(outs), torch.stack(lses))
    return out
