"""The course: one folder a chapter, and the machine that makes everything else from the code.

``minivllm/`` is the only copy of the code. A chapter's ``chapter.toml`` names what the chapter adds
and which of its functions are exercises; ``python -m chapters`` makes the rest from that.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def quote(ref: str, part: str = "all") -> str:
    """The source text of a definition, for notebooks.

    ref: ``file:name`` such as ``minivllm/layers/layernorm.py:rms_norm``, ``file:Class``,
    ``file:Class.method`` or a whole ``file``, relative to the repository.
    part: ``all``, ``signature`` (with the docstring) or ``body`` (without it).
    Raises ValueError if there is no such file or definition.
    """
    from chapters.machine.texts import quoted

    return quoted(ROOT, ref, part)
