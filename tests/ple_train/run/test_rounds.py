"""The alternating run: what it starts, what it records, and that it stops, resumes and refuses as it says."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ple_data.common.digests import text_digest
from ple_train.run import rounds
from ple_train.run.child import GRACE_SECONDS, Ended, run_child
from schemas.errors import LockedError, PleError, UsageError
from schemas.recipe import differences, load_recipe, parse_recipe
from tests.conftest import ROOT

STAND_IN = """\
import json, os, pathlib, subprocess, sys, time
name, here = sys.argv[1], pathlib.Path(__file__).parent
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([name, *sys.argv[2:]]) + "\\n")
if (here / f"fail-{name}").exists():
    sys.exit(int((here / f"fail-{name}").read_text()))
if (here / f"hang-{name}").exists():
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (here / "pids.tmp").write_text(f"{os.getpid()} {worker.pid}")
    (here / "pids.tmp").rename(here / "pids")
    time.sleep(600)
if "--output" in sys.argv:
    output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
    output.mkdir(parents=True, exist_ok=True)
    (output / "ple.json").touch()
print("this is for stdout")
"""


@pytest.fixture
def bench(tmp_path: Path) -> "Bench":
    return Bench(tmp_path)


class Bench:
    """A recipe whose three commands are a stand-in that writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        script = folder / "stand_in.py"
        script.write_text(STAND_IN)
        (folder / "q.jsonl").write_text('{"x": "a"}\n')
        self.values = {
            "model": "base",
            "queries": str(folder / "q.jsonl"),
            "principles": "hh",
            "reward_model": "judge",
            "run_dir": str(self.run_dir),
            "rounds": 2,
            **{name: {"command": [sys.executable, str(script), name]} for name in ("gen", "score", "train")},
        }

    @property
    def recipe(self):
        return parse_recipe(self.values, "test")

    @property
    def recipe_file(self) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.values))
        return path

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def records(self) -> list[dict]:
        return json.loads((self.run_dir / "stages.json").read_text())["stages"]

    def start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", "cli", "run", str(self.recipe_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def start_and_hang(self, name: str) -> tuple[subprocess.Popen, list[int]]:
        """A run that hangs in its first stage `name`, with the pids of the stage and of its worker."""
        (self.folder / f"hang-{name}").touch()
        process = self.start()
        eventually(lambda: (self.folder / "pids").exists(), "the stage never started")
        return process, [int(pid) for pid in (self.folder / "pids").read_text().split()]

    def release(self, name: str) -> None:
        (self.folder / f"hang-{name}").unlink()


def eventually(holds, message: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def processes_with(mark: str) -> list[int]:
    """Every living process whose environment holds the mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes() and is_running(int(entry.name)):
                found.append(int(entry.name))
    return found


def words_of(stage: rounds.Stage) -> list[str]:
    return list(stage.command[3:])


def named_words(stage: rounds.Stage) -> dict[str, str]:
    words = words_of(stage)
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}


def test_plan_passes_the_policy_from_round_to_round(bench: Bench) -> None:
    gen0, score0, train0, gen1, _, train1 = rounds.plan(bench.recipe)
    run = bench.run_dir
    queries = bench.values["queries"]
    data0 = ["--data", f"{run}/data", "--round", "0"]
    assert words_of(gen0) == ["--model", "base", "--queries", queries, "--principles", "hh", *data0, "--seed", "0"]
    assert words_of(score0) == [*data0, "--reward-model", "judge"]
    output = ["--output", f"{run}/policy/round=000", "--metrics", f"{run}/metrics/round=000.parquet"]
    threshold = ["--tau0", "0.2", "--alpha", "0.9", "--seed", "0"]
    assert words_of(train0) == ["--model", "base", *data0, *output, *threshold]
    for stage in (gen1, train1):
        assert words_of(stage)[:4] == ["--model", "base", "--adapter", f"{run}/policy/round=000"]


def test_plan_puts_reward_model_and_sft_first(bench: Bench) -> None:
    command = {"command": [sys.executable, "x", "y"]}
    del bench.values["reward_model"]
    bench.values |= {
        "revision": "v2",
        "reward": {"model": "roberta", "data": "labels.jsonl", "learning_rate": 0.001, **command},
        "sft": {"data": "chosen.jsonl", **command},
        "rounds": 1,
    }
    reward, sft, gen, score, train = rounds.plan(bench.recipe)
    assert [reward.name, sft.name] == ["reward", "sft"]
    given = {"--model": "roberta", "--data": "labels.jsonl", "--learning-rate": "0.001"}
    assert given.items() <= named_words(reward).items()
    assert {"--model": "base", "--revision": "v2"}.items() <= named_words(sft).items()
    for stage, words in ((gen, ["--queries", bench.values["queries"]]), (train, ["--data", f"{bench.run_dir}/data"])):
        assert words_of(stage)[:4] == ["--model", f"{bench.run_dir}/sft", *words]
        assert "--revision" not in words_of(stage)
    assert words_of(score)[-2:] == ["--reward-model", f"{bench.run_dir}/reward"]


def test_plan_gives_each_round_the_next_queries_and_only_changed_options(bench: Bench) -> None:
    bench.values |= {"queries_per_round": 100, "reuse": ["old"]}
    bench.values["gen"] |= {"stop": ["\n\n"], "logprobs": False, "engine_arg": {"a": True, "b": "x", "c": 0.5}}
    bench.values["train"] |= {"max_length": 30, "full": True, "epochs": 1}
    _, _, train, gen1, _, train1 = rounds.plan(bench.recipe)
    words = words_of(gen1)
    asked = ["--engine-arg", "a=true", "--engine-arg", "b=x", "--engine-arg", "c=0.5"]
    at = words.index("--engine-arg")
    assert words[at : at + 6] == asked
    assert words[words.index("--stop") + 1] == "\n\n"
    assert "--no-logprobs" in words
    at = words.index("--shuffle")
    assert words[at : at + 5] == ["--shuffle", "--skip", "100", "--limit", "100"]
    assert words[-2:] == ["--reuse", "old"]
    assert {"--max-length", "--full"} <= set(words_of(train))
    assert "--epochs" not in words_of(train)
    policy = ["--model", f"{bench.run_dir}/policy/round=000"]  # a full model needs no adapter
    assert "--adapter" not in words_of(train1)
    assert words_of(train1)[words_of(train1).index("--model") :][:2] == policy


def test_missing_program_is_named_before_anything_starts(bench: Bench) -> None:
    bench.values["train"] = {"command": ["no-such-program"]}
    assert "no-such-program" in rounds.plan(bench.recipe)[2].shell_line
    with pytest.raises(UsageError, match=r"no such program: train\.command: no-such-program"):
        rounds.run(bench.recipe)
    assert not bench.run_dir.exists()


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("queries", "queries.jsonl", "queries.jsonl does not exist"),
        ("principles", "mine.txt", "principle mine.txt is neither built in"),
        ("reward_model", "reward.py:score", "there is no file .*reward.py"),
        ("reward_model", ["judge", "./rewards/mine[1]"], "model directory ./rewards/mine does not exist"),
        ("model", "./base", "model directory ./base does not exist"),
        ("reuse", ["last-week"], "reuse: last-week is no folder here"),
        ("sft", {"data": "sft.jsonl"}, "sft.jsonl does not exist"),
        ("score", {"rubric": "rubric.txt"}, "rubric.txt is neither built in"),
        ("reward_model", "judge:", "expected judge:MODEL"),
        ("reward_model", "judge:m", "set the environment variable OPENAI_API_KEY"),
        ("reward_model", ["judge", "http://me:secret@h/score"], "reward model"),
        ("score", {"reward_arg": {"model": "x"}}, "--reward-arg model=x: expected NAME=VALUE"),
    ],
)
def test_what_a_later_stage_reads_is_looked_for_before_the_first(
    bench: Bench, key, value, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if "reward_arg" in value:
        bench.values["reward_model"], value = "judge:m", value | {"reward_endpoint": "http://127.0.0.1:9/v1"}
    before = bench.values.get(key)
    bench.values[key] = before | value if isinstance(before, dict) else value
    with pytest.raises(UsageError, match=why):
        rounds.run(bench.recipe)
    assert not bench.calls()
    assert not bench.run_dir.exists()


def test_a_function_that_its_file_lacks_is_found_before_anything_is_sampled(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("raise RuntimeError('not run')\ndef score(xs, ys): ...\n")
    bench.values["reward_model"] = f"{tmp_path / 'reward.py'}:scroe"
    with pytest.raises(UsageError, match=r"reward\.py has no function 'scroe'"):
        rounds.run(bench.recipe)
    assert not bench.calls()


def test_what_finished_stages_read_may_be_gone(bench: Bench) -> None:
    (bench.folder / "fail-score").write_text("1")
    bench.values["rounds"] = 1
    with pytest.raises(PleError, match="round 0 score failed"):
        rounds.run(bench.recipe)
    (bench.folder / "fail-score").unlink()
    Path(bench.values["queries"]).unlink()
    rounds.run(bench.recipe)
    assert [words[0] for words in bench.calls()] == ["gen", "score", "score", "train"]


def test_a_run_that_is_done_needs_its_inputs_no_more(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    rounds.run(bench.recipe)
    Path(bench.values["queries"]).unlink()
    rounds.run(bench.recipe)
    assert capfd.readouterr().err.count("done before") == 6


def test_a_stage_is_one_shell_line_whatever_its_words_hold(bench: Bench) -> None:
    words = ["a\nb", "it's\n\\n", "\x1b[2J", "é\u2028", "plain", "a b", "$HOME\t"]
    line = rounds.Stage("gen", 0, ("printf", "%s\\0", *words)).shell_line
    assert line.isprintable()
    found = subprocess.run(["bash", "-c", line], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert found.stdout.decode().split("\0")[:-1] == words


def test_a_judge_rates_by_the_principles_and_without_them_by_a_rubric_alone(bench: Bench) -> None:
    bench.values |= {"reward_model": ["judge:m", "letters.py:score"], "principles": "imdb"}
    asked = words_of(rounds.plan(bench.recipe)[1])
    assert asked[asked.index("--rubric") + 1] == "imdb"
    bench.values["principles"] = "none"
    with pytest.raises(UsageError, match=r"a judge rates by the principle, and there is none: .*score\.rubric"):
        rounds.run(bench.recipe)
    assert not bench.run_dir.exists()
    bench.values["score"]["rubric"] = "hh"
    asked = words_of(rounds.plan(bench.recipe)[1])
    assert (asked.count("--rubric"), asked[asked.index("--rubric") + 1]) == (1, "hh")


def test_a_finished_stage_takes_another_bound_on_a_judges_answers(bench: Bench) -> None:
    bench.values |= {"reward_model": "judge:m"}
    bench.values["score"]["reward_endpoint"] = "http://127.0.0.1:9/v1"
    rounds.run(bench.recipe)
    for field in ("max_completion_tokens", "max_tokens"):
        bench.values["score"]["reward_arg"] = {field: 4096}
        rounds.run(bench.recipe)
    assert len(bench.calls()) == 6
    bench.values["score"]["reward_arg"] = {"top_p": 0.5}
    with pytest.raises(UsageError, match="round 0 score was done with another recipe"):
        rounds.run(bench.recipe)


def test_with_restart_every_round_is_sampled_by_the_last_policy_and_trained_from_the_start(bench: Bench) -> None:
    plainly = rounds.plan(bench.recipe)
    bench.values["restart"] = True
    *before, gen1, score1, train1 = rounds.plan(bench.recipe)
    assert [*before, gen1, score1] == plainly[:-1]
    words = words_of(plainly[-1])
    at = words.index("--adapter")
    assert words_of(train1) == words[:at] + words[at + 2 :]
    assert "--adapter" in words_of(gen1)


def test_a_stage_is_started_by_its_launcher_which_changes_nothing_else(bench: Bench) -> None:
    bench.values["train"]["launch"] = "env STARTED_BY=torchrun"
    stage = rounds.plan(bench.recipe)[2]
    assert stage.launch == ("env", "STARTED_BY=torchrun")
    assert stage.shell_line.startswith("env STARTED_BY=torchrun /")
    assert stage.command[0] == shutil.which(sys.executable)
    rounds.run(bench.recipe)
    bench.values["train"]["launch"] = ["env", "STARTED_BY=nobody"]
    rounds.run(bench.recipe)  # what is done stays done
    assert [call[0] for call in bench.calls()] == ["gen", "score", "train"] * 2
    bench.values["train"]["launch"] = "no-such-launcher"
    with pytest.raises(UsageError, match=r"train\.launch: no-such-launcher"):
        rounds.run(bench.recipe)


def test_run_records_every_stage_and_repeats_none(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    rounds.run(bench.recipe)
    names = ["gen", "score", "train"] * 2
    assert [call[0] for call in bench.calls()] == names
    records = bench.records()
    assert [(r["stage"], r["round"]) for r in records] == list(zip(names, [0, 0, 0, 1, 1, 1], strict=True))
    for record, stage in zip(records, rounds.plan(bench.recipe), strict=True):
        assert record["command"] == list(stage.command)
        assert record["exit_code"] == 0
        assert record["seconds"] > 0
        assert record["start"] <= record["end"]
    assert capfd.readouterr().out == ""
    rounds.run(bench.recipe)
    assert len(bench.calls()) == 6
    assert parse_recipe(yaml.safe_load((bench.run_dir / "recipe.yaml").read_text()), "frozen") == bench.recipe


@pytest.mark.parametrize(("child", "ours"), [(3, 3), (4, 4), (130, 130), (7, 1)])
def test_failed_stage_stops_the_run_with_its_code_and_is_tried_again(bench: Bench, child: int, ours: int) -> None:
    flag = bench.folder / "fail-score"
    flag.write_text(str(child))
    with pytest.raises(PleError, match=f"round 0 score failed with exit code {child}") as failure:
        rounds.run(bench.recipe)
    assert failure.value.exit_code == ours
    flag.unlink()
    rounds.run(bench.recipe)
    assert [call[0] for call in bench.calls()] == ["gen", "score", "score", "train", "gen", "score", "train"]
    assert [r["exit_code"] for r in bench.records()] == [0, child, 0, 0, 0, 0, 0]


def test_changed_recipe_is_refused_with_the_difference(bench: Bench) -> None:
    rounds.run(bench.recipe)
    before = (bench.run_dir / "recipe.yaml").read_bytes()
    bench.values["train"] |= {"learning_rate": 0.5}
    bench.values["tau0"] = 1.0
    with pytest.raises(UsageError) as refusal:
        rounds.run(bench.recipe)
    assert "tau0: 0.2 -> 1.0" in str(refusal.value)
    assert "train.learning_rate: 0.0001 -> 0.5" in str(refusal.value)
    assert (bench.run_dir / "recipe.yaml").read_bytes() == before
    assert len(bench.calls()) == 6


SECRET = "https://h/r?token=sesame"


def test_a_secret_in_an_address_reaches_the_stage_alone(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    """Not the files of the run nor its messages; the recipe goes on, another secret is another recipe."""
    bench.values |= {"reward_model": SECRET, "rounds": 1}
    (bench.folder / "fail-train").write_text("2")
    with pytest.raises(PleError):
        rounds.run(bench.recipe)
    (bench.folder / "fail-train").unlink()
    bench.values["train"] |= {"learning_rate": 0.5}
    rounds.run(bench.recipe)
    assert [call[0] for call in bench.calls()] == ["gen", "score", "train", "train"]
    assert bench.calls()[1][-2:] == ["--reward-model", SECRET]
    bench.values["reward_model"] = SECRET.replace("sesame", "open sesame")
    with pytest.raises(UsageError, match="round 0 score was done with another recipe") as refusal:
        rounds.run(bench.recipe)
    assert "sesame" not in str(refusal.value) + capfd.readouterr().err + rounds.plan(bench.recipe)[1].shell_line
    assert not [path for path in bench.run_dir.rglob("*") if path.is_file() and b"sesame" in path.read_bytes()]
    kept = f"https://h/r?{text_digest('token=sesame')}"
    assert load_recipe(bench.run_dir / "recipe.yaml").reward_model == kept
    assert kept in bench.records()[1]["command"]


def test_the_users_own_recipe_in_the_run_directory_works_again(bench: Bench) -> None:
    bench.values |= {"reward_model": SECRET, "rounds": 1}
    bench.run_dir.mkdir()
    path = bench.run_dir / "recipe.yaml"
    path.write_text(yaml.safe_dump(bench.values))
    rounds.run(load_recipe(path, ["rounds=2"]))
    assert load_recipe(path).reward_model == SECRET
    assert bench.calls()[-2][-1] == SECRET


def test_a_run_of_0_1_0_whose_address_holds_what_may_be_a_key_goes_on(bench: Bench) -> None:
    """It recorded the path as it stands: the same address, and another one is another."""
    bench.values |= {"reward_model": "http://h/v1/8f434346648f/score?token=sesame", "rounds": 1}
    rounds.run(bench.recipe)
    for path in (bench.run_dir / "stages.json", bench.run_dir / "recipe.yaml"):
        path.write_text(path.read_text().replace(f"[{text_digest('8f434346648f')}]", "8f434346648f"))
    assert "8f434346648f" in bench.records()[1]["command"][-1]
    bench.values["rounds"] = 2
    rounds.run(bench.recipe)
    assert [call[0] for call in bench.calls()] == 2 * ["gen", "score", "train"]
    bench.values["reward_model"] = "http://h/v1/8f434346648e/score?token=sesame"
    with pytest.raises(UsageError, match="round 0 score was done with another recipe"):
        rounds.run(bench.recipe)


def test_recipe_may_change_where_no_finished_stage_depends_on_it(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    (bench.folder / "fail-score").write_text("2")
    with pytest.raises(PleError):
        rounds.run(bench.recipe)
    (bench.folder / "fail-score").unlink()
    bench.values["score"] |= {"output_index": 1}
    bench.values["train"] |= {"microbatch_tokens": 64}
    rounds.run(bench.recipe)
    assert "score.output_index: None -> 1" in capfd.readouterr().err
    bench.values["train"] |= {"microbatch_tokens": 32}
    bench.values["rounds"] = 3
    rounds.run(bench.recipe)
    assert [call[0] for call in bench.calls()] == ["gen", "score", *["score", "train", "gen"] * 2, "score", "train"]
    assert load_recipe(bench.run_dir / "recipe.yaml") == bench.recipe
    bench.values["rounds"] = 1
    with pytest.raises(UsageError, match="round 1 gen was done with another recipe"):
        rounds.run(bench.recipe)


def test_stage_whose_output_is_gone_is_done_again(bench: Bench) -> None:
    rounds.run(bench.recipe)
    shutil.rmtree(bench.run_dir / "policy" / "round=001")
    rounds.run(bench.recipe)
    assert [call[0] for call in bench.calls()] == [*["gen", "score", "train"] * 2, "train"]


def test_recipe_may_change_for_a_stage_whose_output_is_gone(bench: Bench) -> None:
    bench.values["rounds"] = 1
    rounds.run(bench.recipe)
    shutil.rmtree(bench.run_dir / "policy" / "round=000")
    bench.values["train"] |= {"learning_rate": 0.5}
    rounds.run(bench.recipe)
    assert [call[0] for call in bench.calls()] == ["gen", "score", "train", "train"]
    assert "0.5" in bench.calls()[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_survives_a_stopped_run_and_it_resumes(bench: Bench, number: signal.Signals) -> None:
    process, pids = bench.start_and_hang("score")
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in messages
    eventually(lambda: not any(map(is_running, pids)), "a child or its worker outlived the run")
    last = bench.records()[-1]
    assert (last["stage"], last["exit_code"]) == ("score", None if number == signal.SIGKILL else 130)
    bench.release("score")
    again = bench.start()
    assert again.communicate(timeout=60)[0] == ""
    assert again.returncode == 0
    assert [call[0] for call in bench.calls()] == ["gen", "score", "score", "train", "gen", "score", "train"]


def test_two_runs_of_one_directory_exclude_each_other(bench: Bench) -> None:
    process, _ = bench.start_and_hang("gen")
    try:
        with pytest.raises(LockedError, match=f"locked by pid {process.pid} on "):
            rounds.run(bench.recipe)
        second = bench.start()
        second.communicate(timeout=60)
        assert second.returncode == 4
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert len(bench.calls()) == 1


def test_the_lock_is_held_until_the_last_process_of_a_stage_is_gone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, (stage, _) = bench.start_and_hang("gen")
    launcher = int(Path(f"/proc/{stage}/stat").read_text().rpartition(")")[2].split()[1])  # its parent
    os.kill(launcher, signal.SIGKILL)
    process.kill()
    process.wait()
    monkeypatch.setattr(rounds, "GRACE_SECONDS", -4)  # one second of patience
    with pytest.raises(LockedError):
        rounds.run(bench.recipe)
    os.killpg(stage, signal.SIGKILL)
    process.communicate(timeout=60)
    bench.release("gen")
    rounds.run(bench.recipe)
    assert [call[0] for call in bench.calls()] == ["gen", *["gen", "score", "train"] * 2]


def test_worker_left_by_a_finished_command_is_ended(tmp_path: Path) -> None:
    leave = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, file=open(sys.argv[1], 'w'))"
    assert run_child([sys.executable, "-c", leave, str(tmp_path / "pid")]).code == 0
    pid = int((tmp_path / "pid").read_text())
    eventually(lambda: not is_running(pid), "the worker is still there")


def test_run_child_reports_a_signal_as_the_shell_does() -> None:
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).code == 137


def test_run_child_gives_the_codes_of_our_commands() -> None:
    ours = rounds.find_program("ple")
    codes = [run_child([ours, *words]).code for words in (["--help"], ["inspect", "/none"], ["no-such-command"])]
    assert codes == [0, 2, 2]


def test_run_child_knows_the_most_memory_of_the_largest_process() -> None:
    """50 MiB in the command itself, 200 MiB in a child of it that has gone."""
    child = "b'x' * (200 << 20)"
    command = f"import subprocess, sys; b'x' * (50 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    assert 200 <= run_child([sys.executable, "-c", command]).memory / 2**20 <= 300


def test_a_run_says_and_records_what_each_stage_held(bench: Bench, tmp_path: Path, monkeypatch, capfd) -> None:
    """The driver is a script that says 100 MiB, 40,000 while a stage runs, as `nvidia-smi` would (no GPU here)."""
    driver = tmp_path / "nvidia-smi"
    calls = bench.folder / "calls.jsonl"
    driver.write_text(
        f"#!/bin/sh\nwhile sleep 0.02; do grep -qs . {calls}.now && echo 0, GPU-0, 40000 || echo 0, GPU-0, 100; done\n"
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    work = f"now = pathlib.Path('{calls}.now'); now.write_text('x'); held = b'x' * (100 << 20); time.sleep(0.3)"
    slow = STAND_IN.replace('if "--output"', f'{work}; now.unlink()\nif "--output"')
    (bench.folder / "stand_in.py").write_text(slow)
    rounds.run(bench.recipe)
    said = capfd.readouterr().err
    assert len(re.findall(r"done in \d+\.\d s, held at most 0\.1 GiB of memory, 39\.1 GiB of GPU 0\n", said)) == 6
    assert "warning" not in said
    assert all(record["gpu_memory_bytes"] == {"0": 40_000 * 2**20} for record in bench.records())
    assert all(100 <= record["memory_bytes"] / 2**20 < 200 for record in bench.records())


def test_damaged_record_of_stages_is_named(bench: Bench) -> None:
    bench.run_dir.mkdir()
    (bench.run_dir / "stages.json").write_text('{"stages": [')
    with pytest.raises(PleError, match=r"stages\.json") as refusal:
        rounds.run(bench.recipe)
    assert refusal.value.exit_code == 3


# The recipe itself


def test_recipe_reports_all_faults_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "modle: m\nqueries: 5\nprinciples: hh\nrun_dir: r\nreward_model: j\nalpha: 1.0\nlearning_rate: 0.1\n"
        "train:\n  learning-rate: fast\n  epochs: 0\ngen:\n  engine: tgi\n"
    )
    with pytest.raises(UsageError) as refusal:
        load_recipe(path)
    lines = str(refusal.value).splitlines()
    assert lines[0] == f"{path}: 8 faults in the recipe"
    expected = [
        "model: missing",
        "queries: Input should be a valid string, not 5",
        "alpha: Input should be less than 1, not 1.0",
        "gen.engine: Input should be 'vllm', 'hf' or 'server', not 'tgi'",
        "train.epochs: Input should be greater than or equal to 1, not 0",
        "train.learning-rate: unknown key; did you mean learning_rate?",
        "modle: unknown key; did you mean model?",
        "learning_rate: unknown key; it belongs under reward or sft or train or baseline",
    ]
    assert sorted(line.strip() for line in lines[1:]) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is empty"),
        ("- a\n", "this is a list"),
        ("a: [\n", "line 2: not valid YAML"),
        ("model: a\x01\n", "not valid YAML: unacceptable character #x0001"),
        ("model: a\nmodel: b\n", "line 2: not valid YAML: the key 'model' is given twice"),
    ],
)
def test_recipe_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as refusal:
        load_recipe(path)
    assert message in str(refusal.value)


def test_set_changes_a_key_and_refuses_nonsense(bench: Bench) -> None:
    path = bench.recipe_file
    recipe = load_recipe(path, ["tau0=1", "train.learning_rate=1e-3", "gen.stop=[a, b]", "revision=null"])
    assert (recipe.tau0, recipe.train.learning_rate, recipe.gen.stop) == (1.0, 1e-3, ["a", "b"])
    assert differences(bench.recipe, recipe) == [
        "tau0: 0.2 -> 1.0",
        "gen.stop: [] -> ['a', 'b']",
        "train.learning_rate: 0.0001 -> 0.001",
    ]
    for wrong, message in [
        ("tau0", "write key=value"),
        ("model.name=x", "model is a value, not a group of keys"),
        ("train.lr=1", "train.lr: unknown key"),
        ("tau0=[", "not valid YAML"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_recipe(path, [wrong])


def test_how_a_query_becomes_a_prompt_is_said_once_for_sft_and_every_round(bench: Bench) -> None:
    bench.values["sft"] = {"data": "sft.jsonl"}
    bench.values["gen"] |= {"system": "Be brave.", "chat_template_arg": {"enable_thinking": False, "date": "today"}}
    bench.values["gen"] |= {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "strip_thoughts": "think"}
    stages = {stage.title: list(stage.command) for stage in rounds.plan(bench.recipe)}
    told = [
        "--system",
        "Be brave.",
        "--chat-template-arg",
        "enable_thinking=false",
        "--chat-template-arg",
        "date=today",
    ]
    for title in ("sft", "round 0 gen", "round 1 gen"):
        at = stages[title].index("--system")
        assert stages[title][at : at + 6] == told
    drawn = ["--top-k", "20", "--min-p", "0.05", "--repetition-penalty", "1.1", "--strip-thoughts", "think"]
    assert set(drawn) <= set(stages["round 1 gen"])
    assert not set(drawn) & set(stages["sft"])
    assert "--system" not in stages["round 0 train"]
    with pytest.raises(UsageError, match=r"sft\.system: unknown key"):
        parse_recipe(bench.values | {"sft": {"data": "d", "system": "s"}}, "test")


def test_reward_model_is_given_or_trained(bench: Bench) -> None:
    bench.values["reward"] = {"model": "m", "data": "d"}
    with pytest.raises(UsageError, match="either reward_model"):
        parse_recipe(bench.values, "test")
    del bench.values["reward"], bench.values["reward_model"]
    with pytest.raises(UsageError, match="either reward_model"):
        parse_recipe(bench.values, "test")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_parse(path: Path) -> None:
    load_recipe(path)


# The same work by hand


def answer_stand_ins(folder: Path, run: Callable[..., Ended], calls: int) -> dict[str, str]:
    """GEN and TRAIN of examples/loop.sh: scripts that have their commands run by `run`, so many times in all."""
    asked, answered = folder / "asked", folder / "answered"
    for pipe in (asked, answered):
        os.mkfifo(pipe)
    programs = {"GEN": folder / "ple-gen", "TRAIN": folder / "ple-train"}
    for program in programs.values():
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$0" "$@" >{asked}\nexit "$(cat {answered})"\n')
        program.chmod(0o755)

    def answer() -> None:
        for _ in range(calls):
            answered.write_text(str(run(asked.read_text().splitlines()).code))

    threading.Thread(target=answer, daemon=True).start()
    return {name: str(program) for name, program in programs.items()}


def test_shell_loop_does_the_same_as_run(
    policy: Path, reward: Path, tmp_path: Path, run_forked: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """examples/loop.sh and `ple run`, which is killed on the way: the same pairs and adapters."""
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"x": f"the story of scene {n} was"}) + "\n" for n in range(6)))
    values = {
        "model": str(policy),
        "queries": str(queries),
        "principles": "imdb",
        "reward_model": str(reward),
        "run_dir": str(tmp_path / "run"),
        "rounds": 2,
        "gen": {"engine": "hf", "max_new_tokens": 8},
        "train": {"learning_rate": 0.01, "batch_size": 3},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    marked = {**os.environ, "PYTHONPATH": str(ROOT), "PLE_TEST_MARK": uuid.uuid4().hex}
    killed = subprocess.Popen([sys.executable, "-m", "cli", "run", str(recipe)], cwd=ROOT, env=marked)
    eventually(lambda: (tmp_path / "run" / "data" / "pairs" / "round=000").exists(), "round 0 was never scored", 120)
    killed.kill()
    killed.wait()
    eventually(lambda: not processes_with(marked["PLE_TEST_MARK"]), "a stage outlived the run", GRACE_SECONDS)
    assert not (tmp_path / "run" / "policy" / "round=001").exists()
    monkeypatch.setattr(rounds, "run_child", run_forked)
    rounds.run(parse_recipe(values, "test"))
    environment = {
        **os.environ,
        **answer_stand_ins(tmp_path, run_forked, calls=4),
        "MODEL": str(policy),
        "QUERIES": str(queries),
        "PRINCIPLES": "imdb",
        "REWARD_MODEL": str(reward),
        "RUN": str(tmp_path / "loop"),
        "ROUNDS": "2",
        "GEN_OPTIONS": "--engine hf --max-new-tokens 8",
        "TRAIN_OPTIONS": "--learning-rate 0.01 --batch-size 3",
    }
    subprocess.run([ROOT / "examples" / "loop.sh"], env=environment, check=True, capture_output=True, timeout=300)
    assert pairs_of(tmp_path / "loop") == pairs_of(tmp_path / "run")
    for name in ("round=000", "round=001"):
        first, second = (tmp_path / run / "policy" / name / "adapter_model.safetensors" for run in ("loop", "run"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.long
@pytest.mark.vllm
def test_run_with_generation_from_another_environment(
    policy: Path, reward: Path, vllm_python: str, tmp_path: Path, run_forked: Callable[..., Ended], monkeypatch
) -> None:
    """ple-gen on vLLM in one environment, ple-score and ple-train without vLLM in this one."""
    monkeypatch.setattr(rounds, "run_child", run_forked)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: vLLM is imported once, not three times
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"x": f"the story of scene {n} was"}) + "\n" for n in range(6)))
    values = {
        "model": str(policy),
        "queries": str(queries),
        "principles": "imdb",
        "reward_model": str(reward),
        "run_dir": str(tmp_path / "run"),
        "rounds": 1,
        "gen": {
            "command": [vllm_python, "-m", "cli", "gen"],
            "engine": "vllm",
            "engine_arg": {"enforce_eager": True},
            "max_new_tokens": 8,
        },
    }
    rounds.run(parse_recipe(values, "test"))
    rows = pairs_of(tmp_path / "run", rounds=1)
    assert all(row["y_logps"] and len(row["y_logps"]) == len(row["y_ids"]) for row in rows)
    assert (tmp_path / "run" / "policy" / "round=000" / "adapter_model.safetensors").exists()


def pairs_of(run: Path, rounds: int = 2) -> list[dict]:
    import polars as pl

    rows = pl.read_parquet(run / "data" / "pairs" / "**" / "*.parquet").sort("round", "query_id").to_dicts()
    assert len(rows) == 6 * rounds
    for row in rows:
        row["policy"] = row["policy"].split("+")[0]  # an adapter's digest covers the path of its base
    return rows


def test_hh_rows_for_sft(tmp_path: Path) -> None:
    source = tmp_path / "hh.jsonl"
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant: Fine, thanks."
    source.write_text(json.dumps({"chosen": dialogue}) + "\n")
    script = [sys.executable, ROOT / "examples" / "hh_sft.py", source]
    found = subprocess.run(
        script, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert [json.loads(line) for line in found.stdout.splitlines()] == [
        {
            "x": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "How are you?"},
            ],
            "y": "Fine, thanks.",
        }
    ]
