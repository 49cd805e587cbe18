"""minivllm: an LLM inference engine built chapter by chapter.

``LLM`` and ``SamplingParams`` are imported when they are first used, so that importing this package
costs nothing, and so that it works cut off after any chapter.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minivllm.engine.outputs import RequestOutput
    from minivllm.engine.sampling_params import SamplingParams
    from minivllm.llm import LLM, LLMEngine

# Our kernels count on it that a product and a sum are rounded once where the chip can do so. Triton
# 3.9 wants that said, and later ones would round twice.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

__version__ = "0.1.0"
__all__ = ["LLM", "LLMEngine", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "minivllm.llm",
    "LLMEngine": "minivllm.llm",
    "RequestOutput": "minivllm.engine.outputs",
    "SamplingParams": "minivllm.engine.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
