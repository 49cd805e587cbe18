"""How much memory this process has taken of the host at most."""

from __future__ import annotations

import sys


def peak_host_bytes() -> int | None:
    """The most bytes this process ever held in memory; None where nobody counts (Windows).

    Pages of a mapped checkpoint count while they are held, whoever else holds them too.
    """
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
