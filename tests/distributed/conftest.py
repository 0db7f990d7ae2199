"""Pools of ranks, shared by all distributed tests of a session."""

import pytest

from ranks import RankPool, rank_pool


@pytest.fixture(scope="session")
def two_ranks() -> RankPool:
    return rank_pool(2)


@pytest.fixture(scope="session")
def four_ranks() -> RankPool:
    return rank_pool(4)
