"""How the demo looks: progress bars, text that is streamed and wrapped, the table at the end.

On a terminal bars move and text appears word by word. In a log or a pipe each bar is one line, printed when its work is
done, and no control characters are written.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

MAX_WIDTH = 88
LABEL_WIDTH = 28
NOTE_WIDTH = 13
TABLE_LABEL_WIDTH, TABLE_VALUE_WIDTH = 34, 14


class OnProgress(Protocol):
    """Reports how far a piece of work is, with a word on how it goes where the bar has room for one."""

    def __call__(self, num_done: int, num_total: int, note: str = "", /) -> None: ...


class WrappedStream:
    """Writes text as it comes, wrapped at words and indented. A word appears when what follows it is known."""

    def __init__(self, console: Console, indent: int) -> None:
        self._console = console
        self._margin = " " * indent
        self._room = console.width - indent
        self._column = 0
        self._spaces = ""
        self._word = ""

    def write(self, text: str) -> None:
        for char in text:
            if char == "\n":
                self._flush_word()
                self._new_line()
            elif char in " \t":
                self._flush_word()
                self._spaces += " "
            elif unicodedata.category(char) != "Cc":  # a model may say anything; a terminal must not obey it
                self._word += char
                if cell_len(self._word) >= self._room:
                    self._flush_word()

    def close(self) -> None:
        self._flush_word()
        if self._column:
            self._new_line()

    def _flush_word(self) -> None:
        if not self._word:
            return
        text = self._spaces + self._word
        if self._column and self._column + cell_len(text) > self._room:
            self._new_line()
            text = self._word
        self._emit(text if self._column else self._margin + text)
        self._column += cell_len(text)
        self._spaces = self._word = ""

    def _new_line(self) -> None:
        self._emit("\n")
        self._column, self._spaces = 0, ""

    def _emit(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class SecondsColumn(ProgressColumn):
    """Elapsed time as "1.2 s"."""

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        return Text(f"{elapsed or 0.0:5.1f} s", style="cyan")


class Screen:
    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.console.width = min(self.console.width, MAX_WIDTH)

    def line(self, text: str = "", style: str = "") -> None:
        self.console.print(Text(text, style=style))

    @contextmanager
    def bar(self, title: str, has_note: bool = False) -> Iterator[OnProgress]:
        """Shows a progress bar around a piece of work, which may report how far it is, and how it goes."""
        note_width = NOTE_WIDTH + 1 if has_note else 0
        columns = [
            TextColumn(f"  {title:<{LABEL_WIDTH}}"),
            BarColumn(bar_width=max(10, self.console.width - LABEL_WIDTH - 22 - note_width)),
            TextColumn("{task.fields[count]:>7}"),
            SecondsColumn(),
        ]
        if has_note:
            columns.insert(3, TextColumn(f"{{task.fields[note]:>{NOTE_WIDTH}}}"))
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=None, count="", note="")

            def on_progress(num_done: int, num_total: int, note: str = "", /) -> None:
                count = f"{num_done}/{num_total}"
                progress.update(task, completed=num_done, total=num_total, count=count, note=note)

            yield on_progress
            total = progress.tasks[0].total or 1
            progress.update(task, completed=total, total=total)

    @contextmanager
    def paragraph(self, title: str) -> Iterator[WrappedStream]:
        """A heading and, under it, text that may arrive in pieces."""
        self.line()
        self.line(title, style="bold")
        stream = WrappedStream(self.console, indent=2)
        try:
            yield stream
        finally:
            stream.close()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows of a label and values; a row with only a label is a heading."""
        self.line(" " * TABLE_LABEL_WIDTH + "".join(f"{name:>{TABLE_VALUE_WIDTH}}" for name in columns), "bold")
        for label, *values in rows:
            if values:
                cells = "".join(f"{value:>{TABLE_VALUE_WIDTH}}" for value in values)
                self.line(f"{'    ' + label:<{TABLE_LABEL_WIDTH}}{cells}".rstrip())
            else:
                self.line(f"  {label}", "bold")
