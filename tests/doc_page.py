"""Code blocks of a Markdown page: `blocks` lists them, and `python tests/doc_page.py PAGE` runs the Python ones.

The Python blocks of a page run in order and share their names, as a reader would type them. Where a block with the
language `output` follows, it is exactly what the code before it prints. Errors name the page and the line.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=ticks)[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int  # of the block's first line of text
    is_adjacent: bool  # nothing but white space lies between the block before and this one


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    end = 0
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        is_adjacent = end > 0 and not text[end : match.start()].strip()
        yield Block(match["info"].strip(), match["text"], line, is_adjacent)
        end = match.end()


def run_python_blocks(page: Path) -> int:
    """Runs the page's Python blocks and returns how many there were. Raises on an error or on unexpected output."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    count, printed = 0, ""
    for block in blocks(page):
        if block.language == "python":
            out = io.StringIO()
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            printed = out.getvalue()
            count += 1
        elif block.language == "output":
            if not block.is_adjacent:
                raise ValueError(f"{page}:{block.line}: output does not follow a Python block")
            if printed != block.text:
                raise AssertionError(f"{page}:{block.line}: got\n{printed}\nexpected\n{block.text}")
    return count


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


if __name__ == "__main__":
    print(run_python_blocks(Path(sys.argv[1])), "blocks")
