"""`ple judge A B --human`: writes the annotation page, and reads annotators' exports back."""

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from ple_data.judge import label_studio as studio
from ple_data.judge import results
from ple_data.judge.agreement import fleiss_kappa, majority
from ple_data.judge.page import Item, arrange, page_digest, render_page
from ple_data.judge.results import PAGE_RECORD, PEOPLE, VALUES, Outcome, Verdict
from ple_data.judge.sources import Pairs, choose, load_pairs
from schemas.errors import DamagedError, UsageError
from schemas.files import locked, write_atomic
from schemas.judging import AnnotationExport, AnnotationPage
from schemas.records import read_record

PAGE = "annotate.html"
Votes = dict[str, dict[str, Outcome]]
"""By annotator, the outcome by query id."""


def write_page(
    a: str, b: str, output: Path, *, limit: int | None = None, seed: int | None = None, label_studio: Path | None = None
) -> str:
    """Writes the page for A and B, its record, and tasks for Label Studio; gives back their paths, a line each.

    Without a seed the queries are those of seed 0, and order and sides are drawn at random, once for each page. Raises
    UsageError where `output` holds another page, whose annotators' exports could not be read any more, or the verdicts
    of another judge.
    """
    pairs = load_pairs(a, b)
    print(pairs.count(), file=sys.stderr)
    if label_studio is not None and label_studio.suffix != ".json":
        raise UsageError(f"--label-studio {label_studio}: give a .json file; its configuration is written beside it")
    with locked(output / ".lock"):
        results.refuse_other(output, a, b, PEOPLE, None)
        there = _read_page(output) if (output / PAGE_RECORD).exists() else None
        secret = _secret(seed, there)
        items = _arranged(pairs, seed or 0, secret, limit)
        record = AnnotationPage(page=page_digest(items), a=a, b=b, seed=seed or 0, secret=secret, limit=limit)
        if there is not None and there.page != record.page:
            raise UsageError(f"{output} holds another page (other responses, --seed or --limit): give another --output")
        write_atomic(output / PAGE_RECORD, record.to_json())
        write_atomic(output / PAGE, render_page(items))
        written = [output / PAGE]
    if label_studio is not None:
        config = label_studio.with_suffix(".xml")
        write_atomic(label_studio, studio.tasks(items))
        write_atomic(config, studio.CONFIG)
        written += [label_studio, config]
    return "\n".join(map(str, written))


def read_exports(a: str, b: str, exports: Sequence[Path], output: Path) -> str:
    """Reads the exports of the page in `output`, writes the verdicts there, and gives back the report as text.

    exports: files, or folders of which every .json file is one. Raises UsageError where A or B is not what the page
    shows, or an export is damaged, of another page, or of an annotator who has one already.
    """
    record = _read_page(output)
    pairs = load_pairs(a, b)
    items = _arranged(pairs, record.seed, record.secret, record.limit)
    if page_digest(items) != record.page:
        raise UsageError(
            f"{a} and {b} are not what the page in {output} shows: it was made from {record.a} and {record.b}"
        )
    read = _read(_files(exports), record.page, {item.pair.query_id for item in items})
    votes = _votes(read, items)
    sided = [verdict for export in read for verdict in export.verdicts if verdict.choice != "tie"]
    verdicts = [
        Verdict(item.pair, majority([said[id] for said in votes.values() if id in said]), {})
        for item in items
        for id in [item.pair.query_id]
        if any(id in said for said in votes.values())
    ]
    if len(verdicts) < len(items):
        print(f"{len(items) - len(verdicts)} of {len(items)} queries were judged by nobody; left out", file=sys.stderr)
    verdicts += [
        Verdict(item.pair, said[item.pair.query_id], {}, annotator)
        for annotator, said in votes.items()
        for item in items
        if item.pair.query_id in said
    ]
    common = [id for id in (item.pair.query_id for item in items) if all(id in said for said in votes.values())]
    counts = [[[said[id] for said in votes.values()].count(outcome) for outcome in VALUES] for id in common]
    with locked(output / ".lock"):
        results.refuse_other(output, a, b, PEOPLE, None)
        report = results.count(
            verdicts,
            pairs,
            a=a,
            b=b,
            judge=PEOPLE,
            seed=record.seed,
            settings={"limit": record.limit, "seed": record.seed},
            annotators=len(votes),
            kappa=fleiss_kappa(counts),
            kappa_queries=len(common),
            first_side=sum(verdict.took_first_shown for verdict in sided),
            sides=len(sided),
        )
        results.save(output, verdicts, report)
    return results.shown(report)


def _secret(seed: int | None, there: AnnotationPage | None) -> int | None:
    """What draws order and sides: nothing where a seed is given; else that of the page which is there, or a new one."""
    if seed is not None:
        return None
    return there.secret if there else secrets.randbits(64)


def _arranged(pairs: Pairs, seed: int, secret: int | None, limit: int | None) -> list[Item]:
    return arrange(choose(pairs.rows, limit, seed), seed if secret is None else secret)


def _read_page(output: Path) -> AnnotationPage:
    path = output / PAGE_RECORD
    if not path.exists():
        raise UsageError(f"{output} holds no annotation page: write one first, with --human and without --read")
    return read_record(
        AnnotationPage, path, "restore it, or write the page anew with the same A, B, --seed and --limit"
    )


def _files(exports: Sequence[Path]) -> list[Path]:
    files = [file for path in exports for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise UsageError(f"no .json files in {', '.join(map(str, exports))}: give annotators' exports")
    return files


def _votes(exports: Sequence[AnnotationExport], items: Sequence[Item]) -> Votes:
    outcomes = {item.pair.query_id: _outcomes(item) for item in items}
    return {
        export.annotator: {found.query_id: outcomes[found.query_id][found.choice] for found in export.verdicts}
        for export in exports
    }


def _read(files: Sequence[Path], page: str, query_ids: set[str]) -> list[AnnotationExport]:
    """The exports, each of this page and of an annotator of its own."""
    read: list[AnnotationExport] = []
    origins: dict[str, Path] = {}
    for file in files:
        export = _read_export(file)
        if export.page != page:
            raise UsageError(
                f"{file}: these verdicts are of page {export.page}, not of {page}: read them with their own page"
            )
        if export.annotator in origins:
            raise UsageError(
                f"{file}: annotator {export.annotator!r} stands in {origins[export.annotator]} as well: keep the newer "
                "file, or change `annotator` where these are two people"
            )
        ids = [verdict.query_id for verdict in export.verdicts]
        if len(set(ids)) < len(ids) or not set(ids) <= query_ids:
            raise UsageError(f"{file}: it has a query twice or one that is not in the page: ask for a new export")
        origins[export.annotator] = file
        read.append(export)
    return read


def _read_export(file: Path) -> AnnotationExport:
    try:
        return read_record(AnnotationExport, file, "give a file that an annotation page exported")
    except DamagedError as error:
        raise UsageError(str(error)) from error


def _outcomes(item: Item) -> dict[str, Outcome]:
    """The outcome by what an annotator chose."""
    if item.first_is_a:
        return {"first": "win", "second": "lose", "tie": "tie"}
    return {"first": "lose", "second": "win", "tie": "tie"}
