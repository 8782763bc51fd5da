"""All pairs of a store, fifty at a time: filtered and ordered by polars over the shards, and what the model was asked.

A page reads the columns that its filters need, streamed, then the texts of its own rows. Writes nothing.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate, groupby
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from ple_data.partition import partition, tau_of
from ple_data.report.pairs import LENGTHS, LONGEST_TEXT, SHOWN, card, visible
from ple_data.report.sources import Sources
from ple_data.storage.store import Shard, collect, scan_files
from schemas import tables
from schemas.errors import DamagedError, PleError, UsageError
from schemas.tables import ARMS, KEY

PAGE = 50
_COLUMNS = [*KEY, *(name for name in SHOWN if name not in ("margin", "set", "tau")), *(f"{arm}_ids" for arm in ARMS)]
Tokens = Annotated[int | None, Field(ge=0, le=2**31)]


class Wanted(BaseModel):
    """Which pairs are asked for. Margins and tokens are bounds that are met; `words`: all stand in id, x or a response.

    shortest, longest, finish: met by at least one of the two responses, or for `stop` and by name by those.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    round: Tokens = None
    set: Literal["rank", "wsft"] | None = None
    low: float | None = None
    high: float | None = None
    shortest: Tokens = None
    longest: Tokens = None
    finish: Literal["stop", "length", "y", "y_prompt", "empty"] | None = None
    words: str = Field("", max_length=1000)
    order: Literal["round", "high", "low"] = "round"
    page: int = Field(0, ge=0, le=2**31)

    @property
    def filter(self) -> list[pl.Expr]:
        """On rows with margin, set and the stored columns."""
        lengths = [pl.col(f"{arm}_ids").list.len() for arm in ARMS]
        cut = {arm: pl.col(f"{arm}_finish") == "length" for arm in ARMS}
        finishes = {
            "stop": ~(cut["y"] | cut["y_prompt"]),
            "length": cut["y"] | cut["y_prompt"],
            "empty": pl.any_horizontal([pl.col(f"{arm}_empty") for arm in ARMS]),
            **cut,
        }
        text = pl.concat_str([pl.col(name) for name in ("query_id", "x", *ARMS)], separator="\n").str.to_lowercase()
        chosen = [text.str.contains(word, literal=True) for word in self.words.lower().split()]
        if self.set:
            chosen.append(pl.col("set") == self.set)
        if self.low is not None or self.high is not None:
            low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
            chosen.append(pl.col("margin").is_between(low, high))
        if self.shortest is not None or self.longest is not None:
            least, most = self.shortest or 0, 2**32 - 1 if self.longest is None else self.longest
            chosen.append(pl.any_horizontal([length.is_between(least, most) for length in lengths]))
        return chosen + ([finishes[self.finish]] if self.finish else [])


@dataclass(frozen=True)
class Browser:
    """The pairs that were committed when it was made."""

    sources: Sources

    @cached_property
    def shards(self) -> list[Shard]:
        return self.sources.store.shards("pairs")

    @cached_property
    def rounds(self) -> list[int]:
        return sorted({shard.round for shard in self.shards})

    def page(self, wanted: Wanted) -> tuple[list[dict[str, Any]], bool]:
        """The pairs of a page as `pairs.card` makes them, with where they stand, and whether there are more behind."""
        shards, rows = self._matching(wanted)
        if wanted.order != "round":
            rows = rows.sort("margin", "at", descending=[wanted.order == "high", False])
        found = collect(rows.slice(wanted.page * PAGE, PAGE + 1).select("at"))["at"].to_list() if shards else []
        return self._cards(shards, found[:PAGE]), len(found) > PAGE

    def count(self, wanted: Wanted) -> int:
        """How many pairs match."""
        shards, rows = self._matching(wanted)
        if not shards or not wanted.filter:
            return sum(shard.rows for shard in shards)
        return int(collect(rows.select(pl.len())).item())

    def _matching(self, wanted: Wanted) -> tuple[list[Shard], pl.LazyFrame]:
        """The shards that are looked at, and the places of matching rows in them, with margins."""
        shards = [shard for shard in self.shards if wanted.round in (None, shard.round)]
        if not shards:
            return [], pl.LazyFrame()
        schema = pl.Schema(tables.SCHEMAS["pairs"])
        rows = scan_files([shard.path for shard in shards], schema=schema, missing_columns="insert").with_row_index(
            "at"
        )
        if wanted.filter or wanted.order != "round":
            rows = rows.with_columns(*partition(self._tau)[:2]).filter(*wanted.filter).select("at", "margin")
        return shards, rows

    @cached_property
    def _tau(self) -> pl.Expr:
        return tau_of(self.rounds, self.sources.tau0, self.sources.alpha)

    def _cards(self, shards: Sequence[Shard], places: Sequence[int]) -> list[dict[str, Any]]:
        ends = list(accumulate(shard.rows for shard in shards))
        cards: dict[int, dict[str, Any]] = {}
        for which, own in groupby(sorted(places), lambda place: bisect(ends, place)):
            shard, mine = shards[which], list(own)
            local = [place - ends[which] + shard.rows for place in mine]
            rows = pl.DataFrame(pl.from_arrow(self.sources.store.read(shard, _COLUMNS)))[local]
            rows = rows.with_columns(*partition(self._tau)[:2], *LENGTHS, self._tau.alias("tau"))
            found = rows.select(*KEY, *SHOWN, *(f"length_{arm}" for arm in ARMS)).to_dicts()
            for place, row, at in zip(mine, found, local, strict=True):
                cards[place] = card(row) | {"unit": shard.unit, "row": at}
        return [cards[place] for place in places]

    def asked(self, round: int, unit: str, row: int) -> dict[str, Any]:
        """Of one pair: `prompts`, the two as the model saw them by arm, a `note` where they are not known for sure, and
        `texts` that are longer than what a page shows.
        """
        shard = next((shard for shard in self.shards if (shard.round, shard.unit) == (round, unit)), None)
        if shard is None or not 0 <= row < shard.rows:
            raise UsageError(f"there is no pair {row} in unit {unit[:80]} of round {round}")
        stored = self.sources.store.read(shard, ["x", *ARMS, "x_ids", "principle"])[row : row + 1].to_pylist()[0]
        texts = {name: visible(stored[name]) for name in ("x", *ARMS) if len(stored[name]) > LONGEST_TEXT}
        prompts, note = self._rendered(shard, stored)
        return {"prompts": {arm: visible(text) for arm, text in prompts.items()}, "note": note, "texts": texts}

    def _rendered(self, shard: Shard, row: dict[str, Any]) -> tuple[dict[str, str], str]:
        from ple_data.sampling.terms import rendered_again

        manifest = self.sources.store.load_manifest(shard.round)
        model = manifest and manifest.notes.get("model")
        if not model:
            return {}, "The round’s record does not say which model was asked, so the prompts cannot be written again."
        try:
            tokenizer = _tokenizer(str(model))
            made = self.sources.store.provenance(shard)
            (plain,), (guided,) = rendered_again(tokenizer, [row["x"]], row["principle"], made)
        except DamagedError:
            raise
        except PleError as error:
            return {}, f"The prompts cannot be written again: {visible(str(error))}."
        decoded = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        prompts = {"y": decoded(row["x_ids"]), "y_prompt": decoded(guided)}
        if plain == row["x_ids"]:
            return prompts, ""
        return {"y": prompts["y"]}, (
            f"The tokenizer of {visible(str(model))} now writes x in other tokens than those that were kept, so the "
            "prompt with the principle is not known."
        )


@lru_cache(maxsize=4)
def _tokenizer(model: str) -> Any:
    from ple_data.common.models import load_tokenizer

    return load_tokenizer(model, note=lambda _: None)
