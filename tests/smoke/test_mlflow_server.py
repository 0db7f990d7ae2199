"""infra/mlflow/server brings up a server that takes runs and artifacts and leaves when asked."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from sixfold.tracking.server import is_free

SERVER = Path(__file__).resolve().parents[2] / "infra" / "mlflow" / "server"


def free_port():
    return next(port for port in range(15000, 16000) if is_free(port))


def answers(address):
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2.0) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_the_script_serves_runs_and_artifacts(tmp_path, monkeypatch):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [SERVER, "--port", str(port), "--artifacts", str(tmp_path / "artifacts")],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "WORKERS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not answers(address):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        from mlflow import MlflowClient

        client = MlflowClient(address)
        run = client.create_run(client.create_experiment("team"))
        client.log_metric(run.info.run_id, "train/loss", 1.5, step=3)
        client.log_text(run.info.run_id, "hello", "note.txt")
        assert client.get_run(run.info.run_id).data.metrics == {"train/loss": 1.5}
        (note,) = (tmp_path / "artifacts").rglob("note.txt")
        assert note.read_text() == "hello"
        assert (tmp_path / "mlflow.db").exists()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)
    assert not answers(address)


def test_mistakes_are_named():
    done = subprocess.run([SERVER, "--prot", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "allowed: --host, --port, --artifacts" in done.stderr
    done = subprocess.run(
        [SERVER], env={"PATH": os.environ["PATH"], "DATABASE_HOST": "db"}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "DATABASE_PASSWORD_FILE" in done.stderr
