"""How much memory this process has taken of the host at most."""

from __future__ import annotations

import sys


def peak_host_bytes() -> int | None:
    """The most bytes this process ever held in memory; None where nobody counts (Windows).

    Pages of a mapped checkpoint count while they are held, whoever else holds them too.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            for line in status:
                # Not the resource module's figure: there, what the process held that started this
                # one counts too.
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In KiB, on macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
