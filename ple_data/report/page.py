"""`ple report RUN`: puts the page together and writes it, atomically, with the figures as PNG files beside it.

The page holds everything (style, script, figures, text) and asks for nothing: a content security policy forbids every
load, and every script but the one whose hash it names. Model text reaches it through templates that escape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ple_data.judge.page import csp_hash
from ple_data.report.browse import PAGE
from ple_data.report.pairs import SHOWN_PAIRS, sample_pairs, visible
from ple_data.report.section import Section
from ple_data.report.sections import sections
from ple_data.report.sources import Sources
from ple_data.rewards import shown_spec
from schemas.files import refuse_outside, write_atomic
from schemas.options import PairObjectives, Safeguards, flag
from schemas.recipe import Recipe
from schemas.tables import STORED

if TYPE_CHECKING:
    from jinja2 import Template

ASSETS = Path(__file__).parent / "assets"


def report(
    run: Path,
    *,
    evals: tuple[Path, ...] = (),
    judges: tuple[Path, ...] = (),
    purity: Path | None = None,
    cases: Path | None = None,
    output: Path | None = None,
    tau0: float | None = None,
    alpha: float | None = None,
) -> str:
    """Write the report of a run (or of a bare DATA directory) and give its path.

    `purity`: RUN/purity where it is there. `output`: RUN/report.html; the PNG files go to `report-figures/` beside it,
    and older ones that this page does not draw are removed from there. `tau0` and `alpha`: those of the recipe, else
    the paper's; where they are given, pairs are shown in sets although a baseline has none. The same files give the
    same bytes.
    Raises UsageError (no such run or file), DamagedError (one that does not read), PleError (not writable).
    """
    sources = Sources(Path(run), evals, judges, purity, cases, tau0, alpha)
    parts = sections(sources)
    page = render(sources, parts)
    path = Path(output) if output else Path(run) / "report.html"
    folder = path.parent / f"{path.stem}-figures"
    images = {folder / f"{chart.name}.png": chart.png for part in parts for chart in part.charts}
    refuse_outside(path.parent, folder)
    for image, content in images.items():
        write_atomic(image, content)
    for old in set(folder.glob("*.png")) - images.keys():
        old.unlink()
    write_atomic(path, page)
    return str(path)


def render(sources: Sources, parts: list[Section], rounds: Sequence[int] | None = None) -> str:
    """The page; with the `rounds` that have pairs it is the live one, whose pairs are read from the server."""
    live = rounds is not None
    script = (ASSETS / ("live.js" if live else "report.js")).read_text(encoding="utf-8")
    return template("report.html").render(
        title=visible("/".join(sources.root.resolve().parts[-2:]).strip("/")),
        facts=_facts(sources),
        parts=parts,
        live=live,
        rounds=rounds,
        page_size=PAGE,
        pairs=[] if live else sample_pairs(sources.store.scan("pairs"), sources.tau0, sources.alpha),
        sets=sources.sets,
        all_pairs=sum(shard.rows for shard in sources.store.shards("pairs")),
        limit=SHOWN_PAIRS,
        cases=sources.cases.queries if sources.cases else [],
        case_rewards=[sources.reward_models[name] for name in sources.cases.reward_models] if sources.cases else [],
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=csp_hash(script),
    )


@cache
def template(name: str) -> Template:
    """A template of the page, which escapes what it is given."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    look = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=FileSystemLoader(ASSETS), **look).get_template(name)  # type: ignore[arg-type]


def _facts(sources: Sources) -> list[tuple[str, str]]:
    """What was run, in a few words each."""
    rows: dict[str, Any] = {}
    shards = sources.store.shards("pairs")
    rows["pairs"] = f"{sum(shard.rows for shard in shards)} in {len({shard.round for shard in shards})} rounds"
    if now := under_way(sources):
        rows["under way"] = now
    if sources.recipe:
        recipe = sources.recipe
        rows |= {"model": recipe.model, "queries": recipe.queries, "principle": recipe.principles}
        if recipe.reward_models:
            rows["reward model"] = ", ".join(map(shown_spec, recipe.reward_models))
            if len(recipe.reward_models) > 1:
                rows["reward model"] += f" ({recipe.score.combine}{', normalized' * recipe.score.normalize_rewards})"
        elif recipe.reward:
            rows["reward model"] = f"{recipe.reward.model}, trained"
        rows["method"] = sources.method + _settings(recipe)
        rows["learning rate"] = f"{(recipe.baseline or recipe.train).learning_rate:g}"
        rows["seed"] = str(recipe.seed)
    if sources.sets:
        rows["threshold"] = f"τ_t = {sources.tau0:g} · {sources.alpha:g}^t"
    return [(name, visible(value)) for name, value in rows.items()]


def under_way(sources: Sources) -> str:
    """How far the last round is that lacks pairs, and the stage that has not ended; nothing where all is done."""
    store = sources.store
    words = []
    for manifest in map(store.read_manifest, store.manifest_paths()[-1:]):
        kinds = {kind: sum(shard.rows for shard in store.shards(kind, round=manifest.round)) for kind in STORED[:2]}
        sampled, scored = max(kinds.values()), kinds["pairs"]
        if manifest.rows and scored < manifest.rows:
            words.append(f"round {manifest.round}: {sampled} of {manifest.rows} sampled, {scored} scored")
    last = sources.stages[-1] if sources.stages else None
    if last and last["exit_code"] is None:
        t = last["round"]
        words.append(f"{last['stage']}{'' if t is None else f' of round {t}'} is running, or was killed")
    return "; ".join(words)


def _settings(recipe: Recipe) -> str:
    """In what the objective departs from its defaults: " with ...", or nothing."""
    if recipe.baseline:
        return ""
    words = []
    for one in (*PairObjectives.in_order(), *Safeguards.in_order()):
        value = getattr(recipe.train, one.name)
        if value != one.default and one.name != "objective":
            words.append(flag(one) + ("" if value is True else f" {value}"))
    return f" with {', '.join(words)}" if words else ""
