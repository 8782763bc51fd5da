"""House rules that a program can check: how long a file and the whole may be, how much a function may ask for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_imports import sources

FILE_LINES = 450
ALL_LINES = 24_400
"""Of Python in the product. Raised from 15,535 for what is refused in words of every model and file (docs/safety.md),
and from 16,600 for eight objectives, their kept reference, KL and on-policy distillation (docs/objectives.md), from
20,000 for chat models as they are, rewards as people have them, the hub and a live report, from 23,800 for what tells
a server's model from another, outlives a server's end (docs/scale.md), and refuses or mends what a second reading of
both found, from 24,300 for rows that leave a batch."""
PARAMETERS = 8


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def public_functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, number of parameters without self or cls) of each public function, method and constructor of a file."""
    return _functions(ast.parse(path.read_text()), name(path), in_class=False)


def _functions(tree: ast.AST, where: str, *, in_class: bool) -> Iterator[tuple[str, int]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_") or node.name == "__init__":
                static = "staticmethod" in map(ast.unparse, node.decorator_list)
                yield f"{where}: {node.name}", _parameters(node.args) - (in_class and not static)
        elif isinstance(node, ast.ClassDef):
            if not node.name.startswith("_"):
                yield from _functions(node, f"{where}: {node.name}", in_class=True)
        elif not isinstance(node, ast.expr):
            yield from _functions(node, where, in_class=in_class)  # in an `if` or `try`


def _parameters(arguments: ast.arguments) -> int:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len(named) + (arguments.vararg is not None) + (arguments.kwarg is not None)


COUNTED = """
class A:
    def f(self, a, /, b, *c, d, **e): ...
    @staticmethod
    def g(a): ...
    def _h(self, a): ...
class _B:
    def f(self): ...
if True:
    async def h(a, b=1):
        def inner(c): ...
"""


def test_parameters_are_counted():
    found = dict(_functions(ast.parse(COUNTED), "x", in_class=False))
    assert found == {"x: A: f": 5, "x: A: g": 1, "x: h": 2}


@pytest.mark.parametrize("path", sources(), ids=name)
def test_no_file_is_long(path):
    assert lines(path) <= FILE_LINES


def test_no_public_function_asks_for_much():
    found = [(where, count) for path in sources() for where, count in public_functions(path)]
    assert [(where, count) for where, count in found if count > PARAMETERS] == []


def test_the_product_is_not_long(record_property):
    total = sum(map(lines, sources()))
    record_property("product lines", total)
    print(f"{total:,} lines of Python in the product, at most {ALL_LINES:,}")
    assert total <= ALL_LINES


def test_tests_lie_where_the_product_does():
    rooms = {path.parent.relative_to(ROOT) for path in sources()} | {
        Path(name) for name in ("benchmarks", "faults", "hostile", "scale")
    }
    laid = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert laid <= rooms
