"""How the kernels for a handful of rows cut their work; see ``skinny_kernels.py``."""

from __future__ import annotations

from dataclasses import dataclass

# Up to how many rows attention is the chain's own. That one cuts all sequences into equally many
# splits, which saves two kernels a layer (2 rows of 256 tokens: 0.60 ms a step instead of 0.65);
# the other one cuts all tokens into equal shares (16 rows, one of them of 12,000 tokens: 1.3 ms
# instead of 4.7). Measured on an H200; GPUs that cannot start a kernel early may lose more by two.
OWN_ATTENTION = 4
HOPPER_BLOCK_N = 64  # rows of the weights that a program of skinny_hopper_kernels takes


@dataclass(frozen=True)
class SkinnyTuning:
    """Tile sizes, chosen by measuring whole steps on an H200 with ``benchmarks/skinny.py``.

    One row: ``gemv_weights`` of a tile, in programs of ``gemv_warps``; ``norm_inside``,
    ``merge_inside``: the widest residual stream of which the products make the norm, and the merge
    of attention's splits, themselves. More rows: tiles of
    ``block_n`` rows of the weights (``gate_up_block_n``: of gate and up together) and ``slices``
    times ``block_k`` columns; ``weights_first``: see ``tile_product``. ``qkv_parts``, ``o_parts``,
    ``down_parts``: how K is split, chosen by size where 0. ``attention_waves``: programs for each
    multiprocessor that attention is split into at most, none shorter than ``attention_split``
    tokens; ``early_attention``: let the kernel behind it start before its loop. ``head_block_n``:
    as ``block_n``, 0 to leave the head of several rows to PyTorch.

    ``hopper``: use the products of ``skinny_hopper_kernels.py`` where they run. A copy brings
    ``hopper_chunk`` columns, into one of ``hopper_stages`` buffers at most. K is split until a
    program has ``hopper_weights``, but into no more programs than ``hopper_programs`` for each
    multiprocessor, so that all of them find room at once (up to 64 rows). ``late``: divide by the
    root mean square behind the products. ``own_attention``: with the kernel for a
    handful of rows, not the one for many sequences.
    """

    gemv_weights: int = 16384
    gemv_warps: int = 4
    norm_inside: int = 2048
    merge_inside: int = 2048
    block_n: int = 16
    gate_up_block_n: int = 16
    block_k: int = 256
    slices: int = 4
    weights_first: int = 16
    head_block_n: int = 0
    hopper: bool = True
    hopper_chunk: int = 128
    hopper_stages: int = 8
    hopper_weights: int = 32768
    hopper_programs: int = 3
    late: bool = True
    qkv_parts: int = 0
    o_parts: int = 0
    down_parts: int = 0
    attention_waves: float = 1.0
    attention_split: int = 64
    attention_tile: int = 64
    attention_warps: int = 4
    attention_stages: int = 3
    early_attention: bool = True
    own_attention: bool = True
    dependent: bool = True

    @classmethod
    def for_rows(cls, rows: int) -> SkinnyTuning:
        """What was best for about this many rows."""
        if rows == 1:
            return cls(attention_waves=2.0, attention_stages=2)
        if rows <= 16:
            return cls(attention_waves=2.0, attention_warps=8, own_attention=rows <= OWN_ATTENTION)
        return cls(attention_warps=8, attention_stages=2, gate_up_block_n=32, own_attention=False)

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

    def gain_blocks(self, rows: int, size: int, processors: int) -> int:
        """Into how many blocks of columns ``sum_and_gain`` cuts a row of ``size``.

        About a program for each multiprocessor. The weights of wide layers take long to come, and
        they come meanwhile, but hardly to a multiprocessor on which such a program still runs: so
        there it is one for every fourth (8B, 32 rows: 4.74 ms a step; 4.95 with 16 blocks a row).
        """
        programs = processors if size <= 2048 else processors / 4
        rows = 1 << (rows - 1).bit_length()  # so that few forms of the kernels are compiled
        block = 256
        while 2 * rows * size > 3 * block * programs and block < size:
            block *= 2
        return -(-size // block)

    def hopper_parts(self, out_size: int, size: int, processors: int, weights: int = 0) -> int:
        """As :meth:`parts`, for ``skinny_hopper_kernels.py``, whose parts are multiples of a chunk.

        weights: of a program, instead of ``hopper_weights``.
        """
        tiles = -(-out_size // HOPPER_BLOCK_N)
        best = 1
        for parts in range(2, size // self.hopper_chunk + 1):
            many = tiles * parts > self.hopper_programs * processors
            if many or size // best * HOPPER_BLOCK_N <= (weights or self.hopper_weights):
                break
            if size % (parts * self.hopper_chunk) == 0:
                best = parts
        return best
