"""Turns a stream of responses into committed units: claims them, gathers their rows, commits each once it is whole."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ple_data.common.progress import Progress
from ple_data.engines import Completion, Request
from ple_data.inputs.chat import to_text
from ple_data.sampling.plan import Plan, Prompt, Unit
from ple_data.sampling.reuse import Reuse
from ple_data.sampling.thoughts import Told
from ple_data.storage.store import Store
from schemas.errors import ClaimLostError
from schemas.leases import elsewhere
from schemas.tables import SCHEMAS


@dataclass
class GenerateSummary:
    """What one call of generate() did. Rows are pairs of responses, or plain responses alone; tokens are new."""

    rows: int = 0
    rows_sampled: int = 0
    rows_reused: int = 0
    rows_done_before: int = 0
    rows_by_others: int = 0
    tokens: int = 0
    unanswered: int = 0
    """New responses whose thought never ended."""
    counts: dict[str, int] = field(default_factory=dict)
    dry_run: str | None = None
    """What `--dry-run` prints: a rendered prompt of each arm with its token ids."""


@dataclass
class _OpenUnit:
    """A claimed unit: its rows, complete but for the responses that are still to come, and how many those are."""

    unit: Unit
    claim: ExitStack
    rows: list[dict[str, Any]] = field(default_factory=list)
    reused: int = 0
    missing: int = 0


@dataclass
class Collector:
    """Claims units for the engine, gathers their responses and commits each unit that is whole."""

    store: Store
    plan: Plan
    provenance: Mapping[str, Any]
    reuse: Reuse | None
    progress: Progress
    summary: GenerateSummary
    done: Collection[str]
    """Units that were committed before this call."""
    locked: list[Unit] = field(default_factory=list)
    """The units that another process holds."""
    claimed: int = 0
    _open: dict[str, _OpenUnit] = field(default_factory=dict)

    def units(self, todo: Iterable[Unit]) -> Iterator[list[Request]]:
        """The requests of each unit that is ours; a unit is claimed when it is asked for."""
        store, plan, rest = self.store, self.plan, iter(todo)
        for unit in rest:
            self.progress.expect(len(plan.arms) * plan.most_rows)
            if store.is_committed(plan.kind, plan.round, unit.id):
                self._count(unit)
                continue
            claim = ExitStack()
            if claim.enter_context(store.claim(plan.kind, plan.round, unit.id)):
                self.claimed += 1
                if requests := self._begin(unit, claim):
                    yield requests
                continue
            claim.close()
            if store.is_committed(plan.kind, plan.round, unit.id):
                self._count(unit)
            else:
                self.locked.append(unit)
                if len(self.locked) == 1 and plan.taken.complete:
                    yield from self.units(elsewhere(list(rest)))
                    return

    def add(self, request: Request, completion: Completion) -> None:
        """Take in one response; the last one of a unit commits it."""
        unit_id, row, arm = request.key
        opened, thoughts = self._open[unit_id], self.plan.terms.thoughts
        ids, text = completion.ids, completion.text
        told = thoughts.of(request.prompt_ids, ids, text) if thoughts else Told(text)
        opened.rows[row] |= {
            arm: told.answer,
            f"{arm}_ids": ids,
            f"{arm}_finish": completion.finish,
            f"{arm}_empty": not told.answer.strip(),
            f"{arm}_logps": completion.logps,
            f"{arm}_thought": told.thought,
            f"{arm}_answered": told.answered,
        }
        self.summary.unanswered += told.answered is False
        opened.missing -= 1
        self.summary.tokens += len(completion.ids)
        self.progress.advance(1, tokens=len(completion.ids))
        if not opened.missing:
            self._commit(opened)

    def close(self) -> None:
        """Give up the claims of units that are not whole."""
        for opened in self._open.values():
            opened.claim.close()

    def _count(self, unit: Unit) -> None:
        """A unit that is committed: before this call, or by another process."""
        rows = len(unit.places) * self.plan.samples
        if unit.id in self.done:
            self.summary.rows_done_before += rows
            self.progress.skip(len(self.plan.arms) * rows)
        else:
            self.summary.rows_by_others += rows
            self.progress.advance(len(self.plan.arms) * rows)

    def _begin(self, unit: Unit, claim: ExitStack) -> list[Request]:
        opened = self._open[unit.id] = _OpenUnit(unit, claim)
        requests = []
        for row, (prompt, sample) in enumerate(self.plan.rows(unit)):
            earlier = self.reuse.row(prompt, sample) if self.reuse else None
            opened.rows.append(earlier or self._row(prompt, sample))
            if earlier:
                opened.reused += 1
                self.progress.advance(len(self.plan.arms))
            else:
                requests += [self.plan.request(unit, row, prompt, sample, arm) for arm in self.plan.arms]
        opened.missing = len(requests)
        if not requests:
            self._commit(opened)
        return requests

    def _commit(self, opened: _OpenUnit) -> None:
        plan, unit = self.plan, opened.unit
        table = pa.Table.from_pylist(opened.rows, schema=SCHEMAS[plan.kind])
        del self._open[unit.id]
        with opened.claim:
            try:
                self.store.commit(plan.kind, plan.round, unit.id, table, self.provenance)
            except ClaimLostError as error:
                self.progress.note(f"{error}: its rows are left to them")
                self.progress.advance(-len(plan.arms) * len(opened.rows))
                self.locked.append(unit)
                return
        self.summary.rows_reused += opened.reused
        self.summary.rows_sampled += len(opened.rows) - opened.reused

    def _row(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        return {
            "query_id": prompt.query.id,
            "round": self.plan.round,
            "sample": sample,
            "x": to_text(prompt.query.x),
            "x_ids": list(prompt.x_ids),
            "policy": self.plan.policy,
            "seed": self.plan.seed,
            "reference": prompt.query.reference,
            "principle": self.plan.principle and self.plan.principle.text,
        }
