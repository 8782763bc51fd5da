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


def test_what_skypilot_sets_in_a_recipe_is_there(tmp_path: Path):
    run = yaml.safe_load((SCALE / "skypilot.yaml").read_text())["run"]
    given = shlex.split(run.replace("\\\n", " "))
    overrides = [value for word, value in itertools.pairwise(given) if word == "--set"]
    assert len(overrides) >= 3
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nqueries: q\nprinciples: hh\nreward_model: r\nrun_dir: run\n")
    assert load_recipe(recipe, overrides).train.launch == ["torchrun", "--nproc-per-node", "8"]


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
