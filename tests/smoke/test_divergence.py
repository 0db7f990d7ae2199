"""A run that diverges skips, goes back once to the last good checkpoint, and ends in an error that says what to do."""

import os
import subprocess
import sys

from sixfold.tracking.events import read_events

SETTINGS = [
    "train.steps=30",
    "train.max_consecutive_skips=2",
    "optimizer.lr=1e30",
    "schedule.warmup_steps=0",
    "checkpoint.every_steps=1",
    "data.global_batch=16",
    "evaluation=null",
    "tracking.type=jsonl",
]


def test_divergence_is_skipped_rolled_back_and_reported(demo_data, tmp_path):
    command = [sys.executable, "-m", "sixfold.cli.main", "run", "flow/dit-smoke", f"data.path={demo_data / 'digits'}"]
    run = subprocess.run(
        [*command, *SETTINGS, "--run-dir", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "consecutive steps had a non-finite loss or gradient" in run.stderr
    assert "fix: lower optimizer.lr" in run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    events = [event["event"] for event in read_events(tmp_path / "run") if "event" in event]
    assert events.count("rolled_back") == 1
    assert events[-1] == "finished"
    committed = [event["step"] for event in read_events(tmp_path / "run") if event.get("event") == "checkpoint"]
    skipped = [event["step"] for event in read_events(tmp_path / "run") if event.get("event") == "skipped"]
    assert skipped
    assert max(committed) < min(skipped), "a state that no longer takes steps is not saved"
