"""What of the docs is made from the code: docs/options.md, and the picture of the rooms, docs/architecture.svg.

    python docs/make.py

A test compares both with what this makes. Starts nothing and imports nothing heavy.
"""

import ast
import sys
from dataclasses import MISSING
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from schemas import options  # noqa: E402
from schemas.options import Options, about, flag, is_repeated  # noqa: E402

COMMANDS: dict[str, type[Options]] = {
    "ple-gen": options.Gen, "ple-score": options.Score, "ple-train": options.Train, "ple sft": options.Sft,
    "ple reward": options.Reward, "ple run": options.Run, "ple eval": options.Evaluate, "ple cases": options.Cases,
    "ple judge": options.Judge, "ple purity": options.Purity, "ple report": options.Report,
    "ple inspect": options.Inspect, "ple export": options.Export, "ple verify": options.Verify,
    "ple baseline sft": options.BaselineSft, "ple baseline context-distillation": options.ContextDistillation,
    "ple baseline raft": options.Baseline, "ple baseline dpo": options.Dpo, "ple baseline ppo": options.Ppo,
    "ple import": options.Import, "ple push": options.Push, "ple convert": options.Convert, "ple demo": options.Demo,
}  # fmt: skip
INTRODUCTION = """\
# Options

Made from `schemas/options` by `docs/make.py`: change them there. `ple COMMAND --help` says the same.

An option with ⚙ is machine-only: it does not change what is learned or sampled, beyond rounding. It may change between
two starts of the same output. All others must stay. An option that an older output does not know counts as its default.
In a recipe the keys of a stage are the options of its command with `_` for `-` ([recipe.md](recipe.md)).
"""


def options_page() -> str:
    """Markdown: a table a command."""
    parts = [INTRODUCTION]
    for command, kind in COMMANDS.items():
        rows = ["| option | default | what |", "| --- | --- | --- |"]
        for known in kind.in_order():
            told = about(known)
            if told.offered:
                name = (told.metavar or known.name.upper()) if told.positional else flag(known)
                mark = " ⚙" if told.machine else ""
                rows.append(f"| `{name}`{mark} | {_default(known)} | {told.help.replace('|', chr(92) + '|')} |")
        parts.append("\n".join([f"## {command}", "", *rows]))
    return "\n\n".join(parts) + "\n"


def _default(known: object) -> str:
    value = known.default  # type: ignore[attr-defined]
    if value is MISSING:
        return "required"
    if value in (None, (), ""):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" + ("…" if is_repeated(known) else "")  # type: ignore[arg-type]


# The rooms


def modules() -> dict[str, Path]:
    """Every module of the product."""
    files = [path for layer in ("schemas", "ple_data", "ple_train") for path in (ROOT / layer).rglob("*.py")]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in named.items()} | {"cli": ROOT / "cli.py"}


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of the product that a file imports, anywhere but for types alone, or names as `module:function`."""
    found: set[str] = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.Constant) and ":" in str(node.value):
            found.add(str(node.value).partition(":")[0])
    return found & known


def _nodes(tree: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            found += [node, *_nodes(node)]
    return found


def room(module: str) -> str:
    """A package of a layer, or a module that lies beside them; `schemas` and `cli` are one each."""
    parts = module.split(".")
    return parts[0] if parts[0] in ("schemas", "cli") or len(parts) == 1 else ".".join(parts[:2])


def arrows() -> dict[str, set[str]]:
    """By room: the rooms that it imports."""
    known = modules()
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        others = {room(name) for name in imports(path, set(known))} - {room(module)}
        found.setdefault(room(module), set()).update(others)
    return {name: found[name] - {"ple_data", "ple_train"} for name in found if name not in ("ple_data", "ple_train")}


def floors() -> dict[str, int]:
    """By room: 0 where it imports no other, else one above the highest of them. Raises ValueError in a circle."""
    below = arrows()

    @cache
    def floor(name: str, path: tuple[str, ...] = ()) -> int:
        if name in path:
            raise ValueError(f"a circle: {' -> '.join([*path, name])}")
        return max((1 + floor(other, (*path, name)) for other in below[name]), default=0)

    return {name: floor(name) for name in below}


WIDTH, ROW, BOX, GAP = 1180, 74, 30, 16
SPANS = {"ple_data": (0, 680), "ple_train": (640, 1180), "schemas": (0, 1180), "cli": (0, 1180)}
"""Where the rooms of a layer stand, from left to right."""


def nearest() -> dict[str, set[str]]:
    """By room: the rooms that it imports, but for those that it also reaches by way of another one."""
    below = arrows()

    @cache
    def reached(name: str) -> frozenset[str]:
        return frozenset(below[name]).union(*(reached(other) for other in below[name]))

    return {
        name: {other for other in others if not any(other in reached(way) for way in others)}
        for name, others in below.items()
    }


def picture() -> str:
    """SVG: a row a floor, the lowest at the bottom; a line from a room up to those that import it."""
    level = floors()
    height = 20 + ROW * (max(level.values()) + 1)
    place: dict[str, tuple[float, float, float]] = {}
    for at in range(max(level.values()) + 1):
        for layer, (left, right) in SPANS.items():
            names = sorted(name for name in level if level[name] == at and name.partition(".")[0] == layer)
            widths = [20 + 7.4 * len(_short(name)) for name in names]
            x = (left + right - sum(widths) - GAP * (len(names) - 1)) / 2
            for name, width in zip(names, widths, strict=True):
                place[name] = (x, height - ROW * (at + 1), width)
                x += width + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for name, others in sorted(nearest().items()):
        parts += [_line(place[other], place[name]) for other in sorted(others)]
    parts += [_box(name, *place[name]) for name in sorted(place)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _short(name: str) -> str:
    return name.partition(".")[2] or name


def _line(low: tuple[float, float, float], high: tuple[float, float, float]) -> str:
    x, y, width = low
    to_x, to_y, to_width = high
    return (
        f'<line x1="{x + width / 2:.0f}" y1="{y:.0f}" x2="{to_x + to_width / 2:.0f}" y2="{to_y + BOX:.0f}" '
        'stroke="#8a8a8a" stroke-width="1"/>'
    )


COLOURS = {"schemas": "#fdf3d6", "ple_data": "#dcebf7", "ple_train": "#e3f1df", "cli": "#f3e2ef"}


def _box(name: str, x: float, y: float, width: float) -> str:
    colour = COLOURS[name.partition(".")[0]]
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX}" rx="5" fill="{colour}" stroke="#555"/>'
        f'<text x="{x + width / 2:.0f}" y="{y + 20:.0f}" text-anchor="middle">{_short(name)}</text>'
    )


MADE = {"options.md": options_page, "architecture.svg": picture}


if __name__ == "__main__":
    for name, make in MADE.items():
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")
