"""Kernels compiled before they are needed, side by side.

Triton compiles a kernel when it is first launched, for that launch's types and constants, and the
launch waits for it: a quarter of a second, some fifty times before an engine is ready. Here the
engine's steps are rehearsed instead. Whatever they launch is noted and left out, and then all of it
is compiled at once, by one thread for each processor:

    rehearsal     launch a | launch b | launch a | launch c      noted: a, b, c; nothing runs
    compilation                                        |- a -|
                                                       |---- b ----|
                                                       |-- c --|

Threads are enough: what takes the time in Triton's compiler is C++ or another program, and lets go
of Python's lock. Nothing depends on any of this. A kernel that was not noted, or could not be
compiled here, is compiled at its first launch as always.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

logger = logging.getLogger(__name__)

# A kernel, and one form of it in Triton's own words.
Form = tuple[Any, str]


def compile_ahead(rehearse: Callable[[], None], device: torch.device | None = None) -> int:
    """Compile the kernels that ``rehearse`` launches and nobody has launched before.

    rehearse: does what will be done later. Launches of kernels that are not compiled yet are left
    out; all other launches, and PyTorch's operations, take place. So what a kernel would have
    written may be anything. device: the GPU to compile for; the current one when None.

    Returns how many kernels are ready now that were not before. Never raises for the sake of a
    kernel.
    """
    began = time.perf_counter()
    noted = _launches_of(rehearse)
    if not noted:
        return 0
    found = time.perf_counter()

    # Which device is current is a thread's own matter, and "cuda" means this thread's.
    index = None if device is None else device.index
    if index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    with ThreadPoolExecutor(min(len(noted), _processors())) as pool:
        count = sum(pool.map(_compile, noted, [index] * len(noted)))
    logger.info(
        "%d kernels: noted in %.1f s, compiled in %.1f s",
        count,
        found - began,
        time.perf_counter() - found,
    )
    return count


def _launches_of(rehearse: Callable[[], None]) -> list[Form]:
    """Every form of a kernel that ``rehearse`` would be the first to launch, once."""
    from triton import knobs

    noted: dict[tuple[int, str], Form] = {}
    rehearsing = threading.get_ident()

    # Triton asks this hook before it compiles, and leaves the launch out if the answer is True.
    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if threading.get_ident() != rehearsing:
            return False  # another engine of this process, which means what it launches
        kernel = fn.jit_function
        place = (id(kernel), str(key))
        if place not in noted:
            # Reads the kernel's source and that of all it calls, which threads had better not do.
            _ = kernel.cache_key
            noted[place] = (kernel, compile["specialization_data"])
        return True

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        try:
            rehearse()
        except Exception:
            logger.warning(
                "the rehearsal broke off; what it missed is compiled later", exc_info=True
            )
    return list(noted.values())


def _compile(form: Form, device: int | None) -> bool:
    """Compile one form and load it onto the GPU of this number; whether that went well."""
    kernel, specialization = form
    try:
        if device is not None:
            torch.cuda.set_device(device)
        compiled = kernel.preload(specialization)
        # What calls the kernel is made when it is first asked for.
        return compiled.run is not None
    except Exception:
        logger.warning("%s will be compiled at its first launch", kernel.__name__, exc_info=True)
        return False


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
