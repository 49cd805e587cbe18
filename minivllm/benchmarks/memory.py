"""How much memory this process has taken of the host at most."""

from minivllm.distributed.host_memory import peak_host_bytes

__all__ = ["peak_host_bytes"]
