"""The command line: quick help that teaches, options that match the functions, errors as one line and a code."""

import ast
import os
import pkgutil
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

import cli
from ple_data.common.command import is_out_of_memory
from schemas import options
from schemas.errors import DamagedError, LockedError, PleError, UsageError
from tests.conftest import ROOT

HEAVY = {"torch", "transformers", "peft", "vllm", "polars", "pyarrow", "pydantic", "numpy", "datasets", "matplotlib"}
COMMANDS = sorted(cli.ple.commands)


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def options_of(command: click.Command) -> dict[str, click.Parameter]:
    return {parameter.name: parameter for parameter in command.params if parameter.expose_value}


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=lambda words: words[0] if words else "ple")
def test_help_answers_at_once_without_heavy_imports(words: list[str]) -> None:
    """Processor seconds, not the clock's: other work on the machine must not fail this."""
    script = (
        "import sys\nfrom cli import ple\n"
        f"try: ple({[*words, '--help']!r}, prog_name='ple')\n"
        f"finally: print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.returncode == 0
    assert found.stderr.strip() == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(runner: CliRunner, name: str) -> None:
    command = cli.ple.commands[name]
    found = runner.invoke(cli.ple, [name, "--help"])
    assert found.exit_code == 0
    assert "Example:\n    ple" in found.output
    for parameter in options_of(command).values():
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in found.output
    assert "[default: 0.9" in found.output or name not in ("train", "inspect")


def test_help_documents_exit_codes_and_completion(runner: CliRunner) -> None:
    text = runner.invoke(cli.ple, ["--help"]).output
    for code in ("0 ", "1 ", "2 ", "3 ", "4 ", "130 "):
        assert f"\n    {code}" in text
    assert "_PLE_COMPLETE=bash_source" in text


def test_console_scripts_are_the_subcommands() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ple": "cli:ple", "ple-gen": "cli:gen", "ple-score": "cli:score", "ple-train": "cli:train"}
    for name in ("gen", "score", "train"):
        assert cli.ple.commands[name] is getattr(cli, name)


def test_a_function_given_by_its_name_takes_the_options_of_its_command() -> None:
    """No type checker sees these calls."""
    calls = [node for node in ast.walk(ast.parse(Path(cli.__file__).read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if ast.unparse(call.func) == "command" and isinstance(call.args[2], ast.Constant)]
    assert len(named) > 8
    for call in named:
        kind, function = getattr(options, call.args[1].attr), pkgutil.resolve_name(call.args[2].value)
        takes = get_type_hints(function)
        del takes["return"]
        by_name = "by_name" in [keyword.arg for keyword in call.keywords]
        assert takes.keys() == {known.name for known in kind.in_order()} if by_name else list(takes.values()) == [kind]


def test_version(runner: CliRunner) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for command in (cli.ple, cli.gen, cli.score, cli.train):
        assert version in runner.invoke(command, ["--version"]).output


def test_shell_completion() -> None:
    environment = {**os.environ, "_PLE_COMPLETE": "bash_complete", "COMP_WORDS": "ple ins", "COMP_CWORD": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "cli"], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert found.stdout == "plain,inspect\n"


# Errors


def test_torch_words_a_full_cpu_memory_as_we_know_it() -> None:
    with pytest.raises(RuntimeError, match=re.escape(CPU_FULL[:44])) as full:
        torch.empty(10**15)
    assert is_out_of_memory(full.value)


CPU_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes."


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PleError("it failed"), 1, "error: it failed\n"),
        (UsageError("wrong option"), 2, "error: wrong option\n"),
        (DamagedError("cut short"), 3, "error: cut short\n"),
        (LockedError("locked by pid 1 on host"), 4, "error: locked by pid 1 on host\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on\n"),
        (OSError(28, "No space left on device", "/data/x"), 1, "error: /data/x: No space left on device; what"),
        (MemoryError(), 1, "error: out of memory; what was committed before is safe, run the same command again"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "error: out of memory; "),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] " + CPU_FULL), 1, "error: out of memory; "),
        (RuntimeError("odd"), 1, "error: unexpected RuntimeError: odd"),
        (ValueError("odd\nmore"), 1, "error: unexpected ValueError: odd (--debug shows where"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_one_line_and_a_code(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr("ple_data.inspection.inspect", fail)
    found = runner.invoke(cli.ple, ["inspect", "somewhere"])
    assert found.exit_code == code
    assert found.stderr.startswith(message)
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""
    if code != 130:
        for words in (["--debug", "inspect", "somewhere"], ["inspect", "somewhere", "--debug"]):
            debugged = runner.invoke(cli.ple, words)
            assert debugged.exit_code == code
            assert "Traceback (most recent call last)" in debugged.stderr
            assert type(error).__name__ in debugged.stderr


ENGINE_ARG = "--engine-arg batch_size=N (hf) or max_num_seqs=N (vllm)"


@pytest.mark.parametrize(
    ("words", "function", "advice"),
    [
        ("purity --run r", "ple_train.measure.purity.purity", "a lower --microbatch-tokens"),
        ("judge a b --judge reward:r --output o", "ple_data.judge.judge.judge", "a lower --batch-tokens"),
        (
            "baseline dpo --model m --data d --round 0 --output o",
            "ple_train.baselines.dpo.dpo",
            "a lower --microbatch-tokens, or with --gradient-checkpointing",
        ),
        (
            "cases --policy a=m --queries q --output o",
            "ple_data.evaluation.cases.cases",
            f"a lower {ENGINE_ARG}, or with a lower --batch-tokens",
        ),
    ],
    ids=lambda value: value.split()[0],
)
def test_out_of_memory_names_options_that_the_command_has(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, words: str, function: str, advice: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(function, fail)
    found = runner.invoke(cli.ple, words.split())
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith(f"error: out of memory; less is needed with {advice}; what was committed before")


@pytest.mark.parametrize("command", ["eval", "cases"])
@pytest.mark.parametrize("option", ["--model", "--adapter"])
def test_where_policies_have_names_other_options_point_to_policy(runner: CliRunner, command: str, option: str) -> None:
    for more in ([], ["--policy", "a=m"]):
        found = runner.invoke(cli.ple, [command, *more, option, "m", "--queries", "q", "--output", "o"])
        assert found.exit_code == 2
        assert f"Error: {option}: policies have names here: give --policy NAME=MODEL or" in found.stderr
    assert f" {option} " not in runner.invoke(cli.ple, [command, "--help"]).stdout


def test_debug_shows_the_traceback_and_nothing_else_does(run_ple, tmp_path: Path) -> None:
    plain = run_ple("inspect", tmp_path / "nothing")
    debug = run_ple("inspect", tmp_path / "nothing", "--debug")
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert plain.stdout == debug.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--alpha", "1"], "Invalid value for '--alpha': 1.0 is not in the range 0<x<1."),
        (["gen", "--samples", "0"], "Invalid value for '--samples': 0 is not in the range 1<=x<=10000."),
        (["gen", "--modle", "m"], "No such option '--modle'."),
        (["score", "--data", "d"], "Missing option '--reward-model'."),
        (["genn"], "No such command 'genn'."),
        (["score", "--data", ""], "Invalid value for '--data': must not be an empty text"),
    ],
)
def test_wrong_options_are_usage_errors(runner: CliRunner, words: list[str], message: str) -> None:
    found = runner.invoke(cli.ple, words)
    assert found.exit_code == 2
    assert message.rstrip(".") in found.stderr
    assert found.stdout == ""


def test_a_judge_scores_without_the_workers_that_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    monkeypatch.setattr("ple_data.sampling.generate.generate", lambda chosen: SimpleNamespace(dry_run=None))
    monkeypatch.setattr(cli, "_score", scored.append)
    asked = {"model": "m", "queries": "q", "data": "d", "round": 0, "principles": "hh", "workers": 2}
    for spec in ("judge:m", "http://127.0.0.1:9"):
        cli._gen(options.Gen(**asked, reward_model=[spec], reward_endpoint="http://127.0.0.1:9"))
    assert [(chosen.workers, chosen.rubric) for chosen in scored] == [(None, "hh"), (2, None)]


def recipe_file(folder: Path) -> Path:
    values = {"model": "m", "queries": "q", "principles": "hh", "reward_model": "r", "run_dir": str(folder / "run")}
    stages = {name: {"command": [sys.executable, "-c", "pass"]} for name in ("gen", "score", "train")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | stages))
    return path


def test_dry_run_prints_shell_lines_and_starts_nothing(runner: CliRunner, tmp_path: Path) -> None:
    found = runner.invoke(cli.ple, ["run", str(recipe_file(tmp_path)), "--set", "rounds=2", "--dry-run"])
    assert found.exit_code == 0
    assert len(found.stdout.splitlines()) == 6
    assert found.stderr == ""
    assert not (tmp_path / "run").exists()


def test_closed_pipe_is_quiet(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run(
        [sys.executable, "-m", "cli", "run", str(recipe_file(tmp_path)), "--dry-run"],
        stdout=writing,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        timeout=60,
    )
    os.close(writing)
    assert (found.returncode, found.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_is_130_and_one_line(number: signal.Signals, tmp_path: Path) -> None:
    """A reward function that does not return stands for any long work."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def score(xs, ys):\n"
        "    pathlib.Path(__file__).with_name('begun').touch()\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"query_id": "q", "x": "the film", "y": "was good"}\n')
    rows, judge = str(tmp_path / "rows.jsonl"), f"reward:{tmp_path / 'slow.py'}:score"
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "judge", rows, rows, "--judge", judge, "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    out, messages = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert messages.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in messages
