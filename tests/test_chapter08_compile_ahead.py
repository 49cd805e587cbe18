"""Kernels compiled ahead: on a machine without a GPU, for one that is only claimed to be there."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: Triton must not run in its interpreter, and its driver is replaced.
CLAIM = """
import logging, torch, triton
import triton.language as tl
from claimed_gpu import Utils, launched, loaded

from minivllm.engine.compile_ahead import compile_ahead


@triton.jit(do_not_specialize=["n"])
def twice(x_ptr, n, BLOCK: tl.constexpr, GAIN: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    if GAIN is not None:
        x *= GAIN
    tl.store(x_ptr + at, x * 2, mask=at < n)


@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), no_such_name)


x = torch.zeros(64)
"""

SCRIPTS = {
    "what was rehearsed is compiled, loaded, and not launched": """
def work():
    for n in (3, 16, 64):
        twice[(1,)](x, n, BLOCK=64, GAIN=None)
    twice[(1,)](x, 64, BLOCK=32, GAIN=0.5)


assert compile_ahead(work) == 2
assert sorted(loaded) == ["twice", "twice"] and launched == []
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **form: compiled.append(form)
work()
assert launched == ["twice"] * 4 and compiled == [] and len(loaded) == 2
assert compile_ahead(work) == 0 and launched == ["twice"] * 8
twice[(1,)](x, 1, BLOCK=16, GAIN=None)
assert len(compiled) == 1, "the hook would have seen a kernel that was not ready"
""",
    "a kernel that cannot be compiled is left to its launch": """
logging.disable()


def work():
    broken[(1,)](x, BLOCK=16)
    twice[(1,)](x, 5, BLOCK=64, GAIN=None)


assert compile_ahead(work) == 1 and loaded == ["twice"]
try:
    work()
except triton.CompilationError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("broken was launched")
""",
    "tiles of float32 fit into the shared memory of any GPU": """
from minivllm.engine.skinny_kernels import skinny_product

Utils.get_device_properties = lambda self, device: {"max_shared_mem": 99 << 10}
x, weight = torch.zeros(32, 1024), torch.zeros(64, 1024)
out = torch.zeros(1, 32, 32)
options = {"block_n": 32, "block_k": 256, "slices": 4}
assert compile_ahead(lambda: skinny_product(weight, x, out, silu=True, **options)) == 1
""",
    "threads compile for the GPU that was meant": """
chosen = []
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 3
torch.cuda.set_device = chosen.append
for device in (None, torch.device("cuda"), torch.device("cuda:1")):
    block = 16 << len(chosen)
    assert compile_ahead(lambda: twice[(1,)](x, 5, BLOCK=block, GAIN=None), device) == 1
assert chosen == [3, 3, 1]
""",
    "another thread's launches take place": """
import threading


def work():
    twice[(1,)](x, 5, BLOCK=64, GAIN=None)
    other = threading.Thread(target=lambda: twice[(1,)](x, 5, BLOCK=32, GAIN=None))
    other.start()
    other.join()


assert compile_ahead(work) == 1 and launched == ["twice"]
""",
    "a rehearsal that breaks off is no misfortune": """
logging.disable()


def work():
    twice[(1,)](x, 5, BLOCK=64, GAIN=None)
    raise RuntimeError("no room")


assert compile_ahead(work) == 1 and loaded == ["twice"]
twice[(1,)](x, 5, BLOCK=64, GAIN=None)
assert launched == ["twice"], "launches take place again"
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_compile_ahead(name: str, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CLAIM + SCRIPTS[name], encoding="utf-8")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FP_FUSION" not in done.stderr, "how to round is said in minivllm/__init__.py"
