"""Ranks find each other by their environment, train, and leave with exit code 0: a run that trained must not abort."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sixfold.distributed.process_group import join
from sixfold.errors import EnvironmentFault

_PROGRAM = """
import sys
from engine_cases import toy_engine, toy_step
from sixfold.distributed.mesh import sharding_mesh
from sixfold.distributed.process_group import join, leave
from sixfold.engine.config import DDPConfig, FSDPConfig
from sixfold.errors import RecipeError
world = join(device_type="cpu", timeout_s=60)
assert world.size == 2
try:
    sharding_mesh(world, replicate=3)
except RecipeError as error:
    print(error)
for config in (DDPConfig(precision="fp32"), FSDPConfig(precision="fp32")):
    engine = toy_engine(config)
    for step in range(3):
        toy_step(engine, step)
    engine.close()
    del engine
leave()
print("left")
"""


def test_trained_ranks_leave_without_aborting():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    for output, _ in answers:
        assert output.endswith("left\n")
        assert "does not divide 2 ranks" in output
        assert "allowed: 1, 2" in output


def test_a_process_alone_needs_no_environment(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join(device_type="cpu")
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "allowed: a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is '-1'"),
    ],
)
def test_a_broken_environment_is_named(environment, message, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=message):
        join(device_type="cpu")
