"""Plain, short terminal output: wrapped to the window, coloured only where a person looks."""

import os
import shutil
import sys
import textwrap
from typing import TextIO

_CODES = {"green": "32", "red": "31", "yellow": "33", "bold": "1", "dim": "2"}


class Screen:
    """Writes lines to ``stream`` (standard output unless given)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty()
        self.coloured = self.is_terminal and not os.environ.get("NO_COLOR")
        self.width = min(shutil.get_terminal_size((88, 24)).columns, 88)

    def paint(self, text: str, *styles: str) -> str:
        """``text`` in these styles, or as it is where there is no terminal."""
        if not self.coloured or not text:
            return text
        codes = ";".join(_CODES[style] for style in styles)
        return f"\x1b[{codes}m{text}\x1b[0m"

    def line(self, text: str = "") -> None:
        print(text, file=self.stream)

    def paragraph(self, text: str, indent: int = 0, *styles: str) -> None:
        """``text`` wrapped and indented; a blank line in it begins a new paragraph."""
        margin = " " * indent
        for part in text.strip().split("\n\n"):
            wrapped = textwrap.wrap(
                " ".join(part.split()), max(self.width - indent, 20), break_long_words=False
            )
            for row in wrapped:
                self.line(margin + self.paint(row, *styles) if styles else margin + row)
