"""The wheel that `make test-wheel` installed, away from the source tree."""

import importlib
import os
import pkgutil
import sysconfig
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("schemas", "ple_data", "ple_train")
WHEEL = os.environ.get("PLE_WHEEL")

pytestmark = pytest.mark.skipif(WHEEL is None, reason="make test-wheel")


def test_what_is_tested_is_the_installed_package():
    site = Path(sysconfig.get_path("purelib"))
    for name in (*PACKAGES, "cli"):
        assert Path(importlib.import_module(name).__file__).is_relative_to(site)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_there(package):
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    for module in found:
        importlib.import_module(module.name)


def test_the_wheel_holds_the_product_and_what_it_reads_and_nothing_else():
    files = set(zipfile.ZipFile(WHEEL).namelist())
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} <= {*PACKAGES, "cli.py", "cli"}
    assert {f"{package}/py.typed" for package in PACKAGES} | {"schemas/options/help.toml"} <= files
    for kind in (
        *("inputs/principles/hh.txt", "judge/page.js", "judge/page.css", "judge/label_studio.xml"),
        *("report/assets/report.html", "report/assets/report.mplstyle"),
    ):
        assert f"ple_data/{kind}" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)
