"""Reads what a run directory (or a bare data directory) and the measuring commands left. Draws and counts nothing.

What is not there is None or empty; what is there and does not read is an error that names the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ple_data.common.secrets import public
from ple_data.report.pairs import clipped, visible
from ple_data.storage.store import Store, collect, scan_files
from schemas.errors import DamagedError, UsageError, first_line
from schemas.files import explained
from schemas.json_text import parse_json
from schemas.options import Threshold
from schemas.options.objectives import OBJECTIVE_KINDS
from schemas.recipe import load_recipe
from schemas.records import Record, read_record
from schemas.reports import EvalReport, JudgeReport, PurityReport
from schemas.tables import read_metadata, read_table

if TYPE_CHECKING:
    import polars as pl

R = TypeVar("R", bound=Record)

_ROUND = re.compile(r"round=(\d+)")


@dataclass(frozen=True)
class Cases:
    """By query, in the file's order: x, kind (or None) and answers, each with label, y, a note for people and its
    rewards, which are in the order of `reward_models`. `trained`: those of them that trained a policy.
    """

    queries: list[dict[str, Any]]
    reward_models: list[str]
    trained: list[str]


@dataclass(frozen=True)
class RewardModel:
    """A reward model of the page: R1, R2, ..., what stands over its rewards, and a sentence that says which it is."""

    short: str
    title: str
    legend: str


class Sources:
    """What the report is made from. `metrics`: the trainer's table by round; `evals`, `judges`: (name, record).

    `sets`: tau_t (tau0 * alpha**t) puts pairs into two sets, and the page shows them.
    """

    def __init__(
        self,
        root: Path,
        evals: tuple[Path, ...] = (),
        judges: tuple[Path, ...] = (),
        purity: Path | None = None,
        cases: Path | None = None,
        tau0: float | None = None,
        alpha: float | None = None,
    ) -> None:
        """`tau0`, `alpha`: those of the recipe, else the paper's; where they are given, a baseline's page has sets too.

        Raises UsageError where `root` is neither a run nor a data directory, or a named directory lacks its file.
        """
        if not root.is_dir():
            raise UsageError(f"{root}: no such directory; give the RUN of ple run, or a DATA directory")
        is_run = (root / "recipe.yaml").is_file() or (root / "data").is_dir()
        self.root, self.store = root, Store(root / "data" if is_run else root)
        if not is_run and not self.store.shards("pairs") and not self.store.shards("responses"):
            raise UsageError(f"{root}: neither a run (recipe.yaml, data/) nor a data directory with committed rows")
        self.recipe = load_recipe(root / "recipe.yaml") if (root / "recipe.yaml").is_file() else None
        self.stages, self.metrics = _stages(root / "stages.json"), _metrics(root)
        self.evals = [(path.name, _record(EvalReport, path / "eval.json", "ple eval")) for path in evals]
        self.judges = [(path.name, _record(JudgeReport, path / "judge.json", "ple judge")) for path in judges]
        if purity is None and (root / "purity" / "purity.json").is_file():
            purity = root / "purity"
        self.purity = _record(PurityReport, purity / "purity.json", "ple purity") if purity else None
        self.cases = _cases(cases / "cases.parquet") if cases else None
        threshold = self.recipe or Threshold()
        self.tau0 = threshold.tau0 if tau0 is None else tau0
        self.alpha = threshold.alpha if alpha is None else alpha
        self.sets = self.has_rank_set or tau0 is not None or alpha is not None

    @property
    def method(self) -> str:
        """How the run trains: PLE or another objective, perhaps without a term of it, or a baseline, by its name."""
        if not self.recipe:
            return "PLE"
        if self.recipe.baseline:
            return self.recipe.baseline.method
        train = self.recipe.train
        name = "PLE" if train.objective == "ple" else train.objective
        return f"{name} without {train.without}" if train.without else name

    @property
    def knows_sets(self) -> bool:
        """Whether the run's method has a rank set and a weighted-SFT set, or had both before one was left out."""
        recipe = self.recipe
        return not recipe or (recipe.baseline is None and OBJECTIVE_KINDS[recipe.train.objective].sets)

    @property
    def by_eq6(self) -> bool:
        """Whether the run trains by the paper's printed loss."""
        return not self.recipe or (self.recipe.baseline is None and self.recipe.train.objective == "ple")

    @property
    def has_rank_set(self) -> bool:
        """Whether tau_t parts the pairs."""
        return self.knows_sets and not (self.recipe and self.recipe.train.without == "rank")

    @property
    def use_of_sets(self) -> list[str]:
        """In what the run's method departs from the two sets that the page shows, in words; nothing for PLE."""
        if not self.knows_sets:
            return ["it knows no τ_t and no sets"]
        if not self.has_rank_set:
            return ["it has no rank set, and so no τ_t"]
        words = []
        if self.recipe and self.recipe.train.objective == "ple-residual":
            words.append("the page shows pairs by their margin, and the loss parts them by what is left of it")
        if self.recipe and self.recipe.train.without == "wsft":
            words.append("pairs in the weighted-SFT set teach nothing")
        return words

    @cached_property
    def reward_models(self) -> dict[str, RewardModel]:
        """Those of evaluations and cases, by name, with whether they trained: marked there, or the pairs' own."""
        uses = [use for _, report in self.evals for use in report.reward_models]
        names, marked = [use.name for use in uses], {use.name for use in uses if use.trained}
        if self.cases:
            names += self.cases.reward_models
            marked |= set(self.cases.trained)
        own = set(collect(self.store.scan("pairs").select("reward_model").unique())["reward_model"])
        own |= set(self.store.reward_models())
        found = {}
        for place, name in enumerate(dict.fromkeys(names), start=1):
            origin = "which scored the pairs of this run" if name in own else ""
            origin = "which trained a policy" if name in marked else origin
            said = origin or "not marked as having trained a policy"
            legend = f"R{place}: reward by {visible(public(name))}, {said}."
            found[name] = RewardModel(f"R{place}", f"R{place}{' (trained)' if origin else ''}", legend)
        return found


def _record(model: type[R], path: Path, command: str) -> R:
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; {command} --output {path.parent} writes it")
    return read_record(model, path)


def _stages(path: Path) -> list[dict[str, Any]]:
    """The records of `ple run`: stage, round, start, end, seconds, exit_code."""
    if not path.is_file():
        return []
    try:
        stages = parse_json(path.read_text(encoding="utf-8"))["stages"]
        return [{name: stage[name] for name in ("stage", "round", "seconds", "exit_code")} for stage in stages]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: not a record of stages ({error}): move it away to leave the times out") from error


def _metrics(root: Path) -> dict[int, pl.DataFrame]:
    """The trainer's metrics by round, from RUN/metrics, else from the policy's own directory."""
    from polars.exceptions import PolarsError

    found = [*root.glob("policy/round=*/metrics.parquet"), *root.glob("metrics/round=*.parquet")]
    places = [(_ROUND.search(str(path.relative_to(root))), path) for path in found]
    tables = {}
    for t, path in sorted({int(place[1]): path for place, path in places if place}.items()):
        try:
            with explained(path, "read"):
                tables[t] = scan_files([path]).collect()
        except (PolarsError, OSError) as error:
            raise DamagedError(
                f"{path}: not a readable table ({first_line(error)}): move it away to leave it out"
            ) from error
        if not {"step", "loss"} <= set(tables[t].columns):
            raise DamagedError(f"{path}: no training metrics (it has no step and loss): move it away to leave it out")
    return tables


def _cases(path: Path) -> Cases:
    """Raises DamagedError where the file is missing, is no table of cases or does not name its reward models."""
    found = read_metadata(path, "cases")
    names = found.get("reward_models", [])
    by_query: dict[str, dict[str, Any]] = {}
    for row in read_table(path, "cases").to_pylist():
        if len(row["rewards"]) != len(names):
            raise DamagedError(
                f"{path}: {len(row['rewards'])} rewards of {len(names)} reward models: run ple cases again"
            )
        case: dict[str, Any] = {"x": clipped(row["x"]), "kind": row["kind"] and visible(row["kind"]), "answers": []}
        by_query.setdefault(row["query_id"], case)["answers"].append(
            {
                "label": visible(row["label"]),
                "y": clipped(row["y"]),
                "note": f"{row['tokens']} tokens, {row['finish']}",
                "rewards": [f"{reward:.3g}" for reward in row["rewards"]],
            }
        )
    return Cases(list(by_query.values()), names, found.get("trained_with", []))
