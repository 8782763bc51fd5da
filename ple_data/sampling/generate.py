"""The sampling stage: for each query a plain and a principle-guided response, unit by unit. Never scores.

A unit (a fixed slice of the queries) is claimed when the engine has room for it and committed once, whole, as soon as
its last response is there. What is committed is never sampled again; several processes share the units of a round.
"""

import itertools
import platform
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import fields
from typing import Any

from ple_data.common.digests import digests_of, policy_name
from ple_data.common.models import (
    check_adapter,
    check_model,
    load_config,
    load_tokenizer,
    positions_of,
    vocabulary_of,
)
from ple_data.common.progress import Progress
from ple_data.common.settings import as_json, counted
from ple_data.common.terminal import printable
from ple_data.common.workers import Wanted
from ple_data.engines import (
    TOLERANCE,
    Engine,
    EngineSpec,
    choose_engine,
    distance_of,
    engine_module,
    make_engine,
    parse_engine_args,
)
from ple_data.inputs.principles import load_principle
from ple_data.inputs.queries import load_queries
from ple_data.inputs.templates import instructed
from ple_data.sampling.collector import Collector, GenerateSummary
from ple_data.sampling.plan import AHEAD, Plan, Taken, Unit, default_unit_size
from ple_data.sampling.reuse import Reuse
from ple_data.sampling.terms import terms_of
from ple_data.storage.store import Store, Waits
from schemas.errors import UsageError
from schemas.options import Gen, Queries, Sampling
from schemas.records import Probe, RoundManifest

SAMPLED = ("max_new_tokens", "temperature", "top_p", "stop", "logprobs")
READ = ("reader", "query_column", "prefix_words", "prompt_format", "max_query_tokens", "shuffle", "skip", "limit")
"""Options that are in every round's settings, those that it samples by also in the identity of its units."""


def generate(options: Gen) -> GenerateSummary:
    """Sample `samples` pairs of responses to each query and commit them to `data` as round `round`.

    Resumes where an earlier call stopped; calls in other processes share the work. `dry_run` samples and writes nothing
    and returns what the prompts look like. Raises UsageError for anything wrong with the input, before an engine is
    started, or where the round was begun with other settings.

    Without `principles` (None) the plain responses alone are sampled, and committed as `answers`: for evaluation. Their
    settings name the bytes of the policy and the texts of the queries: both may move, and the file gain columns.
    """
    if options.samples > 1 and options.temperature == 0:
        raise UsageError(
            f"--samples {options.samples} with --temperature 0 would sample the same response {options.samples} times"
        )
    model, revision = options.model, options.revision
    engine_name, arguments = choose_engine(options.engine, options.endpoint), parse_engine_args(options.engine_arg)
    if "endpoints" in arguments:
        raise UsageError("--engine-arg endpoints: use --endpoint")
    arguments |= {"endpoints": list(options.endpoint)} if options.endpoint else {}
    if options.workers and engine_name == "server":
        raise UsageError("--workers start engines of their own, and --endpoint samples from servers: give one of them")
    check_model(model, quantized=engine_name != "hf")
    adapter = check_adapter(options.adapter, model) if options.adapter else None
    engine = engine_module(engine_name)
    engine.check(arguments, adapter)
    tokenizer = instructed(load_tokenizer(model, revision, note=_say), options)
    store = Store(options.data)
    config = load_config(model, revision)
    plan, source = make_plan(options, tokenizer, store, vocabulary_of(config))
    fault = _too_long(plan, positions_of(config), model)
    if fault and not options.dry_run:
        raise UsageError(fault)
    if options.dry_run:
        _say(f"this will be refused: {fault}" if fault else "nothing is sampled")
        return GenerateSummary(rows=plan.most_rows, counts=plan.taken.counts, dry_run=_show(plan, tokenizer))
    dtype, device = options.dtype, "workers"
    if not options.workers:
        dtype, device = engine.resolve_machine(options.dtype, arguments)
    spec = EngineSpec(model, revision, adapter, tokenizer, plan.terms.ends, max_length=plan.longest or 0, dtype=dtype)
    found = Reuse(options.reuse, plan, options.data) if options.reuse else None
    if found and (reason := found.why_none()):
        _say(reason)
    _freeze(store, plan, {"model": model, "adapter": options.adapter, "queries": source, "engine": engine_name})
    provenance = plan.provenance(engine_name, dtype, device)

    def start() -> Engine:
        if not options.workers:
            return make_engine(engine_name, spec, arguments)
        from ple_data.sampling.workers import Workers

        return Workers(Wanted(options.workers, options.ray), engine_name, spec, arguments, _say)

    return sample_round(store, plan, start, provenance, found)


def make_plan(options: Gen, tokenizer: Any, store: Store, vocabulary: int | None) -> tuple[Plan, str]:
    """The plan of a round, and where its queries come from. Raises UsageError where no query is left."""
    principle = load_principle(options.principles) if options.principles is not None else None
    terms = terms_of(options, tokenizer, principle, store, _say)
    queries = load_queries(options.queries, options, chat=terms.chat)
    taken = Taken(tokenizer, queries, options, terms.form, options.seed)
    taken.find(0, AHEAD)
    _say(_looked_at(taken))
    if not len(taken):
        raise UsageError(f"no query of {queries.source} is left; raise --max-query-tokens ({options.max_query_tokens})")
    policy = policy_name(options.model, options.adapter, options.revision)
    identity = {
        "policy": policy if principle else digests_of(policy),
        "principle": principle.digest if principle else None,
        **{name: getattr(options, name) for name in ("round", "samples", "seed")},
        **counted(options.part(Sampling), always=SAMPLED),
        **terms.identity,
    }
    unit_size = options.unit_size or default_unit_size(taken.most, store.load_manifest(options.round))
    read = counted(options.part(Queries), always=READ) | {"unit_size": unit_size}
    read["queries"] = queries.digest if principle else queries.asked_digest
    plan = Plan(
        round=options.round,
        seed=options.seed,
        samples=options.samples,
        sampling=options.part(Sampling),
        policy=policy,
        principle=principle,
        taken=taken,
        unit_size=unit_size,
        identity=identity,
        settings=read | identity,
        terms=terms,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
    )
    return plan, queries.source


def sample_round(
    store: Store,
    plan: Plan,
    start_engine: Callable[[], Engine],
    provenance: dict[str, Any],
    reuse: Reuse | None = None,
) -> GenerateSummary:
    """Sample and commit what is left of a plan. The engine is started when there is something to sample, and closed.

    provenance: what the files say, also of the machine, where the engine does not know better when it is up.
    """
    summary = GenerateSummary()
    done = store.committed(plan.kind, plan.round)
    todo: Iterable[Unit] = plan.units
    engine, began = None, time.monotonic()
    responses, longest = len(plan.arms) * plan.most_rows, plan.sampling.max_new_tokens
    progressing = Progress("generate", responses, "responses", most_tokens=longest)
    with progressing as progress, ExitStack() as stack:
        waits = Waits(store, plan.kind, progress.note)
        while True:
            with closing(Collector(store, plan, provenance, reuse, progress, summary, done)) as collector:
                units = collector.units(todo)
                for first in units:  # the engine takes those behind it
                    if engine is None:
                        engine = stack.enter_context(closing(start_engine()))
                        _refuse_another_policy(store, plan.kind, plan.round, engine)
                        provenance |= getattr(engine, "machine", {})
                        name = "{engine} in {dtype} on {device}".format(**provenance)
                        progress.note(f"engine {name}, started in {time.monotonic() - began:.0f} s")
                        engine.under_way = progress.under_way
                        progress.beside = getattr(engine, "state", progress.beside)
                        progress.restart_clock()
                        began = time.monotonic()
                    for request, completion in engine.sample(itertools.chain([first], units), plan.sampling):
                        collector.add(request, completion)
            todo = collector.locked
            if not todo:
                break
            if not collector.claimed:
                waits.a_moment((plan.round, unit.id) for unit in todo)
        summary.rows, summary.counts = plan.most_rows, plan.taken.counts
        store.finish(plan.kind, plan.round, summary.counts)
        what = "pairs" if plan.kind == "responses" else "responses"
        progress.note(_result(summary, what, time.monotonic() - began))
    return summary


def _freeze(store: Store, plan: Plan, notes: dict[str, Any]) -> None:
    """Freeze the round's settings at its first start; later starts must have the same."""
    notes |= {"machine": f"{platform.machine()}, {platform.system()}"}
    ours = RoundManifest(round=plan.round, settings=plan.settings, counts=plan.taken.counts, notes=notes)
    theirs = store.save_manifest(ours)
    defaults = {option.name: as_json(option.default) for option in fields(Gen)}
    if differences := ours.differences(theirs, defaults):
        advice = "use the same settings, another --round or another --data"
        names = [difference.split(":")[0] for difference in differences]
        if "queries" in names:
            differences[names.index("queries")] = f"queries: {_described(ours)}, there {_described(theirs)}"
        if names == ["queries"]:
            advice = f"with more queries, give another --data and --reuse {store.root}: rows of both are taken over"
        if names == ["unit_size"]:
            advice = "a round that was begun keeps its unit size: leave out --unit-size (gen.unit_size of a recipe)"
        if not store.shards(plan.kind, round=plan.round):
            advice += f"; or, as nothing of it is committed yet, remove {store.manifest_path(plan.round)}"
        raise UsageError(
            f"round {plan.round} of {store.root} was begun with other settings: {'; '.join(differences)}; {advice}"
        )


def _refuse_another_policy(store: Store, kind: str, round: int, engine: Engine) -> None:
    """Raise UsageError where a server holds another policy than that which the round was begun with."""
    if (found := getattr(engine, "probe", None)) is not None:
        begun = store.save_probe(Probe(round=round, logps=found)).logps
        if (distance := distance_of(found, begun)) > TOLERANCE:
            advice = ""
            if not store.shards(kind, round=round):
                advice = f", or, as nothing of it is committed yet, remove {store.probe_path(round)}"
            raise UsageError(
                f"round {round} of {store.root} was begun with another policy than the server holds: log-probabilities "
                f"after short texts differ by {distance:.2g} nats a token; start the server with the same model{advice}"
            )


def _described(manifest: RoundManifest) -> str:
    return f"{manifest.counts.get('queries_taken', '?')} of {manifest.notes.get('queries', '?')}"


def _looked_at(taken: Taken) -> str:
    counts, more = taken.counts, "" if taken.complete else " so far, the others as they come"
    dropped = f"{counts['queries_too_long']} with more than {taken.most_tokens} tokens dropped, {len(taken)} taken"
    read = f"{counts['queries_read']} queries read from {taken.queries.source}"
    return f"{read}, {counts['queries_looked_at']} tokenised, {dropped}{more}"


def _too_long(plan: Plan, positions: int | None, model: str) -> str | None:
    longest = plan.find_longest()
    if positions is not None and longest > positions and not plan.taken.complete:
        longest = plan.find_longest(all_queries=True)
    if positions is None or longest <= positions:
        return None
    new = plan.sampling.max_new_tokens
    return (
        f"the longest prompt has {longest - new} tokens and --max-new-tokens is {new}, together over the "
        f"{positions} positions of {model}; lower --max-new-tokens or --max-query-tokens"
    )


def _show(plan: Plan, tokenizer: Any) -> str:
    prompt, _ = plan.rows(next(plan.units))[0]
    lines = [f"query {printable(prompt.query.id)}, 1 of {plan.taken.most}; policy {plan.policy}"]
    names = {"y": "plain prompt x", "y_prompt": "guided prompt [p, x]"}
    for arm in plan.arms:
        name, ids = names[arm], list(prompt.ids(arm))
        lines += ["", f"{name}, {len(ids)} tokens:", *map(printable, tokenizer.decode(ids).splitlines()), f"ids: {ids}"]
    ends = [f"{tokenizer.convert_ids_to_tokens(end)} ({end})" for end in plan.terms.ends]
    texts = [f"or before the text {word!r}" for word in plan.sampling.stop]
    lines += ["", printable(f"a response ends with the token {' or '.join(ends)}"), *texts]
    if form := plan.terms.identity.get("principle_form"):
        what = "is added to" if form == "add" else "replaces"
        lines += [f"the principle {what} the system message that the chat template writes (--principle-form {form})"]
    return "\n".join(lines)


def _result(summary: GenerateSummary, what: str, seconds: float) -> str:
    rate = f"{summary.tokens} tokens, {summary.tokens / seconds:.0f} tokens/s"
    others = {
        "reused": summary.rows_reused,
        f"{what} done before": summary.rows_done_before,
        "sampled by other processes": summary.rows_by_others,
    }
    others["thoughts without an end (no answer came)"] = summary.unanswered
    parts = [f"{count} {how}" for how, count in others.items() if count]
    return ", ".join([f"{summary.rows_sampled} {what} sampled ({rate})", *parts])


def _say(message: str) -> None:
    print(f"generate: {message}", file=sys.stderr, flush=True)
