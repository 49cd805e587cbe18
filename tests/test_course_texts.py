"""What a chapter's text repeats from its manifest is the manifest's own wording."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = [
    file.parent
    for file in sorted((ROOT / "chapters").glob("chapter*/chapter.toml"))
    if tomllib.loads(file.read_text(encoding="utf-8")).get("task")
]


def _plain(text: str) -> str:
    """Without marks and line breaks, in which a text and a manifest may differ."""
    return re.sub(r"\s+", " ", re.sub(r"[`*]", "", text)).strip()


@pytest.mark.parametrize("folder", CHAPTERS, ids=lambda folder: folder.name)
def test_folded_hints_are_those_of_the_manifest(folder):
    manifest = tomllib.loads((folder / "chapter.toml").read_text(encoding="utf-8"))
    hints = {_plain(hint) for task in manifest["task"] for hint in task["hints"]}
    text = (folder / "README.md").read_text(encoding="utf-8")
    folded = re.findall(r"<summary>Hint[^<]*</summary>(.*?)</details>", text, flags=re.DOTALL)
    # A text may leave the hints to `python -m chapters hint`; what it shows must not drift.
    assert {_plain(hint) for hint in folded} <= hints
    assert folded or "-m chapters hint" in text


def test_there_are_chapters():
    assert len(CHAPTERS) >= 3
