"""What a chapter's text repeats from its manifest is the manifest's own wording; it stays short."""

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMIT = 1800  # words of a chapter
CHAPTERS = [
    file.parent
    for file in sorted((ROOT / "chapters").glob("chapter*/chapter.toml"))
    if tomllib.loads(file.read_text(encoding="utf-8")).get("task")
]


def _plain(text: str) -> str:
    """Without marks and line breaks, in which a text and a manifest may differ."""
    return re.sub(r"\s+", " ", re.sub(r"[`*]", "", text)).strip()


def _prose(text: str) -> str:
    """What a reader reads from top to bottom.

    Left out are fenced blocks, folded parts, comments, where a link or a picture leads, and a
    table's bare figures. Headings, the words of tables and the captions of pictures count.
    """
    text = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*(`{3,})[^`\n]*\n.*?^\s*\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    rows = [re.sub(r"[^|]+", _cell, row) if row[:1] == "|" else row for row in text.split("\n")]
    return "\n".join(rows)


def _cell(cell):
    return cell[0] if re.search(r"[^\W\d_]", cell[0]) else " "


def _words(text: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in _prose(text).split())


def test_words_are_counted_as_a_reader_counts_them():
    text = """# Two words
One [link](https://example.org/a_b) and `code` - six | seven.
<!-- quote a:b -->
```python
not counted
```
<details><summary>Answer</summary>

not counted

</details>
| a | b |
|---|---|
| 1 | 2 |
"""
    assert _words(text) == 2 + 6 + 2


@pytest.mark.parametrize("folder", CHAPTERS, ids=lambda folder: folder.name)
def test_a_chapter_is_read_in_one_sitting(folder):
    words = _words((folder / "README.md").read_text(encoding="utf-8"))
    assert 1000 <= words <= LIMIT, f"{words} words, of {LIMIT} at most"


@pytest.mark.parametrize("folder", CHAPTERS, ids=lambda folder: folder.name)
def test_folded_hints_are_those_of_the_manifest(folder):
    manifest = tomllib.loads((folder / "chapter.toml").read_text(encoding="utf-8"))
    hints = [_plain(hint) for task in manifest["task"] for hint in task["hints"]]
    text = (folder / "README.md").read_text(encoding="utf-8")
    folded = re.findall(r"<summary>Hint[^<]*</summary>(.*?)</details>", text, flags=re.DOTALL)
    assert [_plain(hint) for hint in folded] == hints


def test_there_are_chapters():
    assert len(CHAPTERS) >= 3


def test_measured_tables_are_those_of_their_files():
    """Chapters 2 and 3; the others have tests of their own."""
    from chapters.chapter02_qwen3_model import results as second
    from chapters.chapter03_naive_attention import results as third

    content = json.loads(second.RESULT.read_text(encoding="utf-8"))
    for chapter, mark, table in (
        (second, "growth", second.table(content)),
        (third, "steps", third.steps_table()),
        (third, "forms", third.forms_table()),
    ):
        text = (chapter.FOLDER / "README.md").read_text(encoding="utf-8")
        command = f"run `python -m {chapter.__name__}`"
        assert f"<!-- {mark} -->\n{table}\n<!-- end of {mark} -->" in text, command
