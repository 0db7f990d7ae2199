"""Nodes are examined before the first step, and the rank that others wait for is named."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ranks import rank_pool
from recipe_cases import close, recipe_on
from sixfold.distributed.process_group import join
from sixfold.errors import EnvironmentFault
from sixfold.train import preflight as module
from sixfold.train.assembly import assemble
from sixfold.train.hooks import stragglers
from sixfold.train.loop import train_step
from sixfold.train.preflight import preflight
from sixfold.train.run_folder import RunFolder


def examine(folders: tuple[str, ...]) -> list[str]:
    """Preflight on each rank's folder."""
    world = join()
    return preflight(world, RunFolder(Path(folders[world.rank])))


def refused(folders: tuple[str, ...], changes: dict[str, object]) -> str:
    """Preflight with what the last rank reports changed; return the error."""
    world, report = join(), module._report
    if world.rank == world.size - 1:
        module._report = lambda *where: replace(report(*where), **changes)
    try:
        with pytest.raises(EnvironmentFault) as error:
            preflight(world, RunFolder(Path(folders[world.rank])))
    finally:
        module._report = report
    return str(error.value)


def steps_of_a_slow_rank(data: str) -> tuple[float, ...]:
    """Train steps in which rank 1's batches come late; return the seconds of all ranks in the last.

    In the second one DDP arranges its buckets anew, and ranks meet before their first loss.
    """
    world = join()
    training = assemble(recipe_on("flow/dit-smoke", data), world)
    for _ in range(3):
        training.step_started = time.perf_counter()
        if world.rank == 1:
            time.sleep(0.5)
        record = train_step(training, next(training.stream))
        training.progress = record.progress
    close(training)
    return tuple(record.rank_seconds)


def test_all_ranks_get_the_table(tmp_path: Path) -> None:
    tables = rank_pool(2).run(examine, (str(tmp_path),) * 2)
    assert tables[0][0].startswith(f"preflight  {os.uname().nodename}: 2 ranks, CPU")
    assert "all-reduce over 2 ranks" in tables[0][-1]
    assert not list(tmp_path.iterdir()), "the token is removed"


def test_a_folder_that_is_not_shared_is_found(tmp_path: Path) -> None:
    folders = (str(tmp_path / "a"), str(tmp_path / "b"))
    for folder in folders:
        Path(folder).mkdir()
    for error in rank_pool(2).run(refused, folders, {}):
        assert "rank 1 on" in error
        assert "cannot see what rank 0 writes" in error


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"versions": (("python", "2.7"), ("torch", "1.0"), ("cuda", "None"))}, "torch is"),
        ({"disk_free_bytes": 1 << 20}, "1 MiB free"),
        ({"clock_s": 1e9}, "s apart"),
    ],
)
def test_what_differs_on_one_node_stops_all(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    for error in rank_pool(2).run(refused, (str(tmp_path),) * 2, changes):
        assert expected in error


def test_the_rank_that_others_wait_for_is_named(demo_data: Path) -> None:
    seconds = rank_pool(2).run(steps_of_a_slow_rank, str(demo_data))
    assert seconds[0] == seconds[1]
    found = stragglers(seconds[0], steps=1)
    assert found["perf/step_s/rank_1"] == found["perf/slowest_rank_s"] > found["perf/step_s/rank_0"]
    assert found["perf/slowest_rank"] == 1.0
    assert found["perf/slowest_rank_s"] >= 0.5
    assert found["perf/slowest_rank_s"] > found["perf/median_rank_s"]


def test_of_many_ranks_the_slowest_are_shown() -> None:
    found = stragglers([*range(500)], steps=2)
    assert sorted(name for name in found if "/rank_" in name) == [
        f"perf/step_s/rank_{rank}" for rank in range(468, 500)
    ]
    assert found["perf/step_s/rank_499"] == found["perf/slowest_rank_s"] == 249.5
