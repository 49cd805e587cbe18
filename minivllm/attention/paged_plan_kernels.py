"""The line of tiles that `paged_split_kernels.py` works on, written down once a step.

For every tile of every sequence: which sequence, how many of its tokens are left, and where in the
cache the tile's tokens are. Row s lists the tiles of share s:

    block tables, S = 64 = TILE              share 0            share 1
    seq 0  [7, 2]     70 tokens      seq    0    0    1        2    2    2
    seq 1  [3]        40 tokens      left  70    6   40      150   86   22
    seq 2  [5, 0, 1] 150 tokens      slot 448  128  192      320    0   64

All layers of a model read the same list. No number of it comes back to the host and the grids that
read it depend on the device alone, so a CUDA graph captured once serves all lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.attention.flash_kernels import padded_head_size, shared_memory
from minivllm.attention.paged_checks import check_plan_inputs


# Not compiled anew where one of them happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["batch", "table_stride", "most", "shares", "few_shares"])
def plan_kernel(
    block_tables_ptr,
    context_lens_ptr,
    share_ptr,
    cut_ptr,
    tile_seq_ptr,
    tile_left_ptr,
    tile_slot_ptr,
    batch,
    table_stride,
    most,  # tiles that a share can have: the length of a row
    shares,
    few_shares,
    MIN_SHARE: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,  # tokens that lie side by side in the cache: min(S, TILE)
    BLOCK_B: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program writes down the tiles of one sequence, the first one also what each share has.

    share [shares, 2]: its tiles, and whether the first of them begins its sequence.
    cut [shares, 2]: the sequence that the end of share i cuts, and the share where it ends, if that
    is the first border in it; else the second number is at most i.
    tile_seq, tile_left [shares, most]: the sequence, and its tokens from this tile on.
    tile_slot [shares, most, TILE / RUN]: the first slot of each run of tokens.
    """
    seq = tl.program_id(0)
    seqs = tl.arange(0, BLOCK_B)
    lengths = tl.load(context_lens_ptr + seqs, mask=seqs < batch, other=0)
    # A padded row has no tokens but one tile, so that zeros are written for it.
    tiles = tl.where(seqs < batch, tl.maximum(tl.cdiv(lengths, TILE), 1), 0)
    total = tl.sum(tiles, axis=0)
    # A short line goes to few programs: every cut costs a merge.
    share = tl.maximum(tl.cdiv(total, shares), tl.minimum(tl.cdiv(total, few_shares), MIN_SHARE))
    if seq == 0:
        ids = tl.arange(0, BLOCK_SHARES)
        count = tl.minimum(tl.maximum(total - ids * share, 0), share)
        tl.store(share_ptr + 2 * ids, count, mask=ids < shares)
        tl.store(cut_ptr + 2 * ids + 1, 0, mask=(ids < shares) & (count == 0))

    begin = tl.sum(tl.where(seqs < seq, tiles, 0), axis=0)
    length = tl.load(context_lens_ptr + seq)
    first = begin // share  # the shares that the sequence lies in
    last = (begin + tl.maximum(tl.cdiv(length, TILE), 1) - 1) // share
    table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride
    runs = TILE // RUN
    for start in tl.range(0, tl.maximum(length, 1), CHUNK * TILE):
        token = start + tl.arange(0, CHUNK) * TILE
        mask = token < tl.maximum(length, 1)
        tile = begin + token // TILE
        place = tile // share * most + tile % share
        tl.store(tile_seq_ptr + place, tl.zeros_like(tile) + seq, mask=mask)
        tl.store(tile_left_ptr + place, length - token, mask=mask)
        starts = (token == 0).to(tl.int32)
        tl.store(share_ptr + 2 * (tile // share) + 1, starts, mask=mask & (tile % share == 0))
        at_end = mask & ((tile % share == share - 1) | (tile == total - 1))
        cut_at = cut_ptr + 2 * (tile // share)
        tl.store(cut_at, tl.zeros_like(tile) + seq, mask=at_end)
        tl.store(cut_at + 1, tl.where(tile // share == first, last, 0), mask=at_end)
        for run in tl.static_range(TILE // RUN):
            run_token = token + run * RUN
            block = tl.load(table_ptr + run_token // S, mask=run_token < length, other=0)
            tl.store(tile_slot_ptr + place * runs + run, block * S + run_token % S, mask=mask)


class PagedDecodePlan:
    """The line of tiles of one step, and the memory for what lies at its borders.

    Made once for the largest batch, prepared once a step, used by every layer: a captured CUDA
    graph finds everything at the same addresses. Two decodes that may run at the same time need a
    plan each.

    share, cut, tile_seq, tile_left, tile_slot: int32, see ``plan_kernel``. partial_out: float32
    [2 * shares, H, D]; partial_lse: float32 [2 * shares, H].
    """

    def __init__(
        self,
        max_batch: int,
        max_blocks: int,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        processors: int | None = None,
        programs_each: int = 2,
        tile: int | None = None,
        min_share: int = 2,
        num_warps: int = 4,
        num_stages: int | None = None,
        wide_from: int | None = None,
    ) -> None:
        """Reserve memory.

        Args:
            max_batch: the most sequences of a step.
            max_blocks: the most blocks of a sequence, the width of the block tables.
            block_size: S.
            num_heads: H, a multiple of num_kv_heads.
            num_kv_heads: G.
            head_size: D.
            dtype: of q and the cache.
            device: where they are.
            processors: multiprocessors of the device; read from it when None, 4 on a CPU.
            programs_each: programs for each of them, as many as run side by side.
            tile: tokens of a tile; chosen by head size and dtype when None.
            min_share: tiles of a share that are worth a program; below that fewer take part.
            num_warps: see Triton; of a program with one KV head.
            num_stages: tiles in flight, see Triton; as many as fit when None.
            wide_from: from so many sequences on, half as many programs take two KV heads each;
                when None, from 32 where that fits.

        Raises:
            ValueError: if the heads cannot be grouped.
        """
        device = torch.device(device)
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}"
            )
        on_gpu = device.type == "cuda"
        if processors is None:
            processors = (
                torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 4
            )
        # 64 keys of 128 numbers in 16 bits, or as many bytes.
        tile = tile or max(16, 64 * 128 * 2 // (padded_head_size(head_size) * dtype.itemsize))
        self.tile = min(tile, 64)
        self.max_batch = max_batch
        self.max_blocks = max_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.shares = max(1, processors * programs_each // num_kv_heads)
        self.few_shares = max(1, processors // num_kv_heads)
        self.min_share = min_share
        self.num_warps = num_warps
        # Fast memory of a program: two tiles of K and of V on their way, and q's rows four times.
        group = num_heads // num_kv_heads
        row = padded_head_size(head_size) * dtype.itemsize
        q_bytes = 4 * max(16, triton.next_power_of_2(group)) * row
        most_bytes = shared_memory(device)
        self.num_stages = num_stages or (3 if 4 * self.tile * row + q_bytes <= most_bytes else 2)
        # Two KV heads: 512 bytes in a row instead of 256, and half as many places of the memory
        # that are read at a time, gain 1 to 2 % where memory is the limit. For few sequences more
        # programs are better. Tried in vain (H200, 1k x 256 to 16k x 128): four or eight heads
        # (more pieces to merge), the copy engine's descriptors, four stages, five of half the size
        # (20 % slower), smaller shares at the end, a hint to keep the list in the L2 cache. Hints
        # for K and V are lost in Triton's asynchronous copies.
        if wide_from is None:
            wide_from = 32 if 8 * self.tile * row + q_bytes <= most_bytes else max_batch + 1
        pairs = num_kv_heads % 2 == 0 and 2 * group <= 16
        self.wide_from = wide_from if pairs else max_batch + 1
        # Hopper and later can start a kernel while the one in front finishes.
        self.dependent = on_gpu and torch.cuda.get_device_capability(device)[0] >= 9

        max_tiles = max_batch * max(1, triton.cdiv(max_blocks * block_size, self.tile))
        most = max(min_share, triton.cdiv(max_tiles, self.shares))
        runs = self.tile // min(block_size, self.tile)
        self.share = torch.zeros(self.shares, 2, dtype=torch.int32, device=device)
        self.cut = torch.zeros_like(self.share)
        self.tile_seq = torch.zeros(self.shares, most, dtype=torch.int32, device=device)
        self.tile_left = torch.zeros_like(self.tile_seq)
        self.tile_slot = torch.zeros(self.shares, most, runs, dtype=torch.int32, device=device)
        self.partial_out = torch.empty(2 * self.shares, num_heads, head_size, device=device)
        self.partial_lse = torch.empty(2 * self.shares, num_heads, device=device)
        self._prepared: tuple[int, ...] | None = None

    @property
    def most(self) -> int:
        """Tiles that a share can have."""
        return self.tile_seq.shape[1]

    def prepare(self, block_tables: torch.Tensor, context_lens: torch.Tensor) -> None:
        """Write down the line for block_tables [B, max_blocks] and context_lens [B], both int32.

        Call it once a step, when both hold the step's values; inside a CUDA graph it is captured
        like any kernel and reads what is there at the replay.

        Raises:
            ValueError: if the two do not fit together, or are larger than what the plan was made
                for.
        """
        check_plan_inputs(block_tables, context_lens, self.block_size, self.share)
        batch, width = block_tables.shape
        if batch > self.max_batch or width > self.max_blocks:
            raise ValueError(
                f"block_tables is [{batch}, {width}] but the plan was made for "
                f"[{self.max_batch}, {self.max_blocks}]; make a larger one"
            )
        self._prepared = self._identity(block_tables, context_lens)
        if batch == 0:
            return
        plan_kernel[(batch,)](
            block_tables,
            context_lens,
            self.share,
            self.cut,
            self.tile_seq,
            self.tile_left,
            self.tile_slot,
            batch,
            block_tables.stride(0),
            self.most,
            self.shares,
            self.few_shares,
            MIN_SHARE=self.min_share,
            S=self.block_size,
            TILE=self.tile,
            RUN=min(self.block_size, self.tile),
            BLOCK_B=triton.next_power_of_2(self.max_batch),
            BLOCK_SHARES=triton.next_power_of_2(self.shares),
            CHUNK=256,
            num_warps=4,
        )

    def check(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> None:
        """Raise ValueError unless the plan was made for q and cache, prepared for the tables."""
        have = (*self.partial_out.shape[1:], self.num_kv_heads, self.block_size)
        want = (*q.shape[1:], k_cache.shape[2], k_cache.shape[1])
        if have != want or self.partial_out.device != q.device:
            raise ValueError(
                f"plan was made for (H, D, G, S) = {have} on {self.partial_out.device} but q and "
                f"k_cache have {want} on {q.device}; make one for them"
            )
        if self._prepared != self._identity(block_tables, context_lens):
            raise ValueError(
                "plan is not prepared for these block_tables and context_lens; call "
                "plan.prepare(block_tables, context_lens) once a step"
            )

    @staticmethod
    def _identity(block_tables: torch.Tensor, context_lens: torch.Tensor) -> tuple[int, ...]:
        return (block_tables.data_ptr(), *block_tables.shape, context_lens.data_ptr())
