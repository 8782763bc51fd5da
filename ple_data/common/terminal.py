"""Text of models and users made fit for a terminal: control characters escaped, lines wrapped by display width.

All that a command prints goes through `guarded`, whoever writes it.
"""

import re
import sys
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from itertools import zip_longest
from typing import Any

from ple_data.common.secrets import strike

WIDTH, LONGEST_LINE = 100, 2000
"""Columns of what commands print, and characters of a line on stderr at most."""
_COLOURS, _CURSOR_UP = re.compile(r"\x1b\[[0-9;]*m"), "\x1b[A"


@contextmanager
def guarded() -> Iterator[None]:
    """Let all that is written to stdout and stderr meanwhile be printable and without secrets, whoever writes it.

    A line on stderr has at most LONGEST_LINE characters. What is for programs goes to `sys.stdout.buffer`, as it is.
    """
    out, err = _Guard(sys.stdout), _Guard(sys.stderr, longest=LONGEST_LINE)
    with redirect_stdout(out), redirect_stderr(err), ExitStack() as ends:
        ends.callback(out.end)
        ends.callback(err.end)
        yield


class _Guard:
    """A text stream that makes harmless what is written to it, line by line: what comes in parts waits for its end. A
    bar that is drawn anew begins with a carriage return and does not wait. longest: of a line, where it is for people.
    """

    def __init__(self, stream: Any, longest: int | None = None) -> None:
        self._stream, self._longest = stream, longest
        self._begun, self._lock = "", threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if name == "buffer" and self._longest:
            raise AttributeError("what is written here is text, so that it can be made harmless")
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lock:
            if text and not text.replace(_CURSOR_UP, ""):
                self._stream.write(text)
            elif text[:1] == "\r":  # it draws over what was begun
                self.end()
                self._stream.write("\r" + self._harmless(text[1:]))
            else:
                lines, newline, self._begun = (self._begun + text).rpartition("\n")
                if newline:
                    self._stream.write(self._harmless(lines) + newline)
        return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        self.write("".join(texts))

    def end(self) -> None:
        """Write what was begun and has no end."""
        begun, self._begun = self._begun, ""
        if begun:
            self._stream.write(self._harmless(begun))

    def _harmless(self, text: str) -> str:
        lines = strike(_COLOURS.sub("", text)).split("\n")
        lines = ["\t".join(map(printable, line.split("\t"))) for line in lines]
        harmless = "\n".join(cut(line, self._longest) if self._longest else line for line in lines)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return harmless.encode(encoding, "backslashreplace").decode(encoding)


def cut(text: str, most: int) -> str:
    """The text, or its beginning and how much more there is, in at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 40]}... ({len(text) - most + 40} more characters)"


def printable(text: str) -> str:
    r"""The text in one line that no terminal obeys: whatever is not printable is escaped (`\n`, `\x1b`, `\u202e`).

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def display_width(text: str) -> int:
    """Columns that a terminal gives the text: two for wide East Asian characters, none for combining marks."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces, or inside a word that is longer than a line.

    Nothing but the spaces at which it is broken is lost; an empty text is one empty line.
    """
    lines = [""]
    for word in text.split(" "):
        glued = f"{lines[-1]} {word}" if lines[-1] else word
        if display_width(glued) <= width:
            lines[-1] = glued
            continue
        pieces = _pieces(word, width)
        lines = lines + pieces if lines[-1] else lines[:-1] + pieces
    return lines


def _pieces(word: str, width: int) -> list[str]:
    pieces = [""]
    for character in word:
        if display_width(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def shown(text: str) -> str:
    """The text as `printable` gives it; white space alone is said to be empty."""
    return printable(text) if text.strip() else f"(empty: {text!r})"


def clipped(text: str, width: int, most: int) -> list[str]:
    """The text's wrapped lines, or the first of them and how many more there are, `most` in all."""
    lines = wrap(text, width)
    return lines if len(lines) <= most else [*lines[: most - 1], f"... ({len(lines) - most + 1} more lines)"]


def shorten(text: str, width: int) -> str:
    """The text, or its beginning and an ellipsis, in at most `width` columns."""
    return text if display_width(text) <= width else _pieces(text, width - 3)[0] + "..."


def side_by_side(columns: Sequence[list[str]], width: int) -> list[str]:
    """Columns of lines of at most `width` columns each, with bars between them."""
    return [
        " | ".join(cell + " " * (width - display_width(cell)) for cell in cells).rstrip()
        for cells in zip_longest(*columns, fillvalue="")
    ]


def text_table(header: Sequence[Any], rows: Sequence[Sequence[Any]], *, left: int = 0) -> list[str]:
    """Lines of columns under their header: the first `left` of them on the left, the others on the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(display_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        gaps = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
        padded = [cell + gap if at < left else gap + cell for at, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return lines
