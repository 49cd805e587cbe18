"""Who holds which block of the KV cache, in plain Python.

Full blocks stay findable by their content after their sequences are gone (prefix caching, as in
vLLM): a block is named by a hash of its tokens and of the block before it, so equal names mean
equal prefixes. Blocks that nobody holds are evicted in least-recently-used order.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import xxhash

from minivllm.engine.events import EventLog
from minivllm.engine.sequence import Sequence

# The identity that stands before a sequence's first block.
ROOT = 0

HashFunction = Callable[[int, Tokens[int]], int]


def hash_block(previous_hash: int, token_ids: Tokens[int]) -> int:
    """The name of a full block: xxHash64 over the name of the block before it and its tokens."""
    digest = xxhash.xxh64(previous_hash.to_bytes(8, "little"))
    digest.update(array("q", token_ids).tobytes())
    return digest.intdigest()


@dataclass
class Block:
    """One block of the pool.

    ref_count: how many sequences hold it. hash: its name while it is cached, else None.
    identity: unique for each caching of a block; parent: the identity of the block before it.
    token_ids: its content while it is cached, compared on every hit.
    """

    block_id: int
    ref_count: int = 0
    hash: int | None = None
    identity: int = ROOT
    parent: int = ROOT
    token_ids: tuple[int, ...] = ()


class BlockManager:
    """Hands out blocks, shares them between equal prefixes, and takes them back.

    num_blocks: N, the size of the pool. block_size: S, a power of two from 16 to 256.
    hash_function: names a full block; tests pass a bad one, since a collision must do no harm.
    events: where to record what happens to the blocks; None: nowhere.

    Every block is in exactly one of three states: held (ref_count > 0), blank (free, content
    worthless), or evictable (free, but cached and findable).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        hash_function: HashFunction = hash_block,
        events: EventLog | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be at least 1")
        if block_size not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_size={block_size} must be a power of two from 16 to 256")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.peak_held = 0
        self.events = events
        self._hash_function = hash_function
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._blank = deque(range(num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._cached: dict[int, Block] = {}
        self._last_identity = ROOT

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        return len(self._blank) + len(self._evictable)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill."""
        return -(-num_tokens // self.block_size)

    def ref_count(self, block_id: int) -> int:
        return self._blocks[block_id].ref_count

    def admit(self, seq: Sequence, *, spare: int = 0) -> bool:
        """Give ``seq`` blocks for all its tokens, cached ones where its prefix was seen before.

        spare: how many blocks must stay free after that. Returns False, with nothing changed, if
        there are too few. On success ``seq.num_computed`` is what the shared blocks hold.
        """
        assert not seq.block_table and seq.num_computed == 0
        shared = self._find_prefix(seq)
        needed = self.blocks_for(len(seq)) - len(shared)
        idle = sum(block.ref_count == 0 for block in shared)
        if needed + spare > self.num_free - idle:
            return False
        self._share(seq, shared)
        self._extend(seq, needed)
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens of ``seq``; False, with nothing changed, if full."""
        needed = self.blocks_for(num_tokens) - len(seq.block_table)
        if needed > self.num_free:
            return False
        if needed > 0:
            self._extend(seq, needed)
        return True

    def cache_full_blocks(self, seq: Sequence, num_tokens: int) -> None:
        """Make the blocks filled by the first ``num_tokens`` tokens findable by their content.

        Called when a step that computes these tokens is scheduled. A second prompt in the same
        step may then share them: in every layer all K and V are stored before any are read.
        """
        if not self.enable_prefix_caching:
            return
        # A token that has no value yet cannot be part of a name; its block is named a step later.
        num_tokens = min(num_tokens, seq.num_known)
        for index in range(len(seq.prefix_chain), num_tokens // self.block_size):
            parent = seq.prefix_chain[-1] if seq.prefix_chain else ROOT
            name = self._name(seq, index)
            tokens = self._tokens(seq, index)
            found = self._cached.get(name)
            if found is None or found.parent != parent or found.token_ids != tokens:
                if found is not None:
                    self._forget(found)
                found = self._blocks[seq.block_table[index]]
                self._last_identity += 1
                found.hash, found.identity, found.parent = name, self._last_identity, parent
                found.token_ids = tokens
                self._cached[name] = found
                if self.events is not None:
                    numbers = found.identity, parent
                    self.events.add("cached", seq.request_id, (found.block_id,), *numbers)
            # Otherwise an equal block is cached already; this one is filled, and then given up.
            seq.prefix_chain.append(found.identity)

    def share_last_block(self, seq: Sequence) -> None:
        """Exchange the block that ``seq`` has just filled for an equal one that is cached.

        Requests that generate the same text hold it once then, not only while it is their prompt.
        Does nothing while a token of the block is still to be computed.
        """
        index = len(seq.prefix_chain) - 1
        if index < 0 or (index + 1) * self.block_size > seq.num_computed:
            return
        found = self._cached.get(seq.block_hashes[index])
        old = seq.block_table[index]
        # Its identity stands for its content and for all before it.
        if found is None or found.identity != seq.prefix_chain[index] or found.block_id == old:
            return
        self._take([found])
        self._put_back([old])
        seq.block_table[index] = found.block_id
        seq.exchanged.append(index)
        if self.events is not None:
            self.events.add("released", seq.request_id, (old,))
            self.events.add("shared", seq.request_id, (found.block_id,), seq.num_computed)

    def release(self, seq: Sequence) -> None:
        """Take back all blocks of ``seq``; the cached ones stay findable until evicted."""
        if self.events is not None and seq.block_table:
            self.events.add("released", seq.request_id, seq.block_table)
        self._put_back(seq.block_table)
        seq.block_table = []
        seq.prefix_chain = []
        seq.num_computed = 0

    def forget_all(self) -> None:
        """Empty the prefix cache; held blocks stay held."""
        for block in list(self._cached.values()):
            self._forget(block)

    def check(self, sequences: Tokens[Sequence]) -> None:
        """Assert every invariant, given all sequences that hold blocks (for tests)."""
        held: dict[int, int] = {}
        for seq in sequences:
            for block_id in seq.block_table:
                held[block_id] = held.get(block_id, 0) + 1
        blank, evictable = set(self._blank), set(self._evictable)
        assert len(blank) == len(self._blank)
        assert not blank & evictable
        for block in self._blocks:
            assert block.ref_count == held.get(block.block_id, 0)
            assert (block.ref_count == 0) == (block.block_id in blank | evictable)
            cached = block.hash is not None
            assert cached == (block.hash is not None and self._cached.get(block.hash) is block)
            assert not (cached and block.block_id in blank)
            assert cached or block.block_id not in evictable

    def _find_prefix(self, seq: Sequence) -> list[Block]:
        """The longest run of cached blocks that hold the beginning of ``seq``."""
        if not self.enable_prefix_caching:
            return []
        shared: list[Block] = []
        parent = ROOT
        # The last token is always computed afresh: its logits choose the next one.
        for index in range((len(seq) - 1) // self.block_size):
            block = self._cached.get(self._name(seq, index))
            if block is None or block.parent != parent:
                break
            if block.token_ids != self._tokens(seq, index):
                break
            shared.append(block)
            parent = block.identity
        return shared

    def _name(self, seq: Sequence, index: int) -> int:
        """The hash of full block ``index`` of ``seq``, computed once."""
        while len(seq.block_hashes) <= index:
            previous = seq.block_hashes[-1] if seq.block_hashes else ROOT
            tokens = self._tokens(seq, len(seq.block_hashes))
            seq.block_hashes.append(self._hash_function(previous, tokens))
        return seq.block_hashes[index]

    def _tokens(self, seq: Sequence, index: int) -> tuple[int, ...]:
        start = index * self.block_size
        return tuple(seq.token_ids[start : start + self.block_size])

    def _share(self, seq: Sequence, shared: list[Block]) -> None:
        """Let ``seq``, which holds nothing yet, begin with these cached blocks."""
        self._take(shared)
        seq.block_table = [block.block_id for block in shared]
        seq.prefix_chain = [block.identity for block in shared]
        seq.num_computed = len(shared) * self.block_size
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
        if self.events is not None and shared:
            self.events.add("shared", seq.request_id, seq.block_table, seq.num_computed)

    def _extend(self, seq: Sequence, count: int) -> None:
        """Give ``seq`` so many blocks more, for new content; they must be free."""
        taken = [self._take_new() for _ in range(count)]
        seq.block_table += taken
        self.peak_held = max(self.peak_held, self.num_held)
        if self.events is not None:
            self.events.add("taken", seq.request_id, taken)

    def _take(self, shared: list[Block]) -> None:
        """One holder more for each of these cached blocks; a free one is evictable no longer."""
        for block in shared:
            if block.ref_count == 0:
                del self._evictable[block.block_id]
            block.ref_count += 1

    def _take_new(self) -> int:
        """A block for new content: a blank one if there is any, else the least recently used.

        Returns its id. It has no name, and one holder. There must be a free block.
        """
        if not self._blank:
            oldest = next(iter(self._evictable))
            # Before its content changes: a stale name would hand out somebody else's K and V.
            self._forget(self._blocks[oldest])
        block = self._blocks[self._blank.popleft()]
        assert block.ref_count == 0
        block.ref_count = 1
        return block.block_id

    def _put_back(self, block_table: list[int]) -> None:
        """One holder less for each block of a sequence's table.

        A block that nobody holds any more becomes blank, or evictable if it is cached; of these, a
        block is evicted after all that build on it.
        """
        # The end of the table first: what becomes evictable first is evicted first.
        for block_id in reversed(block_table):
            block = self._blocks[block_id]
            block.ref_count -= 1
            assert block.ref_count >= 0
            if block.ref_count == 0:
                if block.hash is None:
                    self._blank.append(block_id)
                else:
                    self._evictable[block_id] = None

    def _forget(self, block: Block) -> None:
        """Make a cached block unfindable; if nobody holds it, it is blank from now on."""
        del self._cached[block.hash]
        block.hash = None
        if block.ref_count == 0:
            del self._evictable[block.block_id]
            self._blank.append(block.block_id)
        if self.events is not None:
            self.events.add("evicted", None, (block.block_id,), block.identity)
