"""Reads what a run directory (or a bare data directory) and the measuring commands left. Draws and counts nothing.

What is not there is None or empty; what is there and does not read is an error that names the file.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ple_data.report.cases import Cases, read_cases
from ple_data.report.reward_models import RewardModel, numbered
from ple_data.storage.store import Store, collect
from schemas.errors import DamagedError, UsageError
from schemas.recipe import Recipe, load_recipe
from schemas.records import Record, read_record
from schemas.reports import EvalReport, JudgeReport, PurityReport

if TYPE_CHECKING:
    import polars as pl

R = TypeVar("R", bound=Record)

_ROUND = re.compile(r"round=(\d+)")


@dataclass(frozen=True)
class Sources:
    """What the report is made from. `metrics`: the trainer's table by round; `evals`, `judges`: (name, record)."""

    root: Path
    store: Store
    recipe: Recipe | None
    stages: list[dict[str, Any]]
    metrics: dict[int, pl.DataFrame]
    evals: list[tuple[str, EvalReport]]
    judges: list[tuple[str, JudgeReport]]
    purity: PurityReport | None
    cases: Cases | None

    @property
    def method(self) -> str:
        """How the run trains: PLE, PLE without a term of Eq. 6, or a baseline by its name."""
        if self.recipe and self.recipe.baseline:
            return self.recipe.baseline.method
        without = self.recipe and self.recipe.train.without
        return f"PLE without {without}" if without else "PLE"

    @cached_property
    def reward_models(self) -> dict[str, RewardModel]:
        """Those of evaluations and cases, by name, with whether they trained: marked there, or the pairs' own."""
        uses = [use for _, report in self.evals for use in report.reward_models]
        names, marked = [use.name for use in uses], {use.name for use in uses if use.trained}
        if self.cases:
            names += self.cases.reward_models
            marked |= set(self.cases.trained)
        return numbered(names, marked, self._own_reward_models())

    def _own_reward_models(self) -> set[str]:
        """Those that the pairs name."""
        return set(collect(self.store.scan("pairs").select("reward_model").unique())["reward_model"])

    @property
    def has_sets(self) -> bool:
        """Whether tau_t puts pairs into two sets: not in a baseline, and not without the rank term."""
        return not self.recipe or (self.recipe.baseline is None and self.recipe.train.without != "rank")


def read_sources(
    root: Path, evals: tuple[Path, ...], judges: tuple[Path, ...], purity: Path | None, cases: Path | None
) -> Sources:
    """Raises UsageError where `root` is neither a run nor a data directory, or a named directory lacks its file."""
    if not root.is_dir():
        raise UsageError(f"{root}: no such directory; give the RUN of ple run, or a DATA directory")
    is_run = (root / "recipe.yaml").is_file() or (root / "data").is_dir()
    store = Store(root / "data" if is_run else root)
    if not is_run and not store.shards("pairs") and not store.shards("responses"):
        raise UsageError(f"{root}: neither a run (recipe.yaml, data/) nor a data directory with committed rows")
    recipe = load_recipe(root / "recipe.yaml") if (root / "recipe.yaml").is_file() else None
    if purity is None and (root / "purity" / "purity.json").is_file():
        purity = root / "purity"
    return Sources(
        root=root,
        store=store,
        recipe=recipe,
        stages=_stages(root / "stages.json"),
        metrics=_metrics(root),
        evals=[(path.name, _record(EvalReport, path / "eval.json", "ple eval")) for path in evals],
        judges=[(path.name, _record(JudgeReport, path / "judge.json", "ple judge")) for path in judges],
        purity=_record(PurityReport, purity / "purity.json", "ple purity") if purity else None,
        cases=read_cases(cases / "cases.parquet") if cases else None,
    )


def _record(model: type[R], path: Path, command: str) -> R:
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; {command} --output {path.parent} writes it")
    return read_record(model, path)


def _stages(path: Path) -> list[dict[str, Any]]:
    """The records of `ple run`: stage, round, start, end, seconds, exit_code."""
    if not path.is_file():
        return []
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return [{name: stage[name] for name in ("stage", "round", "seconds", "exit_code")} for stage in stages]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: not a record of stages ({error}): move it away to leave the times out") from error


def _metrics(root: Path) -> dict[int, pl.DataFrame]:
    """The trainer's metrics by round, from RUN/metrics, else from the policy's own directory."""
    import polars as pl
    from polars.exceptions import ComputeError

    paths: dict[int, Path] = {}
    for path in [*root.glob("policy/round=*/metrics.parquet"), *root.glob("metrics/round=*.parquet")]:
        if place := _ROUND.search(str(path.relative_to(root))):
            paths[int(place[1])] = path
    tables = {}
    for t, path in sorted(paths.items()):
        try:
            table = pl.read_parquet(path)
        except (ComputeError, OSError) as error:
            first_line = str(error).splitlines()[0]
            raise DamagedError(f"{path}: not a readable table ({first_line}): move it away to leave it out") from error
        if "step" not in table.columns or "loss" not in table.columns:
            raise DamagedError(f"{path}: no training metrics (it has no step and loss): move it away to leave it out")
        tables[t] = table
    return tables
