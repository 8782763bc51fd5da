"""The scoring stage: responses of a store become pairs, unit by unit, in the same store or in another.

A unit that is committed is never scored again; several processes share the units. No other model is in memory.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ple_data.common.digests import text_digest
from ple_data.common.finite import refuse_non_finite
from ple_data.common.progress import Progress
from ple_data.common.secrets import public
from ple_data.common.terminal import printable
from ple_data.rewards import RewardModel, as_read
from ple_data.storage.store import OWNER, Shard, Store, Waits
from schemas.errors import ClaimLostError, UsageError
from schemas.files import write_new
from schemas.leases import elsewhere
from schemas.tables import read_metadata


@dataclass
class ScoreCounts:
    """What one call of score() did; rows are pairs of responses."""

    units: int = 0
    rows: int = 0
    rows_done_before: int = 0
    rows_by_others: int = 0
    texts_cut: int = 0


def score(
    store: Store, reward_model: RewardModel, *, round: int | None = None, output: Store | None = None
) -> ScoreCounts:
    """Score every committed unit of responses (of one round, or of all) and commit it as pairs to `output`.

    `output` is `store` itself by default. Units that another process is scoring are waited for, and taken over if it
    dies. Raises UsageError where there are no responses or where the pairs there belong to another reward model, and
    PleError where a reward is NaN or infinite; the units before it stay committed.
    """
    return score_units(store, output or store, reward_model, Units, round=round)


def score_units(
    store: Store,
    target: Store,
    reward_model: Any,
    units: "type[Units]",
    *,
    round: int | None,
    kind: str = "pairs",
) -> ScoreCounts:
    """The stage itself, for what commits to the table `kind`: pairs, or the rewards of one model of several.

    reward_model: such a one, or what stands in its place and says which units are `ready`.
    """
    shards = store.shards("responses", round=round)
    if not shards:
        where = store.root if round is None else f"round {round} of {store.root}"
        raise UsageError(f"there are no responses in {where} to score: run ple-gen first")
    reward_model.name = refuse_other_model(target, reward_model.name)
    rounds = {shard.round for shard in shards}
    done = {number: whole_units(target, kind, number) for number in rounds}
    pending = [shard for shard in shards if shard.unit not in done[shard.round]]
    total = sum(shard.rows for shard in shards)
    counts = ScoreCounts(rows_done_before=total - sum(shard.rows for shard in pending))
    ready = getattr(reward_model, "ready", None)
    pending = [shard for shard in pending if ready is None or ready(shard)]
    cut_before = reward_model.truncated
    label = "score" if kind == "pairs" else f"score with {printable(reward_model.name)}"
    with Progress(label, total, "rows", done=counts.rows_done_before) as progress:
        progress.beside = getattr(reward_model, "state", progress.beside)
        waits = Waits(target, kind, progress.note)
        while pending:
            with closing(units(store, target, kind, reward_model, progress, counts)) as work:
                for name, rewards in reward_model.score_each(work.claimed(pending)):
                    work.commit(name, rewards)
            if not work.taken:
                waits.a_moment((shard.round, shard.unit) for shard in work.locked)
            pending = work.locked
        counts.texts_cut = reward_model.truncated - cut_before
        if counts.texts_cut:
            progress.note(
                f"{counts.texts_cut} texts are longer than the reward model takes: the beginning of x was cut"
            )
    for number in rounds:
        if store.finished_units("responses", number):  # some may have come meanwhile
            names = {shard.unit for shard in store.shards("responses", round=number)}
            if names <= whole_units(target, kind, number):
                target.finish(kind, number)
    for number, rows, asked in store.unfinished(shards) if kind == "pairs" else ():
        progress.note(
            f"warning: round {number} has {rows} of its {asked} pairs so far: run ple-gen to its end, then this again"
        )
    return counts


def whole_units(target: Store, kind: str, round: int) -> set[str]:
    """The units of a round that are committed, from one listing. Raises DamagedError where a file is gone or cut."""
    folder = target.path(kind, round, "unit").parent
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if folder.is_dir() else {}
    shards = target.shards(kind, round=round)
    for shard in shards:
        if sizes.get(shard.path.name) != shard.bytes:
            target.is_committed(kind, round, shard.unit)  # says what is wrong
    return {shard.unit for shard in shards}


@dataclass
class Opened:
    """A unit that is claimed: its rows, and the (x, y) of both arms."""

    shard: Shard
    claim: ExitStack
    table: pa.Table
    provenance: dict[str, Any]
    plain: list[tuple[str, str]]
    guided: list[tuple[str, str]]

    @property
    def distinct(self) -> list[tuple[str, str]]:
        """Each (x, y) once."""
        return list(dict.fromkeys(self.plain + self.guided))


@dataclass
class Units:
    """Claims units, and commits each when its rewards are there."""

    store: Store
    target: Store
    kind: str
    reward_model: Any
    progress: Progress
    counts: ScoreCounts
    locked: list[Shard] = field(default_factory=list)
    """Those that another process holds."""
    taken: int = 0
    _open: dict[str, Opened] = field(default_factory=dict)

    def claimed(self, pending: Sequence[Shard]) -> Iterator[tuple[str, Any]]:
        """The unit and what there is to do of each that is ours; it is claimed when it is asked for."""
        for at, shard in enumerate(pending):
            claim = ExitStack()
            if claim.enter_context(self.target.claim(self.kind, shard.round, shard.unit)):
                opened = self._begin(shard, claim)
                self.taken += 1
                yield f"unit {shard.unit} of round {shard.round}", self.job(opened)
                continue
            claim.close()
            if self.target.is_committed(self.kind, shard.round, shard.unit):
                self.counts.rows_by_others += shard.rows
                self.progress.advance(shard.rows)
                continue
            self.locked.append(shard)
            if len(self.locked) == 1:
                yield from self.claimed(elsewhere(pending[at + 1 :]))
                return

    def job(self, opened: Opened) -> Any:
        """What is to do of a unit: its (x, y) to score."""
        return opened.distinct

    def added(self, opened: Opened, rewards: Any) -> dict[str, Any]:
        """The columns that the responses get. Raises PleError for a reward that is no finite float32."""
        reward_of = dict(zip(opened.distinct, rewards, strict=True))
        arms = ([reward_of[pair] for pair in arm] for arm in (opened.plain, opened.guided))
        return checked(opened, self.reward_model.name, *arms)

    def commit(self, name: str, rewards: Any) -> None:
        """Write a unit's rows. Raises PleError for a reward that is no finite float32."""
        opened = self._open.pop(name)
        shard, table = opened.shard, opened.table
        with opened.claim:
            added = self.added(opened, rewards) | {"reward_model": [self.reward_model.name] * len(table)}
            pairs = pa.table({name: table[name] for name in table.column_names} | added)
            _own_pairs(self.target, self.reward_model)
            try:
                self.target.commit(self.kind, shard.round, shard.unit, pairs, opened.provenance)
            except ClaimLostError as error:
                self.progress.note(f"{error}: its rewards are left to them")
                self.locked.append(shard)
                return
        self.counts.units += 1
        self.counts.rows += shard.rows
        self.progress.advance(shard.rows)

    def close(self) -> None:
        """Give up the claims of units that are not done."""
        for opened in self._open.values():
            opened.claim.close()

    def _begin(self, shard: Shard, claim: ExitStack) -> Opened:
        table = self.store.read(shard)
        provenance = {**read_metadata(shard.path, "responses"), "reward_model": self.reward_model.name}
        x, y, y_prompt = (table[column].to_pylist() for column in ("x", "y", "y_prompt"))
        x = as_read(self.reward_model, x, chat=provenance.get("prompts") == "chat")
        plain, guided = list(zip(x, y, strict=True)), list(zip(x, y_prompt, strict=True))
        opened = Opened(shard, claim, table, provenance, plain, guided)
        self._open[f"unit {shard.unit} of round {shard.round}"] = opened
        return opened


def checked(opened: Opened, model: str, s: Any, s_prompt: Any) -> dict[str, np.ndarray]:
    """s and s_prompt as float32, one a row. Raises PleError where one is not finite."""
    with np.errstate(over="ignore"):  # a reward beyond float32 becomes infinite, and is refused as such
        arms = {arm: np.array(found, dtype=np.float32) for arm, found in (("s", s), ("s_prompt", s_prompt))}
    table = opened.table
    keys = zip(table["query_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
    refuse_non_finite(
        f"reward model {model} gave rewards that are not finite float32 numbers for {opened.shard.path}",
        (
            (f"query {query_id!r} sample {sample} {arm}", values[row])
            for row, (query_id, sample) in enumerate(keys)
            for arm, values in arms.items()
        ),
        "this unit was not committed; correct the reward model and run the same command again",
    )
    return arms


def refuse_other_model(target: Store, name: str, *, begins: bool = False) -> str:
    """The name under which the pairs of `target` are scored by this model. Raises UsageError where another scored them.

    begins: of several models put together, those are named that are known so far.
    """
    owner = target.reward_model()
    if owner is None:
        return name
    known, name = public(owner, text_digest), name.removesuffix(")") + ", " if begins else name
    if (begins and known.startswith(name)) or name in (known, owner):
        return owner  # older versions recorded an address with what in its path may be a key
    raise UsageError(
        f"the pairs in {target.root} were scored by {owner}, not by {name}{'...)' * begins}: two reward "
        "models are never mixed in one store; give another store with --output"
    )


def _own_pairs(target: Store, reward_model: Any) -> None:
    """Make `target` this model's before the first commit: of two that start at once, one is refused."""
    record = target.inside(*OWNER.parts)
    if not record.exists():
        write_new(record, reward_model.name + "\n", target.root / ".ple" / "tmp")
    reward_model.name = refuse_other_model(target, reward_model.name)
