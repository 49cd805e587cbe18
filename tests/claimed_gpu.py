"""A GPU of compute capability 9.0 that is only claimed to be there: importing this claims it.

For scripts in processes of their own. Kernels are compiled and "loaded"; a launch is only noted.
"""

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched: list[str] = []
loaded: list[str] = []


class Launcher:
    def __init__(self, source, metadata):
        self.name = source.name

    def __call__(self, *arguments):
        launched.append(self.name)


class Utils:
    def load_binary(self, name, *arguments):
        loaded.append(name)
        return 1, 2, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}


class Claimed:
    launcher_cls = Launcher
    utils = Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Claimed())
