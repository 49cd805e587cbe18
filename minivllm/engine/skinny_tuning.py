"""How the kernels for a handful of rows cut their work; see ``skinny_kernels.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SkinnyTuning:
    """Tile sizes, chosen by measuring whole steps on an H200 with ``benchmarks/skinny.py``.

    One row: ``gemv_weights`` of a tile, in programs of ``gemv_warps``; ``norm_inside``: the widest
    residual stream of which the products make norm and merge themselves. More rows: tiles of
    ``block_n`` rows of the weights (``gate_up_block_n``: of gate and up together) and ``slices``
    times ``block_k`` columns; ``weights_first``: see ``tile_product``. ``qkv_parts``, ``o_parts``,
    ``down_parts``: how K is split, chosen by size where 0. ``attention_waves``: programs for each
    multiprocessor that attention is split into at most, none shorter than ``attention_split``
    tokens; ``early_attention``: let the kernel behind it start before its loop. ``head_block_n``:
    as ``block_n``, 0 to leave the head of several rows to PyTorch.
    """

    gemv_weights: int = 16384
    gemv_warps: int = 4
    norm_inside: int = 2048
    block_n: int = 16
    gate_up_block_n: int = 16
    block_k: int = 256
    slices: int = 4
    weights_first: int = 16
    head_block_n: int = 0
    qkv_parts: int = 0
    o_parts: int = 0
    down_parts: int = 0
    attention_waves: float = 1.0
    attention_split: int = 64
    attention_tile: int = 64
    attention_warps: int = 4
    attention_stages: int = 3
    early_attention: bool = True
    dependent: bool = True

    @classmethod
    def for_rows(cls, rows: int) -> SkinnyTuning:
        """What was best for about this many rows."""
        if rows == 1:
            return cls(attention_waves=2.0, attention_stages=2)
        if rows <= 16:
            return cls(attention_waves=2.0, attention_warps=8)
        return cls(attention_warps=8, attention_stages=2, gate_up_block_n=32)

    def parts(self, rows: int, out_size: int, size: int, unit: int, processors: int) -> int:
        """Into how many parts K = ``size`` of a product is cut, each a multiple of ``unit``.

        Enough for a program on every multiprocessor; with several rows also so that a part is
        loaded in one go, for further steps would wait for one another. With one row a program takes
        two rows of the weights at least, and they must fit into its registers.
        """
        for parts in range(1, 17):
            if size % (parts * unit):
                continue
            if rows == 1:
                block_n = self.gemv_weights // (1 << (size // parts - 1).bit_length())
                if block_n < 2:
                    continue
            elif size // parts <= self.slices * self.block_k:
                block_n = self.block_n
            else:
                continue
            if out_size // block_n * parts >= processors * 0.9:
                return parts
        return 1
