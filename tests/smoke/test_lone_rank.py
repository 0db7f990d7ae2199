"""A run of one rank, started by the real command, trains on every engine without a word from a group's environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sixfold.tracking.environment import git_state
from sixfold.tracking.events import read_metrics

SETTINGS = ["train.steps=2", "data.global_batch=8", "networks.denoiser.depth=1", "networks.denoiser.width=32"]
WITHOUT = ["evaluation=null", "sampling=null", "tracking.type=jsonl"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_one_rank_trains(engine, demo_data, tmp_path):
    group = {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    recipe = ["flow/dit-smoke", f"data.path={demo_data / 'digits'}", f"engine.type={engine}", *SETTINGS, *WITHOUT]
    ended = subprocess.run(
        [sys.executable, "-m", "sixfold.cli.main", "run", *recipe, "--run-dir", str(tmp_path / "run")],
        env={name: value for name, value in os.environ.items() if name not in group} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "run/checkpoints/step_00000002/MANIFEST.json").exists()
    assert_complete_by_itself(tmp_path / "run")


def assert_complete_by_itself(run):
    """Whatever mirrors it, a run folder says what the run was made from, with and on."""
    environment = json.loads((run / "environment.json").read_text())["attempts"]["1"]
    assert environment["git"]["commit"] == git_state(Path(__file__).parent).commit
    assert environment["packages"]["torch"]
    assert environment["host"]
    assert {"train/loss", "system/memory_percent"} <= read_metrics(run).keys()
