"""matplotlib figures → SVG for an HTML page in both colour themes, and PNG for everywhere else.

Every colour of a figure is one of `PALETTE`; in the SVG it becomes a CSS variable of the same name, so that the page
decides what it looks like on light, on dark and on paper. The same figure always gives the same bytes.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = {
    "paper": "#ffffff",
    "ink": "#1f2430",
    "muted": "#5b6472",
    "grid": "#d9dde3",
    "blue": "#1f6fb2",
    "orange": "#c2510a",
    "green": "#1b7f4c",
    "purple": "#7b3fa6",
}
"""Colours on white (the PNG files); the page's style sheet has those on dark."""


@contextmanager
def style() -> Iterator[None]:
    """Figures made inside have the report's look."""
    import matplotlib.style

    look = Path(__file__).parent / "assets" / "report.mplstyle"
    with matplotlib.style.context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """An `<svg>` element with a title and a description for those who do not see it; its ids begin with `name`.

    Everything has its place from then on: the layout is not made again for another file of the figure.
    """
    import matplotlib

    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{variable})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    head = (
        f'<svg class="chart" {box[0]} role="img" aria-labelledby="{name}-title {name}-desc" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">\n'
        f' <title id="{name}-title">{html.escape(title)}</title>\n'
        f' <desc id="{name}-desc">{html.escape(description)}</desc>\n'
    )
    return head + text[text.index(">") + 1 :].strip()


def to_png(figure: Figure) -> bytes:
    """The figure on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
