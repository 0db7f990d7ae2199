"""The MLflow mirror against a real store and a real server: nothing lost, nothing twice, nothing raised."""

import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tracked_run
from sixfold.errors import EnvironmentFault, UserError
from sixfold.tracking.config import JsonlConfig, MLflowConfig
from sixfold.tracking.events import EventLog, read_events, read_metrics
from sixfold.tracking.mlflow import newest_runs
from sixfold.tracking.server import MLflowServer
from sixfold.tracking.settings import FOLDER
from sixfold.tracking.system import SystemSampler, sampling
from sixfold.tracking.tracker import open_tracker, replay
from tracked_run import RECIPE, Stored, assert_complete, train

# Trains in a process of its own; told to, it dies by SIGKILL after a batch has arrived and before the cursor is kept.
PROGRAM = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from tracked_run import train
from sixfold.tracking.mlflow import MLflowMirror

keep = MLflowMirror.commit

def die(mirror, sequence):
    if sequence > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    keep(mirror, sequence)

if sys.argv[3] == "die":
    MLflowMirror.commit = die
train(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two runs that made one database together; the one called "die" was killed between sending and its cursor."""
    folder = tmp_path_factory.mktemp("tracking")
    uri = f"sqlite:///{folder}/mlflow.db"
    helpers = str(Path(tracked_run.__file__).parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder / "runs" / name), uri, name, helpers], stderr=subprocess.PIPE
        )
        for name in ("die", "live")
    ]
    errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0], errors
    return folder, uri


def cursor(run_dir):
    return json.loads((run_dir / FOLDER / "cursor.json").read_text())


def test_two_runs_share_a_new_database(two_runs):
    folder, uri = two_runs
    assert_complete(Stored(folder / "runs/live", uri))
    assert {run.name for run in newest_runs(uri, 5)} >= {"die", "live"}


def test_a_kill_between_sending_and_the_cursor_repeats_nothing(two_runs):
    folder, uri = two_runs
    run_dir = folder / "runs/die"
    assert cursor(run_dir)["sequence"] == 0
    before = Stored(run_dir, uri)
    assert len(before.steps("train/loss")) == 20
    assert replay(run_dir) == len(list(read_events(run_dir)))
    assert_complete(Stored(run_dir, uri))
    assert replay(run_dir) == 0


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(two_runs, tmp_path):
    _, uri = two_runs
    run_dir = tmp_path / "resumed"
    train(run_dir, uri)
    first = cursor(run_dir)["run_id"]
    (run_dir / FOLDER / "cursor.json").unlink()  # as if it died after making the run and before keeping its id
    train(run_dir, uri, resumed_step=10, steps=30, lr=0.5)
    stored = Stored(run_dir, uri)
    assert stored.run_id == first
    assert_complete(stored, steps=30)
    assert stored.run.data.tags["resumed.optimizer.lr"] == "0.5"
    assert stored.run.data.tags["sixfold.attempt"] == "2"
    assert len([path for path in stored.artifacts() if path.startswith("recipe")]) == 2


def test_a_run_deleted_over_there_is_sent_anew(two_runs, tmp_path):
    _, uri = two_runs
    run_dir = tmp_path / "deleted"
    train(run_dir, uri)
    first = Stored(run_dir, uri)
    first.client.delete_run(first.run_id)
    train(run_dir, uri, resumed_step=20, steps=21)
    second = Stored(run_dir, uri)
    assert second.run_id != first.run_id
    assert second.steps("train/loss") == list(range(1, 22))


def test_what_the_store_refuses_and_what_is_gone_cost_only_themselves(two_runs, tmp_path, monkeypatch, caplog):
    _, uri = two_runs
    run_dir = tmp_path / "refused"
    with EventLog(run_dir) as log:
        log.image(key="samples/grid", step=0, path=run_dir / "deleted.png")
    monkeypatch.setattr("sixfold.tracking.names.metric_name", lambda name: name)  # names go out as they are
    train(run_dir, uri)
    stored = Stored(run_dir, uri)
    for metric in ("train/loss", "train/inf", "val/nan"):
        assert stored.steps(metric) == list(range(1, 21))
    assert stored.images() == ["images/samples~grid+step+10", "images/samples~grid+step+20"]
    assert stored.run.info.status == "FINISHED"
    for refused in ("bad%name", "deleted.png"):
        assert len([record for record in caplog.records if refused in record.getMessage()]) == 1


def test_a_server_that_is_away_delays_and_loses_nothing(two_runs, tmp_path, caplog):
    store = tmp_path / "mlflow.db"
    shutil.copy(two_runs[0] / "mlflow.db", store)  # its schema is up to date, so that the server starts sooner
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"

    early = tmp_path / "early"
    tracker = train(early, uri, close_timeout_s=0.0)
    assert tracker.where == uri
    assert "has not received everything" in caplog.text
    alone = shutil.copytree(early, tmp_path / "alone")  # the first one's thread may still be waiting for an answer
    with pytest.raises(EnvironmentFault, match="cannot be used"):
        replay(alone, timeout_s=0.0)

    with MLflowServer(f"sqlite:///{store}", port) as server:
        late = train(tmp_path / "late", uri, close_timeout_s=120.0)  # the server is only starting
        server.wait_until_ready()
        assert late.failures > 0
        assert late.where.startswith(f"{uri}/#/experiments/")
        replay(early)
        for name in ("early", "late"):
            stored = Stored(tmp_path / name, uri)
            stored.steps("train/loss")
            assert stored.steps("train/loss") == list(range(1, 21))
            assert_served(stored)


def assert_served(stored):
    assert stored.images() == ["images/samples~grid+step+10", "images/samples~grid+step+20"]
    assert stored.run.info.status == "FINISHED"
    assert stored.run.data.tags["checkpoint.uri"] == "file:///checkpoints/20"


def test_a_missing_mlflow_is_told_and_training_goes_on(tmp_path, monkeypatch, caplog):
    for module in [name for name in sys.modules if name == "mlflow" or name.startswith("mlflow.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", close_timeout_s=2.0)
    assert "pip install 'sixfold[mlflow]'" in caplog.text
    assert len(read_metrics(tmp_path)["train/loss"]) == 20


def test_jsonl_needs_no_mlflow(tmp_path):
    log = EventLog(tmp_path)
    tracker = open_tracker(JsonlConfig(), log, run_id="x", recipe_name=RECIPE, params={}, tags={}, recipe_path=None)
    tracker.close()
    assert tracker.where == str(tmp_path / "events.jsonl")
    assert not (tmp_path / FOLDER).exists()
    with pytest.raises(UserError, match="was not tracked by MLflow"):
        replay(tmp_path)


def test_system_metrics_are_logged_once_a_step(tmp_path):
    log = EventLog(tmp_path)
    sampler = SystemSampler(log, interval_s=0.0)
    sampler()
    log.metrics(step=1, samples=8, values={"train/loss": 1.0})
    sampler()
    sampler()
    metrics = read_metrics(tmp_path)
    assert list(metrics["system/memory_percent"]) == [1]
    assert 0 < metrics["system/process_memory_mib"][1] < metrics["system/memory_used_mib"][1] * 10


@pytest.mark.parametrize("config", [JsonlConfig, MLflowConfig])
def test_system_metrics_are_sampled_whatever_mirrors_the_log(tmp_path, config):
    for wanted in (True, False):
        log = EventLog(tmp_path / str(wanted))
        with sampling(config(system_metrics=wanted, system_metrics_interval_s=0.5), log):
            log.metrics(step=1, samples=8, values={"train/loss": 1.0})
        assert ("system/cpu_percent" in read_metrics(log.run_dir)) == wanted
