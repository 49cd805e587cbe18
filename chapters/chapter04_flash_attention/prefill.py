"""What a prompt costs one layer: with all its scores in memory, and in tiles.

    python -m chapters.chapter04_flash_attention.prefill
    python -m chapters.chapter04_flash_attention.prefill --workspace --lengths 512 1024

The shapes are those of a layer of Qwen3-0.6B. On a CPU the forms are PyTorch's, timed with one
thread and in CPU seconds; on a GPU the tiles are a kernel. ``--workspace`` runs your own code.
"""

import argparse
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chapters.machine.asking import choose_package

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 16, 8, 128
SCALE = HEAD_SIZE**-0.5
LENGTHS = (512, 1024, 2048, 4096)
FORMS = ("naive", "tiles")

Call = Callable[[], torch.Tensor]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside it, as they come and go.

    peak: the most that lived at once. What an operation holds only while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key = storage._cdata
            if key not in self._live and key not in given:  # else it is a view
                self._live[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that ``call`` holds at once beyond what was there before it."""
    if device.type == "cuda":
        from minivllm.benchmarks.harness import peak_memory

        return peak_memory(call, device) or 0
    with LiveBytes() as live:
        result = call()
    del result
    return live.peak


def milliseconds(call: Call, device: torch.device) -> float:
    """One call, after another one to warm up: CPU seconds, or the GPU's own clock."""
    if device.type == "cuda":
        from minivllm.benchmarks.harness import time_calls

        return time_calls(call, device) * 1e3
    call()
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def forms(length: int, device: torch.device) -> dict[str, Call]:
    """Naive attention and attention in tiles, of one random prompt."""
    from minivllm.attention.flash import FlashAttention, flash_attention
    from minivllm.attention.naive import NaiveAttention

    form = flash_attention
    if device.type == "cuda":
        from minivllm.attention import flash_kernels

        form = flash_kernels.flash_attention
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(length, heads, HEAD_SIZE, generator=generator).to(device, dtype)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    naive = NaiveAttention([0, length], SCALE)
    tiles = FlashAttention([0, length], SCALE, form=form, device=device)
    return {"naive": lambda: naive(0, q, k, v), "tiles": lambda: tiles(0, q, k, v)}


@dataclass(frozen=True)
class Cost:
    """Bytes beyond the inputs and milliseconds of one form; off_by: relative, against naive."""

    form: str
    length: int
    peak_bytes: int
    milliseconds: float
    off_by: float


def measure(length: int, chosen: Sequence[str], device: torch.device) -> list[Cost]:
    """The cost of each chosen form on the same prompt."""
    calls = forms(length, device)
    expected = calls["naive"]().double()
    costs = []
    for name in chosen:
        off_by = ((calls[name]().double() - expected).norm() / expected.norm()).item()
        peak, time_taken = peak_bytes(calls[name], device), milliseconds(calls[name], device)
        costs.append(Cost(name, length, peak, time_taken, off_by))
    return costs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="T")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="default: both")
    parser.add_argument("--workspace", action="store_true", help="run your own code")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    costs = []
    try:
        choose_package(arguments.workspace)
        if min(arguments.lengths) < 1:
            raise ValueError("--lengths must be at least 1")
        print("one layer of Qwen3-0.6B, one prompt; MiB beyond q, k and v")
        heads = [f"{name + ', MiB':>12}  {name + ', ms':>11}" for name in arguments.forms]
        print("  ".join(["tokens", *heads, *["off by"] * ("tiles" in arguments.forms)]))
        for length in arguments.lengths:
            found = measure(length, arguments.forms, device)
            costs += found
            cells = [f"{c.peak_bytes / 2**20:>12,.1f}  {c.milliseconds:>11,.0f}" for c in found]
            cells += [f"{cost.off_by:.0e}" for cost in found if cost.form == "tiles"]
            print("  ".join([f"{length:>6,}", *cells]), flush=True)
    except (ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        from minivllm.benchmarks.report import write_report  # a workspace does not have it

        write_report(arguments.json, {"rows": [asdict(cost) for cost in costs]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
