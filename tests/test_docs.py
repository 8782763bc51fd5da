"""The examples of README and docs, run as they stand there, on a small world whose files have the names they use."""

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import CliRunner

import cli
from ple_data.report import watch
from ple_train.demo.world import text_of
from ple_train.run import rounds
from ple_train.run.child import Ended
from schemas.recipe import Recipe, parse_recipe
from tests.conftest import ROOT
from tests.judgeserver import JudgeServer
from tests.ple_data.judge.test_annotation import export

ELSEWHERE = (
    "--model Qwen/",
    "weqweasdas/",
    "recipes/",
    "last-week",
    "OLD",
    "OTHER",
    "…",
    "ple.yaml",
    "principle.yaml",
    "--reward-format",
    "model.gguf",
    "--real",
)
"""Words of examples that need a hub model, several machines, files the reader has, or many minutes: what these
do is tried in tests/ple_train/demo and tests/ple_train/model/test_convert.py."""
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = ["README.md", "docs/training.md"]
PAGES = [
    "README.md",
    "docs/start.md",
    "docs/hub.md",
    "docs/baselines.md",
    "docs/ecosystem.md",
    "docs/evaluation.md",
    "docs/judging.md",
    "docs/report.md",
    "docs/rewards.md",
]


def examples(page: str) -> list[list[str]]:
    """The words of every `ple` command of a page that can run here."""
    blocks = [text for language, text in FENCED.findall((ROOT / page).read_text()) if language in ("", "bash")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.match(r"ple(-\w+)? ", line)]
    return [shlex.split(line, comments=True) for line in commands if not any(word in line for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def world(policy: Path, adapter: Path, reward: Path, run_forked: Callable[..., Ended], tmp_path_factory) -> Path:
    """Models, queries, responses, a run of one round and its store."""
    root = tmp_path_factory.mktemp("world")
    for name, source in {"M": policy, "sft": policy, "run/sft": policy, "R": reward, "reward": reward}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(source)
    (root / "run" / "reward").symlink_to(reward)
    (root / "run" / "dpo").symlink_to(adapter)
    queries = [{"id": f"q{n}", "x": f"the story of scene {n} was", "reference": f" very good. {n}"} for n in range(70)]
    for name, count in {"q.jsonl": 70, "unseen.jsonl": 6, "cases.jsonl": 3}.items():
        write_rows(root / name, queries[:count])
    for name in ("tuned", "base", "A", "B", "chosen", "rejected", "a", "b"):
        write_rows(
            root / f"{name}.jsonl", [{"id": q["id"], "x": q["x"], "y": f" {name} {q['id']}"} for q in queries[:6]]
        )
    beside = {"topic": "film", "score_chosen": 1.0, "score_rejected": 0.5}
    pairs = [{"prompt": q["x"], "chosen": " good.", "rejected": " very bad."} | beside for q in queries[:6]]
    for name in ("preferences", "held_out"):
        write_rows(root / f"{name}.jsonl", pairs)
    for name in ("judge", "second_judge", "length_reward", "len"):
        (root / f"{name}.py").write_text("def score(xs, ys):\n    return [float(len(y)) for y in ys]\n")
    run = {
        "model": str(policy),
        "queries": str(root / "unseen.jsonl"),
        "principles": "hh",
        "reward_model": str(reward),
        "run_dir": str(root / "runs" / "hh-qwen"),
        "rounds": 1,
        "gen": {"engine": "hf", "max_new_tokens": 8},
        "train": {"learning_rate": 0.01, "batch_size": 3},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "run_child", run_forked)
        rounds.run(parse_recipe(run, "test"))
    for place in (root / "data", root / "run" / "data"):
        shutil.copytree(root / "runs" / "hh-qwen" / "data", place)
    for place in (root / "policy", root / "run" / "policy"):
        for t in ("round=000", "round=001", "round=004"):
            shutil.copytree(root / "runs" / "hh-qwen" / "policy" / "round=000", place / t)
    for words in (
        ["judge", "A.jsonl", "B.jsonl", "--judge", "reward:judge.py:score", "--output", "judged"],
        ["eval", "--policy", "a=M", "--queries", "unseen.jsonl", "--max-new-tokens", 8, "--output", "eval"],
        ["cases", "--policy", "a=M", "--queries", "cases.jsonl", "--max-new-tokens", 8, "--output", "cases"],
    ):
        with contextlib.chdir(root):
            run_here(words)
    shutil.copytree(root / "judged", root / "judge")
    (root / "demo-real").mkdir()  # what `ple demo --real` leaves, in small
    for name, source in {"smol": policy, "run": root / "runs" / "hh-qwen"}.items():
        (root / "demo-real" / name).symlink_to(source)
    for name in ("held-out", "openings"):
        shutil.copy(root / "unseen.jsonl", root / "demo-real" / f"{name}.jsonl")
    judge = "def {}(xs, ys):\n    return [float(len(y)) for y in ys]\n"
    (root / "demo-real" / "lexicons.py").write_text("".join(map(judge.format, ("praise", "pattern", "blame"))))
    settings = {"output": "demo-real", "rounds": 2, "queries": 6, "tau0": 0.2, "alpha": 0.9}
    (root / "demo-real" / "recipe.yaml").write_text(text_of("real.yaml").format(**settings))
    (root / "demo-real" / "harsh.txt").write_text("Write a negative review.")
    return root


def run_here(words: Sequence[object]) -> None:
    found = CliRunner().invoke(cli.ple, list(map(str, words)))
    assert found.exit_code == 0, f"ple {shlex.join(map(str, words))}\n{found.output}"


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("page", PAGES)
def test_examples_run_as_they_stand(
    page: str, world: Path, run_forked: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "run_child", run_forked)
    here = Path(shutil.copytree(world, tmp_path / "here", symlinks=True))
    if page == "docs/baselines.md":  # it makes its own
        shutil.rmtree(here / "data")
        shutil.rmtree(here / "policy")
    elif page == "docs/evaluation.md":
        shutil.rmtree(here / "eval")
        shutil.rmtree(here / "cases")
    elif page == "docs/hub.md":
        shutil.rmtree(here / "eval")
    monkeypatch.chdir(here)
    commands = examples(page)
    assert commands
    with contextlib.closing(JudgeServer()) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        for words in commands:
            program, *rest = [word.replace("98304", "3000") for word in words]  # PPO's budget, for a shorter test
            if any(word.startswith(("openai:", "judge:")) for word in rest):
                shutil.rmtree(here / "judged", ignore_errors=True)  # another judge's
                rest = asked_at(server.url, rest)
            if "--watch" in rest:  # until Ctrl-C
                rest += ["--port", "0"]
                monkeypatch.setattr(watch.Server, "look", Mock(side_effect=KeyboardInterrupt))
            if "--read" in rest:
                annotate(here / "page", here / "exports")
            run_here(rest if program == "ple" else [program.removeprefix("ple-"), *rest])
    if page == "docs/start.md":  # of what these commands left
        run_snippets(page)


def asked_at(url: str, words: list[str]) -> list[str]:
    """The words with a local server for the paid endpoint."""
    if "--endpoint" in words:
        at = words.index("--endpoint")
        words = words[:at] + words[at + 2 :]
    return [*words, "--reward-endpoint" if words[0] == "reward" else "--endpoint", url]


def annotate(page: Path, exports: Path) -> None:
    """What two people's browsers would save."""
    exports.mkdir()
    for name in ("Ann", "Bo"):
        export(page, name, {"q0": "a", "q1": "b"}).rename(exports / f"{name}.json")


@pytest.mark.parametrize("page", SNIPPETS)
def test_python_examples_run_as_they_stand(page: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    run_snippets(page)


def run_snippets(page: str) -> None:
    """Every Python example of a page, here."""
    snippets = [text for language, text in FENCED.findall((ROOT / page).read_text()) if language == "python"]
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {})


def test_the_notebook_runs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Jupyter starts it, in its own folder."""
    import nbclient
    import nbformat

    run = Path(shutil.copytree(world / "runs" / "hh-qwen", tmp_path / "run", symlinks=True))
    monkeypatch.setenv("PLE_RUN", "run")
    (tmp_path / "examples").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "look_at_pairs.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "examples")}}
    ).execute()
    assert (run / "residual" / "adapter_model.safetensors").exists()


def test_every_key_of_a_recipe_is_explained() -> None:
    table = [
        line.split("|")[1] for line in (ROOT / "docs/recipe.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert {key for cell in table for key in re.findall(r"`(\w+)`", cell)} == set(Recipe.model_fields)
