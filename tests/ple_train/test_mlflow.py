"""`--report-to mlflow` and a real tracking server, which `mlflow-skinny`, the client alone, does not bring."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import polars as pl
import pytest

from tests.ple_train.small_training import write_pairs

START = 120
"""Seconds that the server may take to start."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server that is up: that of PLE_MLFLOW, the `mlflow` of an environment with the whole package."""
    if not (program := os.environ.get("PLE_MLFLOW")):
        pytest.skip("no MLflow server: set PLE_MLFLOW to the `mlflow` of an environment with the whole package")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    log, address = tmp_path / "server.log", f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, *words], cwd=tmp_path, stdout=output, stderr=output, start_new_session=True
        )
    try:
        until = time.monotonic() + START
        while not is_up(address):
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"the server did not start: {log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_up(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.long
def test_a_real_server_gets_the_metrics_of_every_step(server: str, policy: Path, tmp_path: Path, run_ple) -> None:
    data, output = write_pairs(tmp_path / "data"), tmp_path / "tracked"
    words = ["train", "--model", policy, "--data", data, "--round", 1, "--batch-size", 8, "--output", output]
    found = run_ple(*words, "--report-to", "mlflow", env={"MLFLOW_TRACKING_URI": server, "NO_PROXY": "127.0.0.1"})
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
    api = f"{server}/api/2.0/mlflow"
    with httpx.Client(trust_env=False) as client:
        name = {"experiment_name": "ple"}
        experiment = client.get(f"{api}/experiments/get-by-name", params=name).json()["experiment"]
        asked = {"experiment_ids": [experiment["experiment_id"]]}
        (told,) = client.post(f"{api}/runs/search", json=asked).json()["runs"]
        assert (told["info"]["run_name"], told["info"]["status"]) == ("tracked", "FINISHED")
        wanted = {"run_id": told["info"]["run_id"], "metric_key": "loss"}
        history = client.get(f"{api}/metrics/get-history", params=wanted).json()["metrics"]
    sent = {metric.get("step", 0): metric["value"] for metric in history}
    steps = pl.read_parquet(output / "metrics.parquet").to_dicts()
    assert sent == {row["step"]: pytest.approx(row["loss"]) for row in steps}
