"""The card of a dataset or a model on the hub, from what the store or the training recorded. Sends and writes nothing.

A card is Markdown that others render: whatever came from a file stands in it as data, in code or escaped.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.common.secrets import public
from ple_data.common.settings import DIGESTS, NO_OPTIONS
from ple_data.partition import round_statistics
from ple_data.storage.store import Store, collect
from schemas import tables
from schemas.options import Threshold
from schemas.reports import EvalReport
from schemas.training import Trained

PAPER = "Progressively Label Enhancement (PLE; Liu, Xu, Geng, ICML 2025)"
SIZES = {"n<1K": 10**3, "1K<n<10K": 10**4, "10K<n<100K": 10**5, "100K<n<1M": 10**6, "1M<n<10M": 10**7}
SIZES |= {"10M<n<100M": 10**8, "100M<n<1B": 10**9, "1B<n<10B": 10**10}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MOST_TEXTS = 3
"""Principles that a card shows in full."""


def hub_id(name: str | None) -> str | None:
    """The name where it may be one on the hub; None for a folder of this machine, which says nothing to others."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def start_on_hub(policy: Any) -> str | None:
    """The start model in a policy's name (`owner/name@commit`) where it came from the hub; None for a folder, which is
    recorded without its place (`name@digest`)."""
    name = str(policy or "").partition("+")[0].rpartition("@")[0]
    return name if _HUB_ID.fullmatch(name) else None


def dataset_card(store: Store, repo: str, license: str | None) -> str:
    """Counts, margins, principle, models and how to load the rows of a store."""
    kinds = {kind: shards for kind in tables.STORED if (shards := store.shards(kind))}
    rows = max(sum(shard.rows for shard in shards) for shards in kinds.values())
    head: dict[str, Any] = {"license": license} if license else {}
    head |= {"tags": ["ple", "preference", "synthetic"], "task_categories": ["text-generation"]}
    head["size_categories"] = [next((name for name, most in SIZES.items() if rows < most), "10B<n<100B")]
    order = sorted(kinds, key=lambda kind: kind != "pairs")
    head["configs"] = [
        {"config_name": kind, "data_files": f"{kind}/**/*.parquet", **({"default": True} if kind == order[0] else {})}
        for kind in order
    ]
    counts = [[kind, sum(s.rows for s in own), len({s.round for s in own})] for kind, own in kinds.items()]
    parts = [
        _head(head, repo),
        f"Responses made with the toolkit of {PAPER}: to each query x a plain response y and one under a principle, "
        "y_prompt, with their rewards s and s_prompt." + (f" Licence: `{_code(license)}`." if license else ""),
        _table(["table", "rows", "rounds"], counts),
    ]
    if "pairs" in kinds:
        found = round_statistics(store.scan("pairs"), *Threshold().values().values())
        quantiles = [name for name in found.columns if name.startswith("margin_q")]
        names = ["round", "rows", "mean_s", "mean_s_prompt", "mean_margin", *quantiles, "lowered_share"]
        parts += ["## Rewards", "The margin is s_prompt − s, in the reward's own units; lowered: where it is below 0."]
        parts.append(_table(names, [[_number(row[name]) for name in names] for row in found.to_dicts()]))
    sources = ["## Where it comes from", *_sources(store, order[0])]
    return "\n\n".join([*parts, *sources, "## How to load it", _loading(repo, order[0])]) + "\n"


def _sources(store: Store, kind: str) -> Iterator[str]:
    """Sentences and texts about the policies, principles and reward models of a table's rows."""
    rows, metadata = store.scan(kind), store.provenance(store.shards(kind)[0])

    def named(column: str) -> list[str]:
        known = column in tables.SCHEMAS[kind].names
        return collect(rows.select(pl.col(column).unique().sort()))[column].to_list() if known else []

    for column, title in {"policy": "Policies (name and digest)", "reward_model": "Reward models"}.items():
        if names := named(column):
            yield f"{title}: {', '.join(f'`{_code(public(name))}`' for name in names)}."
    if sampling := metadata.get("sampling"):
        yield f"Sampling: {', '.join(f'{name} `{_code(str(value))}`' for name, value in sampling.items())}."
    texts = list(filter(None, named("principle")))
    if texts:
        name = (metadata.get("principle") or {}).get("name")
        yield f"Principle{f' `{_code(str(name))}`' if name and len(texts) == 1 else 's' if len(texts) > 1 else ''}:"
    yield from map(fenced, texts[:MOST_TEXTS])
    if len(texts) > MOST_TEXTS:
        yield f"And {len(texts) - MOST_TEXTS} more, in the column `principle`."


def _loading(repo: str, kind: str) -> str:
    python = f'from datasets import load_dataset\n\nrows = load_dataset("{repo}", "{kind}", split="train")'
    shell = f"hf download {repo} --repo-type dataset --local-dir data\nple verify data"
    as_store = f"Or as the store that it is, for `ple-score` and `ple-train`:\n\n{fenced(shell, 'bash')}"
    return f"{fenced(python, 'python')}\n\n{as_store}"


def model_card(trained: Trained, repo: str, license: str | None, base: str | None, evals: Sequence[EvalReport]) -> str:
    """Method, base model, settings, cost and evaluations of a training."""
    settings, adapter = trained.settings, "adapter_config.json" in trained.files
    base = base or start_on_hub(settings.get("weights"))
    head: dict[str, Any] = {"license": license} if license else {}
    if base:
        head["base_model"] = base
    head |= {"library_name": "peft" if adapter else "transformers", "tags": ["ple", "alignment"]}
    if trained.kind != "reward":
        head["pipeline_tag"] = "text-generation"
    method = str(settings.get("method") or settings.get("objective") or trained.kind)
    facts: list[list[Any]] = [["method", method], ["steps", trained.steps], ["started from", settings.get("weights")]]
    facts += [[name.replace("_", " "), value] for name, value in trained.cost.items()]
    hidden = NO_OPTIONS | DIGESTS.keys() | {"weights", "method", "objective"}
    kept = [[name, value] for name, value in sorted(settings.items()) if name not in hidden and value is not None]
    parts = [
        _head(head, repo),
        f"{'A LoRA adapter' if adapter else 'A model'} trained with the toolkit of {PAPER}, by `{_code(method)}`"
        + (f" on `{_code(base)}`." if base else "."),
        _table(["", ""], [[name, f"`{_code(str(value))}`"] for name, value in facts if value is not None]),
        "## Settings",
        _table(["setting", "value"], [[name, f"`{_code(str(value))}`"] for name, value in kept]),
    ]
    for report in evals:
        parts += ["## Evaluation", *_evaluation(report)]
    parts += ["## How to load it", fenced(_use(repo, base or "BASE", adapter, trained.kind), "python")]
    return "\n\n".join(parts) + "\n"


def _evaluation(report: EvalReport) -> Iterator[str]:
    metrics = list(dict.fromkeys(name for policy in report.policies for name in policy.metrics))
    yield "Means with 95 % intervals over queries (`ple eval`)."
    rows = [
        [f"`{_code(p.label)}`", *(str(p.metrics[name]) if name in p.metrics else "–" for name in metrics)]
        for p in report.policies
    ]
    yield _table(["policy", *(_cell(public(name)) for name in metrics)], rows)


def _use(repo: str, base: str, adapter: bool, kind: str) -> str:
    auto = "AutoModelForSequenceClassification" if kind == "reward" else "AutoModelForCausalLM"
    if not adapter:
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{repo}")'
    return (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{repo}")'
    )


def _head(fields: Mapping[str, Any], repo: str) -> str:
    """Metadata (JSON is YAML) and title."""
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---", "", f"# {repo.rpartition('/')[2]}"])


def fenced(text: str, language: str = "text") -> str:
    """A text as a block that it cannot end by itself."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _code(text: str) -> str:
    """What stands between two backticks, on one line, also in a table."""
    return re.sub(r"\s+", " ", text).replace("`", "'").replace("|", "\\|")


def _cell(text: str) -> str:
    return re.sub(r"([\\|`<>*_\[\]])", r"\\\1", re.sub(r"\s+", " ", text))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
