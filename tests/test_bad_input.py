"""Bad input, as a user meets it: one clear line that names what is wrong, the right exit code, and nothing lost.

Most commands run in this process (click's runner); where a process matters (signals, limits, mounts) they are real.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import cli
from ple_data.storage.store import Store
from tests import tiny
from tests.conftest import ROOT

QUERIES = 6


@pytest.fixture(scope="session")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    path.write_text("".join(json.dumps({"x": f"the story of scene {n} was"}) + "\n" for n in range(QUERIES)))
    return path


@pytest.fixture(scope="session")
def whole_data(policy: Path, reward: Path, queries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data") / "data"
    found = ple(*gen_words(policy, queries, data), "--reward-model", reward)
    assert found.exit_code == 0, found.stderr
    return data


@pytest.fixture
def data(whole_data: Path, tmp_path: Path) -> Path:
    """A store of one round with pairs, to be damaged."""
    return Path(shutil.copytree(whole_data, tmp_path / "data"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def ple(*words: object) -> Result:
    return CliRunner().invoke(cli.ple, [str(word) for word in words])


def gen_words(model: Path, queries: Path, data: Path, *more: object) -> list[object]:
    files = ["gen", "--model", model, "--queries", queries, "--data", data, "--round", 0]
    return [*files, "--principles", "imdb", "--engine", "hf", "--max-new-tokens", 5, "--unit-size", 2, *more]


def train_words(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["train", "--model", model, "--data", data, "--round", 0, "--output", output, *more]


def refused(found: Result | subprocess.CompletedProcess, code: int, *facts: object) -> None:
    """One error line with the facts, the exit code, no data and no traceback."""
    exit_code = found.exit_code if isinstance(found, Result) else found.returncode
    lines = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert exit_code == code, found.stderr
    assert len(lines) == 1, found.stderr
    assert found.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in found.stderr
    assert "unexpected" not in lines[0]
    assert found.stdout == ""
    for fact in facts:
        assert str(fact) in lines[0]


# Files


@pytest.mark.parametrize("name", ["queries.jsonl", "queries.parquet", "queries.csv", "queries.txt"])
def test_missing_queries(policy: Path, tmp_path: Path, name: str) -> None:
    refused(ple(*gen_words(policy, tmp_path / name, tmp_path / "data")), 2, tmp_path / name, "does not exist")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("q.jsonl", "", ["is empty"]),
        ("q.jsonl", "\n\n", ["has no rows"]),
        ("q.json", "[]", ["has no rows"]),
        ("q.txt", "text", ["unknown format '.txt'", ".jsonl"]),
        ("q.jsonl", '{"x": "a"}\n{"x": "b"\n{"x": "c"}\n', ["line 2", "no valid JSON"]),
        ("q.jsonl", '{"x": "a"}\n"b"\n', ["line 2", "not an object"]),
        ("q.csv", "id,x\n1,a\n2\n", ["line 3", "fields"]),
        ("q.parquet", "PAR1 and no more", ["no whole Parquet file"]),
        ("q.jsonl", '{"text": "a"}\n', ["no column x", "columns are text", "--query-column"]),
        ("q.jsonl", '{"x": "a"}\n{"x": 5}\n', ["line 2", "column x must be text", "5"]),
        ("q.jsonl", '{"x": "a"}\n{"x": null}\n', ["line 2", "column x must be text", "None"]),
        ("q.jsonl", '{"x": "a"}\n{"x": " "}\n', ["empty queries", "line 2"]),
        ("q.jsonl", '{"x": "a", "id": 1}\n{"x": "b", "id": 1}\n', ["duplicate ids", "line 1", "line 2"]),
        ("q.jsonl", '{"x": "' + "word " * 300 + '"}\n', ["no query", "--max-query-tokens"]),
    ],
)
def test_queries_that_cannot_be_used(policy: Path, tmp_path: Path, name: str, content: str, facts: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    refused(ple(*gen_words(policy, path, tmp_path / "data")), 2, path, *facts)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("content", "facts"),
    [(None, ["neither built in (hh, imdb, tldr, none) nor a file"]), ("", ["is empty"]), (b"\xff\xfe", ["not UTF-8"])],
)
def test_principles_that_cannot_be_used(
    policy: Path, queries: Path, tmp_path: Path, content: str | bytes | None, facts: list[str]
) -> None:
    path = tmp_path / "principles.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = gen_words(policy, queries, tmp_path / "data")
    words[words.index("imdb")] = path
    refused(ple(*words), 2, path, *facts)


@pytest.mark.parametrize(
    ("option", "text", "fact"),
    [
        ("--principles", "Be kind to all who ask. " * 20, "nor a file"),
        ("--queries", "Why is the sky blue? " * 20, "does not exist"),
        ("--reward-model", "Rate how kind it is. " * 20, "does not exist"),
        ("--reward-model", "Rate: how kind it is. " * 20, "expected file.py:function"),
        ("--reward-model", "rate" * 80 + ".py:f", "there is no file"),
        ("--reward-model", "Rate how kind it is. " * 20 + "[1]", "does not exist"),
    ],
)
def test_a_text_in_place_of_a_path_is_no_path(
    policy: Path, queries: Path, tmp_path: Path, option: str, text: str, fact: str
) -> None:
    refused(ple(*gen_words(policy, queries, tmp_path / "data"), option, text), 2, text[:20], fact)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (None, ["does not exist"]),
        ("", ["is empty"]),
        ('{"x": "a", "y": "b"}\n{"x": \n', ["line 2"]),
        ('{"x": "a"}\n', ["no column y or response", "it has x"]),
        ('{"x": "a", "y": "b"}\n{"x": "a", "y": null}\n', ["line 2", "y is missing"]),
        ('{"x": "a", "y": "b"}\n{"x": "a", "y": 3}\n', ["line 2", "y"]),
        ('{"x": "a", "y": "b"}\n{"x": 7, "y": "c"}\n', ["line 2", "x"]),
    ],
)
def test_sft_rows_that_cannot_be_used(policy: Path, tmp_path: Path, content: str | None, facts: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    found = ple("sft", "--model", policy, "--data", path, "--output", tmp_path / "out")
    refused(found, 2, path, *facts)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (None, ["does not exist"]),
        ('{"text": "a", "label": 0}\n{"text"\n', ["line 2"]),
        ('{"text": "a"}\n', ["text, label or prompt, chosen, rejected", "it has text"]),
        ('{"text": "a", "label": 0}\n{"text": "b", "label": "good"}\n', ["line 2", "label 'good'"]),
        ('{"text": "a", "label": 0}\n{"text": "b", "label": 0}\n', ["every label is 0"]),
        ('{"text": "a", "label": 0}\n{"text": 4, "label": 1}\n', ["line 2", "text"]),
        ('{"prompt": "a", "chosen": "b", "rejected": null}\n', ["line 1", "rejected is missing"]),
    ],
)
def test_reward_rows_that_cannot_be_used(policy: Path, tmp_path: Path, content: str | None, facts: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    found = ple("reward", "--model", policy, "--data", path, "--output", tmp_path / "out")
    refused(found, 2, path, *facts)
    assert not (tmp_path / "out" / "config.json").exists()


# Models, adapters, tokenizers


@pytest.mark.parametrize("command", ["gen", "train", "sft", "reward", "score"])
@pytest.mark.parametrize("kind", ["missing", "empty", "file", "cut"])
def test_model_directory_that_is_none(
    policy: Path, reward: Path, queries: Path, whole_data: Path, tmp_path: Path, command: str, kind: str
) -> None:
    model = tmp_path / "model"
    if kind == "empty":
        model.mkdir()
    elif kind == "file":
        model.write_text("no model")
    elif kind == "cut":
        shutil.copytree(reward if command == "score" else policy, model)
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"x": "a", "y": "b", "text": "a", "label": 1}\n')
    words: dict[str, list[object]] = {
        "gen": gen_words(model, queries, tmp_path / "out"),
        "train": train_words(model, whole_data, tmp_path / "out"),
        "sft": ["sft", "--model", model, "--data", rows, "--output", tmp_path / "out"],
        "reward": ["reward", "--model", model, "--data", rows, "--output", tmp_path / "out"],
        "score": ["score", "--reward-model", model, "--data", whole_data, "--output", tmp_path / "out"],
    }
    refused(ple(*words[command]), 2, model)
    assert not list(tmp_path.glob("out/**/*.parquet"))
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("command", ["gen", "train"])
@pytest.mark.parametrize("kind", ["missing", "model", "other base", "unfinished"])
def test_adapter_that_does_not_fit(
    policy: Path, adapter: Path, queries: Path, whole_data: Path, tmp_path: Path, command: str, kind: str
) -> None:
    wrong = tmp_path / "adapter"
    if kind == "model":
        shutil.copytree(policy, wrong)
    elif kind == "other base":
        tiny.tiny_adapter(tiny.tiny_policy(tmp_path / "other", hidden=32), wrong)
    elif kind == "unfinished":
        shutil.copytree(adapter, wrong)
        (wrong / "adapter_model.safetensors").unlink()
    words = {
        "gen": gen_words(policy, queries, tmp_path / "out", "--adapter", wrong),
        "train": train_words(policy, whole_data, tmp_path / "out", "--adapter", wrong),
    }
    refused(ple(*words[command]), 2, wrong)
    assert not list(tmp_path.glob("out/**/*.parquet"))


@pytest.mark.long
def test_adapter_over_the_engines_rank(
    policy: Path, adapter: Path, queries: Path, tmp_path: Path, run_ple, vllm_python: str
) -> None:
    words = gen_words(policy, queries, tmp_path / "data", "--adapter", adapter, "--engine-arg", "max_lora_rank=4")
    words[words.index("hf")] = "vllm"
    found = run_ple(*words, python=vllm_python)
    refused(found, 2, adapter, "rank 8", "max_lora_rank", "4")
    assert not (tmp_path / "data").exists()


def test_tokenizer_without_eos(queries: Path, whole_data: Path, tmp_path: Path) -> None:
    model = tiny.tiny_policy(tmp_path / "model", eos=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"x": "a", "y": "b"}\n')
    refused(ple(*gen_words(model, queries, tmp_path / "data")), 2, model, "no EOS token", "tokenizer_config.json")
    found = ple("sft", "--model", model, "--data", rows, "--output", tmp_path / "out")
    refused(found, 2, model, "no EOS token", "tokenizer_config.json")


def test_tokenizer_without_pad_works(queries: Path, tmp_path: Path) -> None:
    model = tiny.tiny_policy(tmp_path / "model", pad=False)
    found = ple(*gen_words(model, queries, tmp_path / "data"))
    assert found.exit_code == 0
    assert "no pad token" in found.stderr
    assert sum(shard.rows for shard in Store(tmp_path / "data").shards("responses")) == QUERIES


def test_reward_model_with_two_outputs_needs_a_choice(whole_data: Path, tmp_path: Path) -> None:
    model = tiny.tiny_reward(tmp_path / "reward", num_labels=2)
    words = ["score", "--data", whole_data, "--output", tmp_path / "out", "--reward-model", model]
    refused(ple(*words), 2, model, "2 outputs", "--output-index")
    refused(ple(*words, "--output-index", 2), 2, model, "2")
    assert ple(*words, "--output-index", 1).exit_code == 0


def test_reward_model_that_cannot_be_is_refused_before_anything_is_sampled(
    policy: Path, queries: Path, tmp_path: Path
) -> None:
    two = tiny.tiny_reward(tmp_path / "two", num_labels=2)
    words = [*gen_words(policy, queries, tmp_path / "data"), "--reward-model"]
    refused(ple(*words, "nosuch.py:f"), 2, "there is no file", "nosuch.py")
    refused(ple(*words, two), 2, two, "--output-index")
    refused(ple(*words, tmp_path / "nothing"), 2, tmp_path / "nothing")
    assert not (tmp_path / "data").exists()


def test_reward_labels_from_a_csv_file(policy: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\ngood,1\nbad,0\n")
    assert ple("reward", "--model", policy, "--data", path, "--output", tmp_path / "out").exit_code == 0


def test_a_reward_model_that_is_no_path_is_refused_where_it_is_loaded(whole_data: Path) -> None:
    refused(ple("score", "--data", whole_data, "--reward-model", "Rate how kind it is. " * 20), 2, "Rate how")


def test_reward_function_that_is_not_there_or_gives_nan(whole_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "judge.py"
    source.write_text("def nan(xs, ys):\n    return [float('nan') for _ in ys]\n")
    words = ["score", "--data", whole_data, "--output", tmp_path / "out", "--reward-model"]
    refused(ple(*words, f"{source}:other"), 2, source, "other")
    refused(ple(*words, f"{source}:nan"), 1, "not finite", "query ")
    assert not list(tmp_path.glob("out/pairs/**/*.parquet"))


def test_second_reward_model_is_not_mixed_in(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "judge.py"
    source.write_text("def length(xs, ys):\n    return [float(len(y)) for y in ys]\n")
    refused(ple("score", "--data", data, "--reward-model", f"{source}:length"), 2, "--output")


# Settings


@pytest.mark.parametrize("alpha", ["0", "1", "1.5", "-0.1", "nan", "much"])
@pytest.mark.parametrize("command", ["train", "inspect"])
def test_alpha_outside_its_range(policy: Path, whole_data: Path, tmp_path: Path, command: str, alpha: str) -> None:
    words = {"train": train_words(policy, whole_data, tmp_path / "out"), "inspect": ["inspect", whole_data]}
    found = ple(*words[command], "--alpha", alpha)
    assert found.exit_code == 2
    assert "alpha" in found.stderr
    assert "Traceback" not in found.stderr


def test_rounds_without_pairs(policy: Path, reward: Path, data: Path, queries: Path, tmp_path: Path) -> None:
    refused(ple(*train_words(policy, tmp_path / "nothing", tmp_path / "out")), 2, tmp_path / "nothing", "pairs")
    unscored = tmp_path / "unscored"
    assert ple(*gen_words(policy, queries, unscored)).exit_code == 0
    refused(ple(*train_words(policy, unscored, tmp_path / "out")), 2, unscored, "pairs", "ple-score")
    later = [*train_words(policy, data, tmp_path / "out"), "--round", 3]
    refused(ple(*later), 2, data, "no pairs of round 1")
    refused(ple(*later, "--dry-run"), 2, data, "no pairs of round 1")
    refused(ple("score", "--data", data, "--round", 3, "--reward-model", reward), 2, "round 3", data)


def test_other_settings_in_a_round_that_was_begun(policy: Path, data: Path, queries: Path) -> None:
    before = tree(data)
    found = ple(*gen_words(policy, queries, data, "--temperature", 0.5))
    refused(found, 2, data, "round 0", "temperature", "0.5", "1.0")
    assert tree(data) == before


# Damage


def shard_of(data: Path, kind: str = "pairs") -> Path:
    return sorted((data / kind).glob("**/*.parquet"))[0]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def make_newer(path: Path) -> None:
    table = pq.read_table(path)
    record = json.loads(table.schema.metadata[b"ple"]) | {"version": 99}
    pq.write_table(table.replace_schema_metadata({b"ple": json.dumps(record).encode()}), path)


def change_columns(path: Path) -> None:
    table = pq.read_table(path)
    table = table.drop_columns(["s"]).append_column("margin", pa.array([0.0] * len(table)))
    pq.write_table(table, path)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, make_newer, change_columns, Path.unlink])
def test_damaged_pairs_are_refused_and_named(policy: Path, data: Path, tmp_path: Path, damage) -> None:
    path = shard_of(data)
    damage(path)
    refused(ple(*train_words(policy, data, tmp_path / "out")), 3, path.name)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    found = ple("verify", data)
    assert found.exit_code == 3
    assert path.name in found.stdout
    assert "Traceback" not in found.stderr
    if damage is not flip_a_bit:
        refused(ple("inspect", data), 3, path.name)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, make_newer, Path.unlink])
def test_damaged_responses_are_refused_and_named(data: Path, tmp_path: Path, reward: Path, damage) -> None:
    path = shard_of(data, "responses")
    damage(path)
    found = ple("score", "--data", data, "--output", tmp_path / "out", "--reward-model", reward)
    refused(found, 3, path.name)


def test_no_data_directory(tmp_path: Path) -> None:
    for command in ("inspect", "verify"):
        refused(ple(command, tmp_path / "nothing"), 2, tmp_path / "nothing")


# Disks


def tree(root: Path) -> dict[str, bytes]:
    """Every file that readers see."""
    files = (path for path in root.rglob("*") if path.is_file() and ".ple" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_file_in_place_of_a_directory(
    policy: Path, queries: Path, whole_data: Path, reward: Path, tmp_path: Path
) -> None:
    """Root may write everywhere, but not below a file."""
    place = tmp_path / "file"
    place.write_text("kept")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"x": "a", "y": "b"}\n')
    for words in (
        gen_words(policy, queries, place),
        ["score", "--data", whole_data, "--reward-model", reward, "--output", place],
        train_words(policy, whole_data, place),
        ["sft", "--model", policy, "--data", rows, "--output", place / "below"],
    ):
        refused(ple(*words), 1, place)
    assert place.read_text() == "kept"


def test_read_only_disk(policy: Path, queries: Path, reward: Path, whole_data: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for words in (
        gen_words(policy, queries, small_disk / "data"),
        ["score", "--data", whole_data, "--reward-model", reward, "--output", small_disk / "data"],
        train_words(policy, whole_data, small_disk / "out"),
    ):
        refused(ple(*words), 1, small_disk, "ead-only")


def test_full_disk_and_room_again(policy: Path, queries: Path, whole_data: Path, small_disk: Path) -> None:
    """What was committed before stays, and the same command finishes when there is room."""
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        file.write(bytes(2**20 - 100_000))
    words = gen_words(policy, queries, small_disk / "data", "--unit-size", 1, "--max-new-tokens", 40)
    refused(ple(*words), 1, small_disk, "No space left")
    committed = tree(small_disk / "data")
    ballast.unlink()
    assert ple(*words).exit_code == 0
    after = tree(small_disk / "data")
    assert committed.items() <= after.items()
    assert len(after) == QUERIES
    assert ple("verify", small_disk / "data").exit_code == 0


@pytest.mark.parametrize("command", ["gen", "train"])
def test_file_size_limit_and_none_again(
    policy: Path, queries: Path, whole_data: Path, tmp_path: Path, command: str
) -> None:
    """A limit on the size of a file stands for a full disk where nothing can be mounted."""
    words = {
        "gen": gen_words(policy, queries, tmp_path / "out"),
        "train": train_words(policy, whole_data, tmp_path / "out"),
    }[command]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    refused(start(words, preexec_fn=limit), 1, tmp_path / "out", "File too large")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert ple(*words).exit_code == 0


def start(words: list[object], **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, **more)


# Interruption


@pytest.mark.parametrize(("command", "number"), [("gen", signal.SIGINT), ("train", signal.SIGTERM)])
def test_interrupted_command_goes_on(
    policy: Path, queries: Path, whole_data: Path, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    words, sign = {
        "gen": (gen_words(policy, queries, out, "--unit-size", 1, "--max-new-tokens", 60), ".ple/commits/**/*.json"),
        "train": (
            train_words(policy, whole_data, out, "--epochs", 15, "--batch-size", 1, "--checkpoint-every", 2),
            ".ple/checkpoints/checkpoint-*/state.json",
        ),
    }[command]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 200
    while not list(out.glob(sign)) and process.poll() is None:
        assert time.monotonic() < deadline, "the command did nothing that could be interrupted"
        time.sleep(0.01)
    process.send_signal(number)
    printed, messages = process.communicate(timeout=100)
    assert (process.returncode, printed) == (130, ""), messages
    assert messages.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in messages
    before = tree(out)
    found = ple(*words)
    assert found.exit_code == 0, found.stderr
    assert before.items() <= tree(out).items()
    done = "done before" if command == "gen" else "training: "
    assert done in found.stderr


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("gen", "samples", 10**20),
        ("gen", "samples", 10**9),
        ("train", "lora-rank", 10**20),
        ("train", "lora-alpha", 1e300),
        ("train", "learning-rate", 1e300),
        ("train", "weight-decay", 1e300),
        ("judge", "concurrency", 10**9),
        ("demo", "rounds", 10**12),
    ],
)
def test_numbers_that_no_machine_could_follow_are_refused(command, option, value):
    found = ple(command, f"--{option}", value)
    assert found.exit_code == 2
    assert re.search(rf"Error: Invalid value for '--{option}': \S+ is not in the range", found.stderr)
