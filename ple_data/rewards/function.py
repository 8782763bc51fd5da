"""A Python function as reward model: `file.py:function` or `module:function`.

The function is called with a list of x and a list of y and gives back one number for each. It runs in this process,
with its rights: name only code that you trust.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from ple_data.common.digests import text_digest
from ple_data.rewards import RewardModel
from schemas.errors import PleError, UsageError
from schemas.options import Rewards

ROWS_A_CALL = 256
"""Rows of one call where results are kept as they come: what a kill can cost."""


def load(spec: str, options: Rewards) -> "FunctionReward":
    """The function, imported."""
    return FunctionReward(spec)


def check(spec: str, options: Rewards | None = None) -> None:
    """Refuse a spec that is not of the form, or whose file is not there. Runs nothing. Raises UsageError."""
    location, _, function = spec.rpartition(":")
    if not location or not function.isidentifier():
        raise UsageError(f"reward model {spec!r}: expected file.py:function or module:function")
    if location.endswith(".py") and not os.path.isfile(location):
        raise UsageError(f"reward model {spec}: there is no file {Path(location).resolve()}")
    if location.endswith(".py"):
        text = Path(location).read_text(encoding="utf-8", errors="replace")
        if not re.search(rf"\b{function}\b|import \*", text):
            raise UsageError(f"reward model {spec}: {Path(location).resolve()} has no function {function!r}")


class FunctionReward(RewardModel):
    """The user's function. Its name carries the digest of the file that holds it, not of its imports."""

    def __init__(self, spec: str) -> None:
        check(spec)
        location, _, function = spec.rpartition(":")
        self._spec = spec
        if location.endswith(".py"):
            self._file = Path(location).resolve()
            module = self._load_file(self._file)
        else:
            module = self._load_module(location)
            self._file = Path(inspect.getfile(module)).resolve()
        self._function: Any = getattr(module, function, None)
        if not callable(self._function):
            raise UsageError(f"reward model {self._spec}: {self._file} has no function {function!r}")
        digest = text_digest(self._file.read_text(encoding="utf-8"))
        self.name = f"{Path(location).name}:{function}@{digest}"

    def score(self, rows: Sequence[tuple[str, str]]) -> list[float]:
        if not rows:
            return []
        with self._blame():
            result = self._function([x for x, _ in rows], [y for _, y in rows])
            values = list(result) if hasattr(result, "__iter__") and not isinstance(result, str | dict) else None
        if values is None or len(values) != len(rows):
            got = type(result).__name__ if values is None else f"{len(values)} rewards for {len(rows)} responses"
            raise PleError(
                f"reward function {self._spec} gave back {got}: expected a list of {len(rows)} numbers, one for each "
                "response, in order"
            )
        return [self._number(value, row) for row, value in enumerate(values)]

    def stream(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, float]]]:
        for start in range(0, len(rows), ROWS_A_CALL):
            yield list(enumerate(self.score(rows[start : start + ROWS_A_CALL]), start=start))

    def _number(self, value: Any, row: int) -> float:
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise PleError(
                f"reward function {self._spec} gave back {type(value).__name__} {str(value)[:80]!r} for "
                f"response {row}: expected a number"
            ) from None

    def _load_file(self, file: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"ple_reward_{file.stem}", file)
        assert spec  # a .py file always has a spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        with _first_on_path(file.parent), self._blame():
            spec.loader.exec_module(module)
        return module

    def _load_module(self, name: str) -> ModuleType:
        try:
            with _first_on_path(Path.cwd()), self._blame():
                module = importlib.import_module(name)
        except PleError as error:
            cause = error.__cause__  # the module itself, or a package above it
            if isinstance(cause, ModuleNotFoundError) and f"{name}.".startswith(f"{cause.name}."):
                raise UsageError(
                    f"reward model {self._spec}: there is no Python module {name!r} in the environment or in "
                    f"{Path.cwd()}, and no directory {self._spec!r}"
                ) from error
            raise
        if not getattr(module, "__file__", None):
            raise UsageError(f"reward model {self._spec}: the module {name!r} is not a Python file")
        return module

    @contextmanager
    def _blame(self) -> Iterator[None]:
        """Any exception of the user's code becomes an error that names its file and line; prints go to stderr."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            raise PleError(
                f"reward function {self._spec} raised {type(error).__name__}: {error} ({self._place(error)})"
            ) from error

    def _place(self, error: Exception) -> str:
        if isinstance(error, SyntaxError):
            return f"{error.filename}, line {error.lineno}"
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename) == getattr(self, "_file", None)]
        last = (own or frames)[-1]
        return f"{last.filename}, line {last.lineno}"


@contextmanager
def _first_on_path(directory: Path) -> Iterator[None]:
    """Let the user's file import its neighbours, as a script may."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))
