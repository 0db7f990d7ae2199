"""A request to stop at any moment ends in a saved step within the grace period, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sixfold.recipe.load import load_recipe
from sixfold.tracking.events import last_status
from sixfold.train.run_folder import prepare_run_folder, take_up

TRIALS = 20
SETTINGS = [
    "train.steps=1000000",
    "train.log_every_steps=1",
    "schedule.type=constant",
    "checkpoint.every_steps=2",
    "data.global_batch=16",
    "networks.denoiser.depth=1",
    "networks.denoiser.width=32",
    "tracking.type=jsonl",
    "evaluation=null",
    "sampling=null",
]
COMMAND = [sys.executable, "-m", "sixfold.cli.main", "run", "flow/dit-smoke"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("disturbance", ["preempt", "kill"])
def test_twenty_disturbances_lose_nothing(disturbance: str, demo_data: Path, tmp_path: Path) -> None:
    """Asked to stop, or killed with -9, at any moment, saves and collectives included."""
    recipe = load_recipe("flow/dit-smoke", [f"data.path={demo_data / 'digits'}", *SETTINGS]).recipe
    for name in ("disturbed", "undisturbed"):
        take_up(prepare_run_folder(recipe, tmp_path / name, resume=True), recipe)
    ended = subprocess.run(
        [sys.executable, "-m", "rank_trials", disturbance, str(tmp_path), str(TRIALS)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["trials"] == TRIALS
    assert found["equal"], found
    assert found["steps"] >= TRIALS


@pytest.mark.parametrize(("ranks", "after_s"), [(1, 0.0), (2, 0.0), (2, 1.0)])
def test_a_request_in_the_first_second_is_heard(ranks: int, after_s: float, demo_data: Path, tmp_path: Path) -> None:
    """The ranks exist, or the first of them, but import for seconds yet: they take one step, save it, and end."""
    settings = [f"data.path={demo_data / 'digits'}", *SETTINGS]
    process = subprocess.Popen(
        [*COMMAND, *settings, "--nproc", str(ranks), "--run-dir", str(tmp_path / "run")],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text():
        time.sleep(0.002)
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 1, output
    assert "interrupted and saved" in output
    assert (tmp_path / "run/checkpoints/step_00000001/MANIFEST.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_every_process_of_a_job_ends_in_a_saved_step(
    number: signal.Signals, demo_data: Path, tmp_path: Path
) -> None:
    """As schedulers ask: loader processes and what keeps them hear it too, and must not end before their rank."""
    run = tmp_path / "run"
    recipe = load_recipe("flow/dit-smoke", [f"data.path={demo_data / 'digits'}", *SETTINGS, "data.workers=2"]).recipe
    take_up(prepare_run_folder(recipe, run, resume=True), recipe)
    process = subprocess.Popen([sys.executable, "-m", "sixfold.train.rank", str(run)], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints/latest").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rank = psutil.Process(process.pid)
        children = rank.children(recursive=True)
        assert len(children) >= 3, "a server of processes and two loaders"
        for each in [*children, rank]:
            each.send_signal(number)
        assert process.wait(timeout=60) == 0
        assert last_status(run) == "interrupted"
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
    finally:
        process.kill()
