"""The hostile inputs, by family: files of users, models, adapters, our own records, stores, recipes."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.stages import World
from tests.hostile.mutations import byte_changes, json_texts
from tests.hostile.rule import Input

Make = Callable[[Path], list[str]]


def all_inputs(world: World) -> Iterator[Input]:
    for family in (queries, principles, models, reward_models, adapters, records, stores, recipes, judged):
        yield from family(world)


def words(**options: Any) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def written(name: str, data: str | bytes, argv: Callable[[Path], list[str]]) -> Make:
    """An input that is one file."""

    def make(place: Path) -> list[str]:
        write(place / name, data)
        return argv(place)

    return make


def write(path: Path, data: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))


def copied(source: Path, name: str, changes: Callable[[Path], None], argv: Callable[[Path], list[str]]) -> Make:
    """A copy of a folder in which something is changed."""

    def make(place: Path) -> list[str]:
        shutil.copytree(source, place / name)
        changes(place / name)
        return argv(place)

    return make


def sampling(world: World, place: Path, **more: Any) -> list[str]:
    given = {"model": world.policy, "queries": world.queries, "principles": "none", "data": place / "data"}
    return ["gen", *words(**{**given, "round": 0, "engine": "hf", "max_new_tokens": 2, "limit": 2, **more})]


def training(world: World, place: Path, **more: Any) -> list[str]:
    given = {"model": world.policy, "data": world.left / "score/data", "round": 0, "output": place / "out"}
    return ["train", *words(**{**given, "precision": "float32", "batch_size": 6, **more})]


def scoring(world: World, place: Path, **more: Any) -> list[str]:
    return ["score", *words(**{"data": place / "data", "reward_model": world.reward, **more})]


# Files of users


def queries(world: World) -> Iterator[Input]:
    rows = {
        "plain": {"id": "a", "x": "the film"},
        "chat": {"id": "a", "messages": [{"role": "user", "content": "the film"}], "reference": "was good"},
    }
    for kind, row in rows.items():
        for name, text in json_texts(row):
            yield Input("queries", f"{kind}.jsonl {name}", _queries(world, "q.jsonl", text + "\n"))
            if kind == "plain":
                yield Input("queries", f"{kind}.json {name}", _queries(world, "q.json", f"[{text}]"))
    good = b'id,x\na,the film\nb,"the, story"\n'
    for name, data in byte_changes(good):
        yield Input("queries", f"csv {name}", _queries(world, "q.csv", data))
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ["a", "b"], "x": ["the film", "a story"]}), table)
    for name, data in byte_changes(table.getvalue().to_pybytes()):
        yield Input("queries", f"parquet {name}", _queries(world, "q.parquet", data))
    yield from _no_files("queries", lambda place, given: sampling(world, place, queries=given))


def _queries(world: World, name: str, data: str | bytes) -> Make:
    return written(name, data, lambda place: sampling(world, place, queries=place / name))


def _no_files(family: str, argv: Callable[[Path, Path], list[str]]) -> Iterator[Input]:
    """What is given as a file and is none, or never ends."""

    def pipe(place: Path) -> Path:
        os.mkfifo(place / "pipe.jsonl")
        return place / "pipe.jsonl"

    def link_to_device(place: Path) -> Path:
        (place / "zero.jsonl").symlink_to("/dev/zero")
        return place / "zero.jsonl"

    def folder(place: Path) -> Path:
        (place / "folder.jsonl").mkdir()
        return place / "folder.jsonl"

    def loop(place: Path) -> Path:
        (place / "loop.jsonl").symlink_to(place / "loop.jsonl")
        return place / "loop.jsonl"

    def long(place: Path) -> Path:
        return place / ("x" * 300 + ".jsonl")

    for make in (pipe, link_to_device, folder, loop, long):
        yield Input(family, make.__name__, lambda place, make=make: argv(place, make(place)), may_succeed=False)


def principles(world: World) -> Iterator[Input]:
    for name, data in byte_changes(b"Be kind to people.\n"):
        make = written("p.txt", data, lambda place: sampling(world, place, principles=place / "p.txt"))
        yield Input("principles", name, make)
    yield from _no_files("principles", lambda place, given: sampling(world, place, principles=given))


# Models


def models(world: World) -> Iterator[Input]:
    def gen(place: Path) -> list[str]:
        return sampling(world, place, model=place / "model")

    def train(place: Path) -> list[str]:
        return training(world, place, model=place / "model")

    yield from _folder("models", world.policy, "model", gen)
    for name, change in _weights(world.policy):
        for does, argv in (("gen", gen), ("train", train)):
            yield Input("models", f"{does} {name}", copied(world.policy, "model", change, argv), may_succeed=False)


def reward_models(world: World) -> Iterator[Input]:
    def score(place: Path) -> list[str]:
        shutil.copytree(world.left / "gen/data", place / "data")
        return scoring(world, place, reward_model=place / "rm")

    yield from _folder("reward models", world.reward, "rm", score)
    for name, change in _weights(world.reward):
        yield Input("reward models", name, copied(world.reward, "rm", change, score), may_succeed=False)


def adapters(world: World) -> Iterator[Input]:
    adapter = world.left / "train/adapter"
    yield from _folder("adapters", adapter, "ad", lambda place: sampling(world, place, adapter=place / "ad"))


def _folder(family: str, source: Path, name: str, argv: Callable[[Path], list[str]]) -> Iterator[Input]:
    """A model's folder with each of its files gone, damaged, or (JSON) with other values."""

    def changed(file: str, data: str | bytes) -> Make:
        return copied(source, name, lambda folder: write(folder / file, data), argv)

    def gone(file: str) -> Make:
        return copied(source, name, lambda folder: (folder / file).unlink(), argv)

    for path in sorted(path for path in source.iterdir() if path.is_file()):
        yield Input(family, f"without {path.name}", gone(path.name))
        if path.suffix == ".json" and path.stat().st_size < 5000 and path.name != "ple.json":
            for what, text in json_texts(json.loads(path.read_text())):
                yield Input(family, f"{path.name} {what}", changed(path.name, text))
        elif path.suffix in (".json", ".safetensors"):
            for what, data in byte_changes(path.read_bytes()):
                yield Input(family, f"{path.name} {what}", changed(path.name, data))


def _weights(source: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Weights that are not those of the model: each tensor missing, of another shape, not finite; a pickle instead."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")

    def saved(change: Callable[[dict], None]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            new = {name: tensor.clone() for name, tensor in tensors.items()}
            change(new)
            save_file(new, folder / "model.safetensors", {"format": "pt"})

        return apply

    for name in tensors:
        yield f"without {name}", saved(lambda new, name=name: new.pop(name))
        yield f"{name} of another shape", saved(lambda new, name=name: new.update({name: new[name][:-1].contiguous()}))

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def index_of_pickles(folder: Path) -> None:
        pickled(folder)
        _index(folder, dict.fromkeys(tensors, "pytorch_model.bin"))

    def index_outside(folder: Path) -> None:
        _index(folder, dict.fromkeys(tensors, "../../neighbour/model.safetensors"))
        (folder / "model.safetensors").unlink()

    yield from (("a pickle", pickled), ("an index of pickles", index_of_pickles), ("an index outside", index_outside))


def _index(folder: Path, weights: dict[str, str]) -> None:
    write(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weights}))


# What our own commands left


def records(world: World) -> Iterator[Input]:
    """Every record with other values, and a command that reads it."""
    left = world.left

    def again(stage: str, folder: str) -> Callable[[Path], list[str]]:
        known = next(each for each in world.stages() if each.name == stage)

        def argv(place: Path) -> list[str]:
            return [word.replace(str(left / stage), str(place)) for word in known.argv(left / stage)]

        return argv

    readers = {
        "gen/data": [again("gen", "data"), lambda place: scoring(world, place)],
        "score/data": [lambda place: training(world, place, data=place / "data"),
                       lambda place: ["verify", str(place / "data")],
                       lambda place: ["inspect", str(place / "data")]],
        "train/adapter": [again("train", "adapter"), lambda place: [*again("train", "adapter")(place), "--no-resume"],
                          lambda place: sampling(world, place, adapter=place / "adapter")],
        "sft/sft": [again("sft", "sft")],
        "rm/rm": [],
        "eval/eval": [again("eval", "eval"), lambda place: _report(world, place, eval=place / "eval")],
        "judge/judge": [again("judge", "judge"), lambda place: _report(world, place, judge=place / "judge")],
        "purity/purity": [again("purity", "purity"), lambda place: _report(world, place, purity=place / "purity")],
    }  # fmt: skip
    for where, commands in readers.items():
        for path in sorted((left / where).rglob("*.json")) if (left / where).exists() else []:
            inside = str(path.relative_to(left / where))
            ours = path.name in ("ple.json", "snapshot.json", "eval.json", "judge.json", "purity.json", "state.json")
            if not (ours or ".ple" in inside or "manifest" in path.name):
                continue
            for at, argv in enumerate(commands):
                for what, text in json_texts(json.loads(path.read_text())):

                    def change(folder: Path, inside: str = inside, text: str = text) -> None:
                        write(folder / inside, text)

                    make = copied(left / where, where.split("/")[1], change, argv)
                    yield Input("records", f"{where}/{inside} {what}, read {at}", make)


def _report(world: World, place: Path, **given: Path) -> list[str]:
    return ["report", str(world.left / "score/data"), *words(**given, output=place / "page/report.html")]


def stores(world: World) -> Iterator[Input]:
    """Shards cut, changed, of other columns; folders and links in their place."""
    data = world.left / "score/data"
    readers = {
        "train": lambda place: training(world, place, data=place / "data"),
        "inspect": lambda place: ["inspect", str(place / "data")],
        "verify": lambda place: ["verify", str(place / "data")],
        "export": lambda place: ["export", str(place / "data"), *words(format="sft", output=place / "rows.jsonl")],
    }
    shard = next((data / "pairs").rglob("*.parquet"))
    inside = shard.relative_to(data)
    table = pq.read_table(shard)
    changes: dict[str, Callable[[Path], None]] = {}
    for name, bytes_ in byte_changes(shard.read_bytes()):
        changes[f"shard {name}"] = lambda folder, bytes_=bytes_: write(folder / inside, bytes_)
    for column in table.column_names:
        dropped = table.drop_columns([column])
        changes[f"shard without {column}"] = lambda folder, new=dropped: pq.write_table(new, folder / inside)
        texts = pa.array(["\x1b[31m"] * len(table))
        other = table.set_column(table.column_names.index(column), column, texts)
        changes[f"shard with text as {column}"] = lambda folder, new=other: pq.write_table(new, folder / inside)
    changes["shard gone"] = lambda folder: (folder / inside).unlink()
    changes["shard a folder"] = lambda folder: ((folder / inside).unlink(), (folder / inside).mkdir())
    changes["shard a pipe"] = lambda folder: ((folder / inside).unlink(), os.mkfifo(folder / inside))
    changes["a shard of nobody"] = lambda folder: shutil.copy(
        folder / inside, (folder / inside).with_name("part-x.parquet")
    )
    changes["no folder of records"] = lambda folder: shutil.rmtree(folder / ".ple")
    changes["records a file"] = lambda folder: (shutil.rmtree(folder / ".ple"), write(folder / ".ple", ""))
    changes["lock a link"] = _lock_as_link
    for what, change in changes.items():
        for does, argv in readers.items():
            yield Input("stores", f"{does} {what}", copied(data, "data", change, argv))
    for what, change in changes.items():
        yield Input("stores", f"score {what}", copied(data, "data", change, lambda place: scoring(world, place)))


def _lock_as_link(folder: Path) -> None:
    for lock in [*folder.rglob("*lock*")]:
        if lock.is_file():
            lock.unlink()
            lock.symlink_to(folder.parent.parent / "neighbour" / "kept.txt")


def recipes(world: World) -> Iterator[Input]:
    recipe = {
        "model": str(world.policy),
        "queries": str(world.queries),
        "principles": "imdb",
        "reward_model": str(world.reward),
        "run_dir": "run",
        "rounds": 1,
        "queries_per_round": 2,
        "tau0": 0.2,
        "gen": {"engine": "hf", "max_new_tokens": 2, "stop": ["."], "engine_arg": {"batch_size": 2}},
        "train": {"batch_size": 4, "learning_rate": 1e-3},
    }
    for name, text in json_texts(recipe):
        make = written("recipe.yaml", text, lambda place: ["run", str(place / "recipe.yaml"), "--dry-run"])
        yield Input("recipes", name, make)
    bombs = {
        "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
        ),
        "python object": "model: !!python/object/apply:os.system [true]\n",
        "tab": "model:\tx\n\ty: 1\n",
        "duplicate": json.dumps(recipe)[:-1] + ', "rounds": 2}',
    }  # fmt: skip
    for name, text in bombs.items():
        make = written("recipe.yaml", text, lambda place: ["run", str(place / "recipe.yaml"), "--dry-run"])
        yield Input("recipes", name, make)
    yield from _no_files("recipes", lambda place, given: ["run", str(given), "--dry-run"])


def judged(world: World) -> Iterator[Input]:
    row = {"query_id": "a", "x": "the film", "y": "was good"}
    good = json.dumps(row) + "\n"
    for name, text in json_texts(row):

        def make(place: Path, text: str = text) -> list[str]:
            write(place / "a.jsonl", text + "\n")
            write(place / "b.jsonl", good)
            return ["judge", str(place / "a.jsonl"), str(place / "b.jsonl"), "--human", *words(output=place / "page")]

        yield Input("judged", name, make)
