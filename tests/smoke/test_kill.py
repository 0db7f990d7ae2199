"""Promise 3 through the real command: kill -9 at random moments, and the result is the undisturbed one.

``test_preemption.py`` kills twenty times, without importing torch again for each.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sixfold.tracking.events import read_metrics

RANKS, STEPS, KILLS = 2, 160, 4
SETTINGS = [
    f"train.steps={STEPS}",
    "train.log_every_steps=1",
    "checkpoint.every_steps=2",
    "data.global_batch=16",
    "networks.denoiser.depth=1",
    "networks.denoiser.width=32",
    "tracking.type=jsonl",
    "evaluation=null",
    "sampling=null",
]


def start(run: Path, data: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sixfold.cli.main", "run", "flow/dit-smoke", f"data.path={data}", *SETTINGS]
    return subprocess.Popen(
        [*command, "--nproc", str(RANKS), "--run-dir", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def workers_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children]


def losses(run: Path) -> dict[int, float]:
    return read_metrics(run)["train/loss"]


@pytest.mark.timeout(600)
def test_kill_9_of_random_ranks_changes_nothing(demo_data, tmp_path):
    undisturbed = start(tmp_path / "undisturbed", demo_data / "digits")
    output, _ = undisturbed.communicate(timeout=200)
    assert undisturbed.returncode == 0, output
    expected = losses(tmp_path / "undisturbed")
    assert sorted(expected) == list(range(1, STEPS + 1))

    draw, run, killed = random.Random(0), tmp_path / "killed", 0
    while True:
        process = start(run, demo_data / "digits")
        if killed < KILLS and kill_one_rank(process, run, draw):
            killed += 1
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 3, output
            assert "SIGKILL" in output
            continue
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        break
    assert killed == KILLS
    assert losses(run) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_and_the_same_command_goes_on(number, demo_data, tmp_path):
    process = start(tmp_path / "run", demo_data / "digits")
    log = tmp_path / "run" / "events.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count('"metrics"') < 3):
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1, output
    assert "interrupted and saved" in output
    stopped_after = max(losses(tmp_path / "run"))
    assert 0 < stopped_after < STEPS
    process = start(tmp_path / "run", demo_data / "digits")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert f"resumed after step {stopped_after} " in output
    assert sorted(losses(tmp_path / "run")) == list(range(1, STEPS + 1))


def kill_one_rank(process: subprocess.Popen, run: Path, draw: random.Random) -> bool:
    """Kill one rank at a random moment after the attempt has taken a step; False if the run ended before that."""
    log = run / "events.jsonl"
    before = log.stat().st_size if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.stat().st_size == before):
        time.sleep(0.005)
    time.sleep(draw.uniform(0.0, 0.1))
    ranks = workers_of(process.pid) if process.poll() is None else []
    if len(ranks) < RANKS:
        return False
    os.kill(draw.choice(ranks), signal.SIGKILL)
    return True
