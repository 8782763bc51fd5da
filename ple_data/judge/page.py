"""The annotation page: one HTML file that compares blindly, loads nothing and runs nothing but its own script. And the
same comparisons as tasks for Label Studio.

Texts go in as JSON in which no character can end the script element, and are shown as text only. Which side is A is
not in the page: it follows from a seed (`Item.first_is_a`). The page swaps the sides of some queries, others for each
annotator, so that a habit of one side is no agreement between people.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ple_data.common.digests import json_digest
from ple_data.inputs.chat import readable
from ple_data.judge.sources import Pair, draw

_SLOT = re.compile(r"%([A-Z_]+)%")
_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Item:
    """One comparison as the page holds it, before the page swaps any sides."""

    pair: Pair
    first_is_a: bool

    def shown(self) -> dict[str, str]:
        """All that a page holds of it."""
        first, second = (self.pair.a, self.pair.b) if self.first_is_a else (self.pair.b, self.pair.a)
        return {"id": self.pair.query_id, "x": readable(self.pair.x), "first": first, "second": second}


def arrange(pairs: Sequence[Pair], seed: int) -> list[Item]:
    """The pairs in a random order, each with a random side first; both follow from (seed, query id)."""
    shuffled = sorted(pairs, key=lambda pair: draw(seed, "order", pair.query_id))
    return [Item(pair, bool(draw(seed, "side", pair.query_id)[0] & 1)) for pair in shuffled]


def page_digest(items: Sequence[Item]) -> str:
    """Digest of what the page shows, in its order."""
    return json_digest([item.shown() for item in items])


def render_page(items: Sequence[Item]) -> str:
    """The page as HTML text."""
    style, script = resource("page.css"), resource("page.js")
    data = {"page": page_digest(items), "items": [item.shown() for item in items]}
    slots = {
        "SCRIPT_HASH": csp_hash(script),
        "STYLE_HASH": csp_hash(style),
        "SCRIPT": script,
        "STYLE": style,
        "DATA": json.dumps(data, ensure_ascii=False).translate(_ESCAPED),
    }
    return _SLOT.sub(lambda found: slots[found.group(1)], resource("page.html"))


def studio_tasks(items: Sequence[Item]) -> str:
    """Tasks for Label Studio as a JSON list; `page` and `query_id` say later to which comparison an answer belongs.

    label_studio.xml is the labelling page. Its Pairwise tag knows no tie, so a choice for ties stands beside it.
    prompt, answer1 and answer2 are the names of https://labelstud.io/templates/generative-pairwise-human-preference.
    """
    page = page_digest(items)
    names = {"prompt": "x", "answer1": "first", "answer2": "second", "query_id": "id"}
    shown = [item.shown() for item in items]
    rows = [{"data": {name: texts[own] for name, own in names.items()} | {"page": page}} for texts in shown]
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


def resource(name: str) -> str:
    """A text file that comes with the judge."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def csp_hash(text: str) -> str:
    """As a Content-Security-Policy names an inline element (https://www.w3.org/TR/CSP3/#match-element-to-source-list)."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
