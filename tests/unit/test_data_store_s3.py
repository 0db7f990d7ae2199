"""An S3 endpoint, and that the stream over every kind of store gives the same samples."""

import boto3
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer

from object_server import object_server
from sixfold.errors import DataError, EnvironmentFault
from sixfold_data.build import BuildOptions
from sixfold_data.cache import ShardCache
from sixfold_data.config import CacheConfig, DataConfig
from sixfold_data.demo import build_digits
from sixfold_data.remote import RemoteStore
from sixfold_data.retries import RetryPolicy
from sixfold_data.store import open_store
from sixfold_data.stream import TrainStream

BYTES = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    """An empty bucket, reachable as a user's environment would say."""
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    made = boto3.resource("s3").Bucket("data")
    made.create()
    yield made
    made.objects.all().delete()
    made.delete()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    build_digits(BuildOptions(out=folder, shard_bytes=400_000))
    return folder


def test_s3_reads_writes_lists_and_marks_versions(bucket):
    store = open_store("s3://data/set")
    assert not store.exists("train/x.tar")
    store.write_file("train/x.tar", BYTES)
    store.write_file("dataset.json", b"{}")
    assert store.list() == ["dataset.json", "train/x.tar"]
    assert store.list("train/") == ["train/x.tar"]
    assert store.read("train/x.tar", 1234, 999) == BYTES[1234:2233]
    assert store.size("train/x.tar") == len(BYTES)
    assert store.etag("train/x.tar") == bucket.Object("set/train/x.tar").e_tag.strip('"')
    with pytest.raises(DataError, match=r"s3://data/set/none: there is no such file"):
        store.read("none", 0, 1)


def test_s3_names_an_object_that_changed(bucket, tmp_path):
    bucket.put_object(Key="set/x.tar", Body=BYTES)
    store = RemoteStore("s3://data/set", recheck_s=0.0)
    assert store.read("x.tar", 0, 10) == BYTES[:10]
    bucket.put_object(Key="set/x.tar", Body=BYTES[::-1])
    with pytest.raises(DataError, match=r"x\.tar: the object is not the one"):
        store.read("x.tar", 0, 10)
    cached = RemoteStore("s3://data/set", ShardCache(tmp_path, 2**20))
    assert cached.read("x.tar", 5, 10) == BYTES[::-1][5:15]
    bucket.Object("set/x.tar").delete()
    assert cached.read("x.tar", 15, 10) == BYTES[::-1][15:25]  # from this node's disk


def test_s3_denied_and_dead_endpoints_are_environment_faults(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = RemoteStore("s3://data/set", retries=RetryPolicy(attempts=2, base_s=0.001))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(EnvironmentFault, match=r"s3://data/set/x\.tar"):
        store.read("x.tar", 0, 10)


def batches(path, cache, workers=0):
    config = DataConfig(
        path=str(path),
        global_batch=64,
        lanes=4,
        workers=workers,
        keep_decoded_bytes=0,
        cache=CacheConfig(directory=str(cache)),
    )
    stream = TrainStream(config, seed=3, rank=0, world_size=1, start_samples=64 * 20, quarantine_path=None)
    taken = [next(stream) for _ in range(6)]  # crosses the end of the first epoch
    stream.close()
    return taken


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.positions, other.positions)
        assert one.fields.keys() == other.fields.keys()
        assert all(torch.equal(one[name], other[name]) for name in one.fields)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_over_a_failing_http_server(digits, tmp_path, workers):
    local = batches(digits, tmp_path / "unused")
    with object_server() as server:
        server.put_folder(digits)
        server.fail_every, server.truncate_every = 6, 11
        assert_same(local, batches(server.url, tmp_path / "cache", workers))
        assert {path for kind, path, _ in server.requests if kind == "GET"} >= {"train/shard-000000.tar"}
        server.down = True  # all that was read is on this node now
        store = open_store(server.url, CacheConfig(directory=str(tmp_path / "cache")))
        with pytest.raises(EnvironmentFault):
            RemoteStore(store.url, retries=RetryPolicy(attempts=1)).size("train/shard-000000.tar")


def test_the_stream_is_the_same_over_s3(digits, bucket, tmp_path):
    for file in digits.rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), f"sets/digits/{file.relative_to(digits).as_posix()}")
    assert_same(batches(digits, tmp_path / "unused"), batches("s3://data/sets/digits", tmp_path / "cache"))
    assert list((tmp_path / "cache").glob("*.shard"))
