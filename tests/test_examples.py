"""The files of examples: they parse, and the commands in them have only options and files that there are."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import cli
from schemas.recipe import load_recipe
from tests.conftest import ROOT

SCALE = ROOT / "examples" / "scale"
COMMANDS = {"ple-gen": cli.gen, "ple-score": cli.score, "-m cli train": cli.train}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Every command of ours in a script or a block of one, with its words."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = []
    for line in lines:
        for name in COMMANDS:
            if not line.lstrip().startswith("#") and (at := line.find(f"{name} ")) >= 0 and "--set" not in line:
                words = line[at + len(name) :].replace('"${adapter[@]}"', "--adapter a")
                found.append((name, shlex.split(re.sub(r"\$\(+[^\n]*?\)\)?\)?(?= |\"|$)|\$\w+", "1", words))))
    return found


def test_the_slurm_script_is_a_script_of_commands_that_there_are():
    script = SCALE / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    found = commands(script.read_text())
    assert [name for name, _ in found] == list(COMMANDS)
    for name, words in found:
        COMMANDS[name].make_context(name, words)


def test_the_kubernetes_job_starts_a_command_that_there_is():
    job = yaml.safe_load((SCALE / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["ple-gen"]
    cli.gen.make_context("ple-gen", container["args"])


@pytest.mark.parametrize("name", ["ray-cluster.yaml", "skypilot.yaml"])
def test_the_others_parse(name: str):
    assert isinstance(yaml.safe_load((SCALE / name).read_text()), dict)


def test_the_head_of_the_ray_cluster_starts_machines():
    """Without the flag it is a cluster of the head alone."""
    cluster = yaml.safe_load((SCALE / "ray-cluster.yaml").read_text())
    (start,) = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start.split()


@pytest.mark.parametrize("code", [0, 3])
def test_the_skypilot_task_copies_the_run_and_ends_as_the_run_did(tmp_path: Path, code: int):
    run = yaml.safe_load((SCALE / "skypilot.yaml").read_text())["run"].replace("/bucket", str(tmp_path / "bucket"))
    (tmp_path / "ple").write_text(f"#!/bin/sh\nsleep 1\nexit {code}\n")
    (tmp_path / "rsync").write_text(f"#!/bin/sh\necho copied >> {tmp_path}/copies\n")
    for name in ("ple", "rsync"):
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    ended = subprocess.run(  # a copier that lived on would hold its stdout open
        ["bash", "-c", run], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, timeout=60
    )
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "copies").read_text().split() == ["copied"] * 2


def test_the_skypilot_task_installs_what_its_workers_need():
    setup = yaml.safe_load((SCALE / "skypilot.yaml").read_text())["setup"]
    assert ".venv-vllm/bin/pip install 'ple-align[vllm,ray]'" in setup


def test_what_skypilot_sets_in_a_recipe_is_there(tmp_path: Path):
    run = yaml.safe_load((SCALE / "skypilot.yaml").read_text())["run"]
    given = shlex.split(run.replace("\\\n", " "))
    overrides = [value for word, value in itertools.pairwise(given) if word == "--set"]
    assert len(overrides) >= 4
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nqueries: q\nprinciples: hh\nreward_model: r\nrun_dir: run\n")
    found = load_recipe(recipe, overrides)
    assert found.train.launch == ["torchrun", "--nproc-per-node", "8"]
    assert (found.gen.workers, found.score.workers) == (8, 8)


def test_the_image_is_made_of_files_and_extras_that_there_are():
    text = re.sub(r"\\\n\s*", " ", (ROOT / "examples" / "Dockerfile").read_text())
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        wheel["project"]["readme"],
        *wheel["project"]["license-files"],
        "cli.py",
        "schemas",
        "ple_data",
        "ple_train",
    }
    assert needed <= set(copied)
    asked = {extra for extras in re.findall(r"'\.\[(.*?)\]'", text) for extra in extras.split(",")}
    assert asked <= wheel["project"]["optional-dependencies"].keys()
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if hadolint := shutil.which("hadolint", path=places):
        subprocess.run([hadolint, ROOT / "examples" / "Dockerfile"], check=True)
