"""What a section of the page is made of: words, charts and tables. All text is plain; the template escapes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ple_data.common.terminal import shorten
from ple_data.report import svg
from ple_data.report.pairs import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 40
"""Columns of a name in a table."""


@dataclass(frozen=True)
class Chart:
    """A drawn figure: its name (of ids and of the PNG file), what stands above and below it, and what its numbers say
    about this run."""

    name: str
    title: str
    caption: str
    svg: str
    figure: Figure
    says: str = ""

    @property
    def png(self) -> bytes:
        with svg.style():
            return svg.to_png(self.figure)


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is a heading of its row. `note` stands below; `folded`: shown on request."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    folded: bool = False


@dataclass
class Section:
    """A heading with what stands below it, in this order: `words`, charts, tables, and a word on what is missing."""

    id: str
    title: str
    words: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def draw(self, name: str, title: str, caption: str, figure: Figure, says: str = "") -> None:
        described = f"{caption} {says}".rstrip()
        self.charts.append(Chart(name, title, caption, svg.to_svg(figure, name, title, described), figure, says))


def label(text: str, width: int = 20) -> str:
    """A name from a file, short and visible; in a picture it has 20 columns."""
    return shorten(visible(text), width)


def side(source: str) -> str:
    """One side of a comparison: the name of an evaluation's policy, else a path, of which the end counts."""
    text = visible(source.rpartition("#label=")[2])
    return shorten(text[::-1], WIDE)[::-1]
