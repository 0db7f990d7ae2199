"""The pool itself, and the collectives that everything else rests on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from engine_cases import toy_engine, toy_step
from ranks import RankFailure, RankPool
from sixfold.distributed.collectives import any_rank, broadcast_object, gather_objects, sum_over_ranks
from sixfold.engine.config import FSDPConfig


def _collectives():
    rank = dist.get_rank()
    values = {"scalar": torch.tensor(rank + 1.0), "counts": torch.tensor([[rank, 2**40]]), "empty": torch.zeros(0)}
    summed = sum_over_ranks(values)
    return summed, any_rank(rank == 1), any_rank(False), gather_objects(f"rank {rank}"), broadcast_object(rank + 5)


def test_collectives_agree_on_all_ranks(two_ranks):
    for summed, yes, no, names, root in two_ranks.run(_collectives):
        assert summed["scalar"].item() == 3.0
        assert torch.equal(summed["counts"], torch.tensor([[1, 2**41]]))
        assert summed["empty"].shape == (0,)
        assert (yes, no) == (True, False)
        assert names == ["rank 0", "rank 1"]
        assert root == 5


def _groups_by_engines(replicate):
    """How many process groups there are after one engine of this sharding, and after two more."""
    counts = []
    for _ in range(3):
        engine = toy_engine(FSDPConfig(precision="fp32", replicate=replicate))
        toy_step(engine, 0)
        counts.append(dist.get_pg_count())
    return counts


@pytest.mark.parametrize("replicate", [1, 2])
def test_engines_of_all_roles_share_the_groups_they_shard_over(replicate, four_ranks):
    for counts in four_ranks.run(_groups_by_engines, replicate):
        assert len(set(counts)) == 1


def _fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"broken on {rank}")
    return rank


def _die():
    if dist.get_rank() == 1:
        os._exit(3)
    time.sleep(30)


def _sleep():
    time.sleep(60)


def test_pool_reports_failures_deaths_and_hangs_and_recovers():
    pool = RankPool(2)
    try:
        with pytest.raises(RankFailure, match="broken on 1"):
            pool.run(_fail_on, 1)
        with pytest.raises(RankFailure, match="exit code 3"):
            pool.run(_die)
        with pytest.raises(RankFailure, match="gave no answer"):
            pool.run(_sleep, timeout_s=0.5)
        assert pool.run(_fail_on, 7) == [7, 7]
    finally:
        pool.close()
