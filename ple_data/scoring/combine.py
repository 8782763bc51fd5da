"""Several rewards made one: each model's own are kept as they come, and s and s_prompt are made of them at the end.

One model is in memory at a time. Its rewards are units of the table `rewards` in a store of its own,
TARGET/.ple/rewards/<digest of its name>; then every unit of pairs is made of those of its unit, and committed once.
Every step goes on where it was killed, and several processes share its units.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pyarrow as pa

from ple_data.common.digests import text_digest
from ple_data.rewards import RewardModel
from ple_data.scoring.score import Opened, ScoreCounts, Units, checked, refuse_other_model, score_units, whole_units
from ple_data.storage.store import Shard, Store
from schemas.errors import DamagedError, UsageError
from schemas.options import Combination
from schemas.tables import KEY, RESTORE

Load = Callable[[], AbstractContextManager[RewardModel]]


def combined(how: Combination, s: np.ndarray, s_prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s and s_prompt of each pair from those of each reward, [pairs, rewards] → [pairs] twice, in float64.

    lexicographic: those of the first reward by which the pair's two responses differ by more than the tolerance, of the
    last one where there is none. So they are of one pair together, and no number of a response by itself.
    """
    if how.rule == "lexicographic":
        differ = np.abs(s_prompt - s) > how.tolerance
        differ[:, -1] = True
        decides = differ.argmax(axis=1)[:, None]
        return np.take_along_axis(s, decides, 1)[:, 0], np.take_along_axis(s_prompt, decides, 1)[:, 0]
    if how.rule == "min":
        return s.min(axis=1), s_prompt.min(axis=1)
    weights = np.array(how.weights) if how.rule == "weighted" else np.full(s.shape[1], 1 / s.shape[1])
    return (s * weights).sum(axis=1), (s_prompt * weights).sum(axis=1)


def scale_of(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a round's rewards in float64; 0 where all are the same."""
    return float(values.mean()), float(values.std()) if np.ptp(values) else 0.0


def score_together(
    store: Store, loads: Sequence[Load], how: Combination, *, round: int | None = None, output: Store | None = None
) -> ScoreCounts:
    """As `score`, by several reward models: each is loaded, scores what is there, and is let go.

    With `how.normalized`, a round becomes pairs when all of its responses are there. Raises what `score` does, and
    UsageError where the pairs in the target were made by other models or combined otherwise.
    """
    target = output or store
    shards = store.shards("responses", round=round)
    rounds = _rounds_left(target, shards)
    made: dict[str, Store] = {}
    for load in loads:
        _score_one(store, target, load, how, rounds, made, last=len(made) + 1 == len(loads))
    counts = score_units(store, target, _Combined(store, how, made), _CombinedUnits, round=round)
    if waiting := _rounds_left(target, store.shards("responses", round=round)):
        when = "when all of its responses are there" if how.normalized else "where all models have scored it"
        more = "rewards are kept; run ple-gen to its end, then this again"
        which = ", ".join(map(str, waiting))
        print(f"round {which} becomes pairs {when}: {more}", file=sys.stderr)
    return counts


def _rounds_left(target: Store, shards: Sequence[Shard]) -> list[int]:
    """The rounds of responses that are not pairs yet, or not all."""
    done = {number: whole_units(target, "pairs", number) for number in {shard.round for shard in shards}}
    return sorted({shard.round for shard in shards if shard.unit not in done[shard.round]})


def _score_one(
    store: Store, target: Store, load: Load, how: Combination, rounds: list[int], made: dict[str, Store], *, last: bool
) -> None:
    """The rewards of one model in its own store, which is added to `made`; the model is gone at the end."""
    with load() as model:
        if model.name in made:
            raise UsageError(f"--reward-model {model.name} is given twice; give each once")
        name = how.name([*made, model.name])
        refuse_other_model(target, name, begins=not last)  # before it is paid for
        made[model.name] = Store(target.inside(".ple", "rewards", text_digest(model.name)))
        for number in rounds:
            score_units(store, made[model.name], model, Units, round=number, kind="rewards")


class _Combined:
    """What stands in the place of a model when the rewards of all are there."""

    truncated, runs_on = 0, False

    def __init__(self, store: Store, how: Combination, made: dict[str, Store]) -> None:
        self.name, self.models = how.name(list(made)), list(made)
        self._store, self._how, self._made = store, how, list(made.values())
        self.scales: dict[int, list[tuple[float, float]]] = {}

    def ready(self, shard: Shard) -> bool:
        """Whether all that a unit of pairs is made of is there."""
        there = all(own.is_committed("rewards", shard.round, shard.unit) for own in self._made)
        return there and (not self._how.normalized or self._whole(shard.round))

    def _whole(self, number: int) -> bool:
        """Whether all of a round's responses are there and scored; its scales are taken then."""
        if number not in self.scales:
            shards = self._store.shards("responses", round=number)
            manifest = self._store.load_manifest(number)
            asked = manifest.rows if manifest else None
            sampled = asked is None or sum(shard.rows for shard in shards) >= asked
            if manifest and asked is None:
                sampled = 0 < self._store.finished_units("responses", number) <= len(shards)
            units = {shard.unit for shard in shards}
            if not sampled or any(units - own.committed("rewards", number) for own in self._made):
                return False
            self.scales[number] = [
                scale_of(np.concatenate([v for s in shards for v in _own(o, s)])) for o in self._made
            ]
        return True

    def score_each(self, jobs: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        for name, opened in jobs:
            yield name, self._of(opened)

    def _of(self, opened: Opened) -> tuple[np.ndarray, ...]:
        """s, s_prompt, and those of each model [pairs, models], as the models gave them."""
        keys = opened.table.select(KEY)
        own = [np.stack(arm, axis=1) for arm in zip(*(_own(o, opened.shard, keys) for o in self._made), strict=True)]
        scaled = own
        if self._how.normalized:
            mean, deviation = np.array(self.scales[opened.shard.round]).T
            scaled = [(arm - mean) * np.divide(1, deviation, where=deviation > 0, out=deviation * 0) for arm in own]
        return *combined(self._how, *scaled), *own


def _own(store: Store, shard: Shard, keys: pa.Table | None = None) -> list[np.ndarray]:
    """s and s_prompt of a unit by one model, in float64. Raises DamagedError where they are not of the rows `keys`."""
    found = store.read_record(store.record_path("rewards", shard.round, shard.unit))
    table = store.read(found, ["s", "s_prompt"] if keys is None else None)
    if keys is not None and not table.select(KEY).equals(keys):
        path = store.path("rewards", shard.round, shard.unit)
        raise DamagedError(f"{path}: its rows are not those of {shard.path}: {RESTORE}")
    return [np.asarray(table[arm], dtype=np.float64) for arm in ("s", "s_prompt")]


class _CombinedUnits(Units):
    """Units of pairs with the rewards of each model."""

    def job(self, opened: Opened) -> Any:
        return opened

    def added(self, opened: Opened, found: Any) -> dict[str, Any]:
        model = self.reward_model
        opened.provenance["reward_models"] = model.models
        if scales := model.scales.get(opened.shard.round):
            opened.provenance["reward_scales"] = scales
        s, s_prompt, *own = found
        lists = [pa.array(list(arm.astype(np.float32)), pa.list_(pa.float32())) for arm in own]
        return checked(opened, model.name, s, s_prompt) | dict(zip(("rewards", "rewards_prompt"), lists, strict=True))
