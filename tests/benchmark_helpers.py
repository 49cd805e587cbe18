"""What the tests of the benchmarks share: a model that runs in a millisecond, and report checks."""

import json
from pathlib import Path
from xml.etree import ElementTree

from helpers import save_checkpoint, tiny_qwen3


def small_model(folder: Path) -> str:
    """A random checkpoint whose context is long enough for the benchmarks' workloads."""
    return str(save_checkpoint(tiny_qwen3(max_position_embeddings=1024), folder))


def read_report(file: Path) -> dict:
    """A report, which says where, with what, when and by which command it was made."""
    report = json.loads(file.read_text(encoding="utf-8"))
    for name in ("device", "versions", "date", "command"):
        assert report[name], name
    assert report["versions"]["torch"]
    return report


def texts_of(picture: str) -> str:
    """All text of an SVG, which must be well-formed, of a size, and without a background."""
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("svg") and float(root.get("width")) > 0
    width, height = (float(root.get(name)) for name in ("width", "height"))
    for element in root.iter():
        if element.tag.endswith("rect"):
            assert float(element.get("x")) + float(element.get("width")) <= width
            assert float(element.get("width")) < width and float(element.get("height")) < height
    return "\n".join(filter(None, (element.text for element in root.iter())))
