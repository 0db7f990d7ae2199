"""The stream over a real HTTP server: same samples as from disk, each shard fetched once by all ranks together."""

from __future__ import annotations

import itertools

import pytest

from data_sets import make_images, numbers_of
from object_server import object_server
from sixfold.errors import DataError
from sixfold_data.config import DataConfig
from sixfold_data.stream import TrainStream


def read(config: DataConfig, steps: int, *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    stream = TrainStream(config, seed=0, rank=rank, world_size=world_size, start_samples=0, quarantine_path=None)
    batches = [numbers_of(batch["image"]) for batch in itertools.islice(stream, steps)]
    stream.close()
    return batches


def test_ranks_fetch_each_shard_once_and_read_what_lies_on_disk(tmp_path):
    root = make_images(tmp_path / "set")
    local = DataConfig(path=str(root), global_batch=20, lanes=10)
    with object_server() as server:
        server.put_folder(root)
        remote = DataConfig.model_validate(
            {**local.model_dump(), "path": server.url, "cache": {"directory": str(tmp_path / "cache")}}
        )
        ranks = [read(remote, 10, rank=rank, world_size=2) for rank in range(2)]
        assert [a + b for a, b in zip(*ranks, strict=True)] == read(local, 10)
        # While a shard is on its way, single members of it may be read by range; those never begin at byte 0.
        fetched = [
            path for kind, path, range_ in server.requests if kind == "GET" and "bytes=0-" in (range_ or "bytes=0-")
        ]
        shards = [f"train/{shard.name}" for shard in sorted((root / "train").glob("*.tar"))]
        assert sorted(path for path in fetched if path.endswith(".tar")) == shards


def test_an_object_that_changes_under_the_run_is_named(tmp_path):
    root = make_images(tmp_path / "set")
    with object_server() as server:
        server.put_folder(root)
        shard = "train/shard-000004.tar"
        server.objects[shard] += b"more"
        config = DataConfig.model_validate(
            {"path": server.url, "global_batch": 20, "lanes": 10, "cache": {"directory": str(tmp_path / "cache")}}
        )
        with pytest.raises(DataError, match=r"shard-000004\.tar: the object is not the one that was indexed"):
            read(config, 5)
