"""`ple judge A B --human`: writes the annotation page, and reads annotators' exports back: what they say together."""

import secrets
import sys
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path

from ple_data.judge import results
from ple_data.judge.page import Item, arrange, page_digest, render_page, resource, studio_tasks
from ple_data.judge.results import PAGE_RECORD, PEOPLE, VALUES, Outcome, Verdict
from ple_data.judge.sources import Pairs, choose, load_pairs
from schemas.errors import DamagedError, UsageError
from schemas.files import locked, write_atomic
from schemas.judging import AnnotationExport, AnnotationPage, Choice
from schemas.records import read_record

PAGE = "annotate.html"


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
        secret = None
        if seed is None:
            secret = there.secret if there else secrets.randbits(64)
        items = _arranged(pairs, seed or 0, secret, limit)
        record = AnnotationPage(page=page_digest(items), a=a, b=b, seed=seed or 0, secret=secret, limit=limit)
        if there is not None and there.page != record.page:
            raise UsageError(f"{output} holds another page (other responses, --seed or --limit): give another --output")
        write_atomic(output / PAGE_RECORD, record.to_json())
        write_atomic(output / PAGE, render_page(items))
        written = [output / PAGE]
    if label_studio is not None:
        config = label_studio.with_suffix(".xml")
        write_atomic(label_studio, studio_tasks(items))
        write_atomic(config, resource("label_studio.xml"))
        written += [label_studio, config]
    return "\n".join(map(str, written))


def read_exports(a: str, b: str, exports: Sequence[Path], output: Path) -> str:
    """Reads the exports of the page in `output`, writes the verdicts there, and gives back the report as text.

    exports: files, or folders of which every .json file is one. Raises UsageError where A or B is not what the page
    shows, or an export is damaged, of another page, or of an annotator who has one already.
    """
    record = _read_page(output)
    pairs = load_pairs(a, b)
    arranged = _arranged(pairs, record.seed, record.secret, record.limit)
    if page_digest(arranged) != record.page:
        raise UsageError(
            f"{a} and {b} are not what the page in {output} shows: it was made from {record.a} and {record.b}"
        )
    items = {item.pair.query_id: item for item in arranged}
    found = _read(exports, record.page, items.keys())
    votes = {  # by annotator and query id
        export.annotator: {said.query_id: _outcome(items[said.query_id], said.choice) for said in export.verdicts}
        for export in found
    }
    by_query = {id: [said[id] for said in votes.values() if id in said] for id in items}
    verdicts = [Verdict(items[id].pair, majority(outcomes)) for id, outcomes in by_query.items() if outcomes]
    if len(verdicts) < len(items):
        print(f"{len(items) - len(verdicts)} of {len(items)} queries were judged by nobody; left out", file=sys.stderr)
    verdicts += [
        Verdict(item.pair, said[id], annotator)
        for annotator, said in votes.items()
        for id, item in items.items()
        if id in said
    ]
    common = [outcomes for outcomes in by_query.values() if len(outcomes) == len(votes)]
    sided = [said.took_first_shown for export in found for said in export.verdicts if said.choice != "tie"]
    with locked(output / ".lock"):
        results.refuse_other(output, a, b, PEOPLE, None)
        return results.conclude(
            output,
            verdicts,
            pairs,
            judge=PEOPLE,
            seed=record.seed,
            settings={"limit": record.limit, "seed": record.seed},
            annotators=len(votes),
            kappa=fleiss_kappa([[outcomes.count(value) for value in VALUES] for outcomes in common]),
            kappa_queries=len(common),
            first_side=sum(sided),
            sides=len(sided),
        )


def _arranged(pairs: Pairs, seed: int, secret: int | None, limit: int | None) -> list[Item]:
    return arrange(choose(pairs.rows, limit, seed), seed if secret is None else secret)


def _read_page(output: Path) -> AnnotationPage:
    path = output / PAGE_RECORD
    if not path.exists():
        raise UsageError(f"{output} holds no annotation page: write one first, with --human and without --read")
    return read_record(
        AnnotationPage, path, "restore it, or write the page anew with the same A, B, --seed and --limit"
    )


def _read(exports: Sequence[Path], page: str, query_ids: Set[str]) -> list[AnnotationExport]:
    """The exports, each of this page and of an annotator of its own."""
    files = [file for path in exports for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise UsageError(f"no .json files in {', '.join(map(str, exports))}: give annotators' exports")
    read: dict[str, tuple[Path, AnnotationExport]] = {}
    for file in files:
        try:
            export = read_record(AnnotationExport, file, "give a file that an annotation page exported")
        except DamagedError as error:
            raise UsageError(str(error)) from error
        if export.page != page:
            raise UsageError(
                f"{file}: these verdicts are of page {export.page}, not of {page}: read them with their own page"
            )
        if export.annotator in read:
            raise UsageError(
                f"{file}: annotator {export.annotator!r} stands in {read[export.annotator][0]} as well: keep the newer "
                "file, or change `annotator` where these are two people"
            )
        ids = [verdict.query_id for verdict in export.verdicts]
        if len(set(ids)) < len(ids) or not query_ids >= set(ids):
            raise UsageError(f"{file}: it has a query twice or one that is not in the page: ask for a new export")
        read[export.annotator] = file, export
    return [export for _, export in read.values()]


def _outcome(item: Item, choice: Choice) -> Outcome:
    if choice == "tie":
        return "tie"
    return "win" if (choice == "first") == item.first_is_a else "lose"


def majority(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome that more annotators chose than any other; a tie where there is none."""
    ranked = Counter(outcomes).most_common(2)
    return ranked[0][0] if len(ranked) == 1 or ranked[0][1] > ranked[1][1] else "tie"


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float | None:
    """Fleiss' kappa (Fleiss 1971) of N subjects, each rated by the same n >= 2 raters.

    counts: for each subject the number of raters by category. None where it is not defined: no subject, a single
    rater, or all ratings in one category. Raises ValueError where subjects have different numbers of ratings.
    """
    if len({sum(row) for row in counts}) > 1:
        raise ValueError("every subject needs the same number of ratings")
    raters = sum(counts[0]) if counts else 0
    if raters < 2:
        return None
    total = raters * len(counts)
    agreement = sum(sum(n * (n - 1) for n in row) for row in counts) / (total * (raters - 1))
    chance = sum((sum(column) / total) ** 2 for column in zip(*counts, strict=True))
    return None if chance == 1 else (agreement - chance) / (1 - chance)
