"""The question to a language model, from a template, and the verdict in its answer. Asks nobody.

A template is a text with the placeholders {query}, {response_1} and {response_2}; a judge ends its answer with [[1]],
[[2]] or [[tie]]. All are put in at once, so that a response that contains a placeholder stays what it is.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import UsageError
from schemas.files import read_given_text

PLACEHOLDERS = ("query", "response_1", "response_2")
VERDICTS = ("[[1]]", "[[2]]")
_PLACEHOLDER = re.compile(r"\{([a-z_0-9]+)\}")
_VERDICT = re.compile(r"\[\[\s*(1|2|tie)\s*\]\]", re.IGNORECASE)


@dataclass(frozen=True)
class Template:
    """A checked template."""

    text: str

    def render(self, query: str, response_1: str, response_2: str) -> str:
        """The question, the first response shown as number 1."""
        values = dict(zip(PLACEHOLDERS, (query, response_1, response_2), strict=True))
        return _PLACEHOLDER.sub(lambda found: values[found.group(1)], self.text)


def load_template(path: Path | None = None) -> Template:
    """The template in a UTF-8 file, or the one that comes with the program. Raises UsageError with every fault."""
    text = read_given_text(path or Path(__file__).parent / "pairwise.txt", "template")
    found = set(_PLACEHOLDER.findall(text))
    faults = [f"{{{name}}} is missing" for name in PLACEHOLDERS if name not in found]
    faults += [f"{{{name}}} is unknown" for name in sorted(found - set(PLACEHOLDERS))]
    faults += [f"it does not ask for the verdict {verdict}" for verdict in VERDICTS if verdict not in text]
    if faults:
        raise UsageError(
            f"template {path}: {'; '.join(faults)}: a template holds {{query}}, {{response_1}} and {{response_2}} and "
            "asks the judge to end with [[1]], [[2]] or [[tie]]"
        )
    return Template(text)


def preference(answer: str) -> str | None:
    """The verdict in a judge's answer, 1, 2 or tie; None where it holds none, or two that differ."""
    found = {match.lower() for match in _VERDICT.findall(answer)}
    return found.pop() if len(found) == 1 else None
