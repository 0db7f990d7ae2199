"""A run that diverges skips, goes back to the last good checkpoint, and goes on, or ends in an error with the fix."""

import math
import os
import subprocess
import sys
from itertools import count

import pytest

from sixfold.objectives.denoising.objective import Denoising
from sixfold.recipe.load import load_recipe
from sixfold.tracking.events import last_status, read_events, read_metrics
from sixfold.train.run_folder import prepare_run_folder, take_up
from sixfold.train.worker import run as work

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


SMALL = [
    "train.steps=10",
    "train.log_every_steps=1",
    "train.max_consecutive_skips=2",
    "checkpoint.every_steps=2",
    "engine.precision=fp32",
    "data.global_batch=8",
    "networks.denoiser.depth=1",
    "networks.denoiser.width=16",
    "networks.denoiser.heads=2",
    "evaluation=null",
    "sampling=null",
    "tracking={type: jsonl, system_metrics: false}",
]


@pytest.fixture
def train(demo_data, tmp_path, monkeypatch):
    """Train a small run in this process, with losses that are NaN at some of its calls, until asked to stop."""
    compute = Denoising.__call__

    def run(name, *, poisoned=(), stop_after=math.inf):
        recipe = load_recipe("flow/dit-smoke", [f"data.path={demo_data / 'digits'}", *SMALL]).recipe
        folder = prepare_run_folder(recipe, tmp_path / name, resume=True)
        take_up(folder, recipe)
        calls, asked = count(1), count(1)

        def call(self, *arguments):
            terms = compute(self, *arguments)
            if next(calls) in poisoned:
                terms.loss.data.fill_(math.nan)
            return terms

        monkeypatch.setattr(Denoising, "__call__", call)
        work(folder, lambda: next(asked) >= stop_after)
        return folder.path

    return run


def kinds(run, kind):
    return [event["step"] for event in read_events(run) if event.get("event") == kind]


def test_what_made_losses_non_finite_passes_and_training_goes_on(train):
    undisturbed = read_metrics(train("undisturbed"))["train/loss"]
    # Steps 5 to 7 spend the budget: training goes back to step 4. Then steps 7 to 9 (calls 10 to 12) spend it again,
    # and since step 6 was saved meanwhile, training goes back once more.
    run = train("disturbed", poisoned={5, 6, 7, 10, 11, 12})
    assert kinds(run, "rolled_back") == [4, 6]
    assert last_status(run) == "finished"
    assert read_metrics(run)["train/loss"] == undisturbed
    assert kinds(run, "skipped") == []


def test_skips_are_counted_over_restarts(train):
    run = train("run", poisoned={2, 4, 5}, stop_after=5)
    assert last_status(run) == "interrupted"
    assert read_metrics(run)["train/skipped_steps"] == {1: 0, 2: 1, 3: 1, 4: 2, 5: 3}
    # The third skip in a row, after two that an attempt before it made: back to where that one ended.
    train("run", poisoned={1})
    assert kinds(run, "rolled_back") == [5]
    assert last_status(run) == "finished"
    assert read_metrics(run)["train/skipped_steps"][10] == 3
