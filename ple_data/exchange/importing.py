"""`ple import`: preferences of other tools become a store, which training and scoring read as any other.

Every row is read and checked before the first is written. Then units are claimed and committed as in sampling: killed
anywhere, the same command goes on, and several share the work. Nothing is sampled or scored.
"""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from ple_data.common.digests import digests_of, json_digest, policy_name, text_digest
from ple_data.common.models import check_model, load_config, load_tokenizer, refuse_unknown, vocabulary_of
from ple_data.common.progress import Progress
from ple_data.common.secrets import public
from ple_data.common.tokens import ids_after
from ple_data.exchange.preferences import read_pairs
from ple_data.inputs.chat import X, stored_chat
from ple_data.inputs.principles import Form, render_all
from ple_data.inputs.templates import instructed, rendered, response_form, uses_chat
from ple_data.sampling.plan import default_unit_size, package_versions
from ple_data.sampling.terms import said
from ple_data.storage.store import OWNER, Store, Waits
from schemas.errors import UsageError, first_line
from schemas.files import write_new
from schemas.options import Import
from schemas.records import RoundManifest
from schemas.tables import ARMS


def import_pairs(options: Import) -> None:
    """Commit the rows of `files` to `data` as round `round`: as responses, and as pairs where they have scores.

    y is the rejected response, y_prompt the chosen one. The policy and, unless `scored_by` names it, the reward model
    are called `imported`, with a digest of the files. Raises UsageError for a faulty row, a round that was begun
    otherwise, or pairs of another reward model there.
    """
    form = _Tokens(options)
    rows, sources, left_out = read_pairs(options.files, chat=form.chat, refused=form.refused)
    rows = rows.with_columns(pl.int_range(pl.len()).over("x").alias("sample"))
    store, scored = Store(options.data), rows["s"].count() > 0
    policy = f"imported@{json_digest([source.digest for source in sources])}"
    judge = (options.scored_by or policy) if scored else None
    if judge:
        _refuse_other_model(store, judge)
    identity = {"policy": policy, "principle": None, "round": options.round, "samples": 1, **form.identity}
    identity |= {"scored": scored, "unit_size": default_unit_size(len(rows), store.load_manifest(options.round))}
    files = [{"file": _public(source.name), "sha256": source.digest} for source in sources]
    _freeze(store, RoundManifest(round=options.round, settings=identity, counts={"queries_taken": len(rows)}), files)
    provenance: dict[str, Any] = {"policy": policy, "imported": files, "packages": package_versions(), **said(options)}
    provenance |= {"prompts": "chat"} if form.chat else {}
    if judge:
        write_new(store.inside(*OWNER.parts), f"{judge}\n", store.root / ".ple" / "tmp")
        _refuse_other_model(store, judge)
        provenance["reward_model"] = judge
    kinds = ("responses", "pairs") if scored else ("responses",)
    units = [rows[start : start + identity["unit_size"]] for start in range(0, len(rows), identity["unit_size"])]
    todo = {f"{at:05d}-{json_digest([identity, unit.rows()])}": unit for at, unit in enumerate(units)}
    alike = {"round": options.round, "policy": policy, "principle": "", "seed": 0, "reward_model": judge or ""}
    with Progress("import", len(rows), "rows") as progress:
        waits = Waits(store, kinds[-1], progress.note)
        while todo:
            for name in list(todo):
                made = partial(form.table, todo[name], alike)
                if _commit(store, kinds, (options.round, name), made, provenance):
                    progress.advance(len(todo.pop(name)))
            if todo:
                waits.a_moment((options.round, name) for name in todo)
        for kind in kinds:
            store.finish(kind, options.round)
        what = f"pairs scored by {judge}" if judge else "pairs of responses without scores: ple-score gives them some"
        below = rows.filter(pl.col("s_prompt") < pl.col("s")).height
        odd = f"; of {below} the chosen response has the lower score" if below else ""
        odd += f"; {left_out} rows left out, whose dialogue goes on after the answer" if left_out else ""
        progress.note(f"{len(rows)} {what}, in round {options.round} of {store.root}{odd}")


def _commit(
    store: Store, kinds: Sequence[str], unit: tuple[int, str], make: Callable[[], pa.Table], provenance: dict[str, Any]
) -> bool:
    """Commit what is missing of a unit; False where another process holds some of it."""
    missing = [kind for kind in kinds if not store.is_committed(kind, *unit)]
    with ExitStack() as stack:
        ours = [kind for kind in missing if stack.enter_context(store.claim(kind, *unit))]
        table = make() if ours else None
        for kind in ours:
            store.commit(kind, *unit, table, provenance)
    return all(store.is_committed(kind, *unit) for kind in kinds)


@dataclass
class _Tokens:
    """How the rows become token ids: by the model's tokenizer, as in sampling."""

    options: Import

    def __post_init__(self) -> None:
        options = self.options
        check_model(options.model, quantized=True)
        self.tokenizer = instructed(load_tokenizer(options.model, options.revision, note=_say), options)
        self.chat = uses_chat(self.tokenizer, options.prompt_format)
        self.response = response_form(self.tokenizer, options.prompt_format)
        self.vocabulary = vocabulary_of(load_config(options.model, options.revision))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What of it decides the rows."""
        weights = digests_of(policy_name(self.options.model, None, self.options.revision))
        return {"model": weights, "prompts": "chat" if self.chat else "plain", **said(self.options)}

    def refused(self, x: X) -> str | None:
        """Why a query is not for the model, where it is not."""
        if isinstance(x, str):
            return None
        if not self.chat:
            return (
                "its prompt is messages, and prompts are plain texts here (no chat template, or --prompt-format plain)"
            )
        try:
            rendered(self.tokenizer, x)
        except Exception as error:  # a template may raise anything
            return f"the chat template refuses its prompt ({first_line(error)})"
        return None

    def table(self, unit: pl.DataFrame, alike: Mapping[str, Any]) -> pa.Table:
        """The rows in the columns of pairs, and of responses. alike: columns that are the same in all rows."""
        xs = unit["x"].to_list()
        queries: list[X] = [(stored_chat(x) if self.chat else None) or x for x in xs]
        x_ids = render_all(self.tokenizer, queries, how=Form(self.options.prompt_format))
        columns: dict[str, Any] = unit.to_dict(as_series=False)
        columns |= {"query_id": [text_digest(x) for x in xs], "x_ids": x_ids}
        for arm in ARMS:
            ids = ids_after(self.tokenizer, x_ids, columns[arm], self.response.lead)
            columns |= {f"{arm}_ids": [[*own, self.response.end] for own in ids]}
            columns |= {f"{arm}_finish": ["stop"] * len(xs), f"{arm}_empty": [not y.strip() for y in columns[arm]]}
        every = itertools.chain(x_ids, *(columns[f"{arm}_ids"] for arm in ARMS))
        refuse_unknown(every, self.vocabulary, self.options.model)
        return pa.table(columns | {name: [value] * len(xs) for name, value in alike.items()})


def _public(name: str) -> str:
    """A file's name without its folder, which is this machine's; a hub dataset's whole name."""
    return Path(name).name if Path(name).exists() else name


def _freeze(store: Store, ours: RoundManifest, files: list[dict[str, str]]) -> None:
    """Freeze the round's settings at its first start; later starts must have the same."""
    theirs = store.save_manifest(ours.model_copy(update={"notes": {"imported": files}}))
    if differences := ours.differences(theirs, {}):
        raise UsageError(
            f"round {ours.round} of {store.root} was begun otherwise, by ple-gen, with other files or another "
            f"tokenizer ({'; '.join(differences)}); give another --round or another DATA"
        )


def _refuse_other_model(store: Store, judge: str) -> None:
    """Raise UsageError where the pairs of a store are another reward model's."""
    owner = store.reward_model()
    if owner is not None and judge not in (owner, public(owner, text_digest)):
        raise UsageError(
            f"the pairs in {store.root} were scored by {owner}, not by {judge}: two reward models are never mixed in "
            "one store; give another DATA, or the same name with --scored-by where it was the same model"
        )


def _say(message: str) -> None:
    print(f"import: {message}", file=sys.stderr, flush=True)
