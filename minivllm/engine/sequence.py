"""One request on its way through the engine, in plain Python."""

from enum import Enum

from minivllm.engine.sampling_params import SamplingParams

# Stands in a sequence for a token that the device has chosen and the host has not read yet.
UNKNOWN = -1


class Status(Enum):
    """Where a sequence is: in the queue, holding blocks, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The tokens of one request and how far the engine has come with them.

    ``token_ids`` is the prompt followed by what was generated. K and V of the first
    ``num_computed`` of them lie in the blocks of ``block_table``; the rest is pending. A running
    sequence with one pending token, the newest, is decoding; with more, it is in its prefill.

    The last ``num_unknown`` tokens may be on their way from the device still: they have a place,
    and so a position and a slot, but no value yet (:meth:`reserve`, :meth:`resolve`).

    arrival: its place in the order of requests; lower is served first and preempted last.
    max_len: the most tokens it may ever hold, prompt included.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival: int,
        seed: int,
        max_len: int,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        assert 0 < len(prompt_token_ids) < max_len
        self.request_id = request_id
        # A copy: the caller may go on using the list, and every generated token is appended.
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.arrival = arrival
        self.seed = seed
        room = max_len - self.num_prompt_tokens
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        ends = set(params.stop_token_ids or ())
        self.end_token_ids = ends if params.ignore_eos else ends.union(eos_token_ids)
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.num_computed = 0
        self.num_unknown = 0
        # Tokens whose K and V were found in the prefix cache when it first ran.
        self.num_cached: int | None = None
        self.num_preemptions = 0
        self.block_table: list[int] = []
        # Kept by the block manager: the hash of every full block so far, and the identities of the
        # cached blocks that hold this sequence's prefix.
        self.block_hashes: list[int] = []
        self.prefix_chain: list[int] = []
        # Places of the table whose block was exchanged for an equal one, for whoever has a copy of
        # the table.
        self.exchanged: list[int] = []

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.status.value}, "
            f"{self.num_computed}/{len(self)} computed, {len(self.block_table)} blocks)"
        )

    @property
    def num_pending(self) -> int:
        """Tokens whose K and V are still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_known(self) -> int:
        """Tokens whose value the host has."""
        return len(self.token_ids) - self.num_unknown

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens, as far as they are known."""
        return self.token_ids[self.num_prompt_tokens : self.num_known]

    @property
    def exhausted(self) -> bool:
        """Whether every token that it may generate has a place already, known or not."""
        return self.num_output_tokens >= self.max_tokens

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    def append(self, token_id: int) -> None:
        """Add a generated token, and finish if it ends the sequence."""
        self.reserve()
        self.resolve(token_id)

    def reserve(self) -> None:
        """Make a place for a token that a step will have chosen."""
        self.token_ids.append(UNKNOWN)
        self.num_unknown += 1

    def resolve(self, token_id: int) -> None:
        """Put a token into the first place that waits for one; finish if it ends the sequence."""
        self.token_ids[-self.num_unknown] = token_id
        self.num_unknown -= 1
        if token_id in self.end_token_ids:
            self.finish("stop")
        elif self.num_known - self.num_prompt_tokens >= self.max_tokens:
            self.finish("length")

    def forget_unknown(self) -> None:
        """Give up the places of tokens that have not come."""
        del self.token_ids[self.num_known :]
        self.num_unknown = 0

    def finish(self, reason: str) -> None:
        """reason: ``stop``, ``length`` or ``abort``. Tokens that are still to come are dropped."""
        self.forget_unknown()
        self.status = Status.FINISHED
        self.finish_reason = reason
