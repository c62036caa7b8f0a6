"""Examples in pages of docs/, as a reader would try them: those under ``<!-- tested -->``, in the order of the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Example", "examples"]

_MARK = re.compile(r"<!-- tested(?:: (?P<how>[^>]*?))? -->\n```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """``status``: what it ends with; ``needs``: a program that it needs."""

    language: str
    text: str
    line: int
    status: int = 0
    needs: str = ""


def examples(page: str) -> Iterator[Example]:
    """Raises ValueError for a mark that is none."""
    for match in _MARK.finditer(page):
        how = match["how"] or ""
        status = re.fullmatch(r"exit (\d+)", how)
        yield Example(match["language"], match["text"], page.count("\n", 0, match.start()) + 1,
                      int(status[1]) if status else 0, "" if status else how)
    if page.count("<!-- tested") != len(_MARK.findall(page)):
        raise ValueError("a mark without a block of code below it")
