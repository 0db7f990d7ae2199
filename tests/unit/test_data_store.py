"""Stores: local files and a real HTTP server that fails, truncates, changes objects and ignores ranges."""

import gc
import hashlib
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from object_server import object_server
from sixfold.errors import DataError, EnvironmentFault
from sixfold_data.cache import ShardCache
from sixfold_data.remote import FETCH_AT_ONCE_BYTES, RemoteStore
from sixfold_data.retries import RetryPolicy
from sixfold_data.store import LocalStore, MissingObjectError, Pin, open_store

FAST = RetryPolicy(attempts=6, base_s=0.001, cap_s=0.002)
SMALL = np.random.default_rng(0).bytes(100_000)
LARGE = np.random.default_rng(1).bytes(FETCH_AT_ONCE_BYTES + 1_000_000)


@pytest.fixture
def server():
    with object_server() as running:
        running.objects = {"a/small.tar": SMALL, "a/large.tar": LARGE}
        yield running


def remote(server, cache=None, **options):
    return RemoteStore(f"{server.url}/a", cache, retries=FAST, **options)


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 10 s")


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


# Local


def test_local_reads_writes_and_lists(tmp_path):
    store = open_store(str(tmp_path))
    store.write_file("train/x.tar", SMALL)
    assert store.read("train/x.tar", 10, 1000) == SMALL[10:1010]
    assert store.read_file("train/x.tar") == SMALL
    assert store.size("train/x.tar") == len(SMALL)
    assert store.list() == ["train/x.tar"]
    assert store.list("val/") == []
    assert store.exists("train/x.tar")
    assert not store.exists("train")
    assert store.etag("train/x.tar") is None
    assert [file.name for file in (tmp_path / "train").iterdir()] == ["x.tar"]


def test_local_absent_file_is_a_user_error_and_a_file_not_found_error(tmp_path):
    with pytest.raises(MissingObjectError, match="no such file") as caught:
        LocalStore(tmp_path).read("none.tar", 0, 1)
    assert isinstance(caught.value, DataError)
    assert isinstance(caught.value, FileNotFoundError)
    assert "none.tar" in str(caught.value)


def test_local_truncated_and_grown_shards_are_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(SMALL)
    store = LocalStore(tmp_path)
    with pytest.raises(DataError, match=r"x\.tar.*not the one that was indexed"):
        store.read("x.tar", len(SMALL) - 10, 20)
    store.pin("x.tar", Pin(size=len(SMALL) - 1))
    with pytest.raises(DataError, match="expected 99999 bytes, found 100000 bytes"):
        store.read("x.tar", 0, 20)


def test_local_descriptors_are_few_and_survive_pickling(tmp_path, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (200, 200))
    store = LocalStore(tmp_path)
    before = open_descriptors()
    for number in range(200):
        (tmp_path / f"{number}").write_bytes(str(number).encode())
        assert store.read(f"{number}", 0, 1) == str(number)[:1].encode()
    assert open_descriptors() - before <= 50
    assert pickle.loads(pickle.dumps(store)).read("7", 0, 1) == b"7"
    store.close()
    assert open_descriptors() - before <= 1


# HTTP without a cache


def test_http_reads_ranges_only(server):
    store = remote(server)
    assert store.read("large.tar", 12_345, 678) == LARGE[12_345 : 12_345 + 678]
    assert store.read("large.tar", 0, 0) == b""
    assert store.size("large.tar") == len(LARGE)
    assert store.etag("large.tar") == hashlib.md5(LARGE).hexdigest()
    assert [asked for kind, _, asked in server.requests if kind == "GET"] == ["bytes=12345-13022"]


def test_every_third_request_fails_or_is_cut_and_nobody_notices(server):
    server.fail_every, server.truncate_every, server.shorten_every = 3, 5, 7
    store = remote(server)
    for start in range(0, 90_000, 3000):
        assert store.read("small.tar", start, 3000) == SMALL[start : start + 3000]
    assert store.exists("small.tar")
    assert len(server.requests) > 40


def test_a_dead_store_ends_in_an_environment_fault_after_the_budget(server):
    server.down = True
    with pytest.raises(EnvironmentFault, match=r"a/small\.tar.*in 6 attempts"):
        remote(server).read("small.tar", 0, 10)
    with pytest.raises(EnvironmentFault, match="in 6 attempts"):
        remote(server).exists("small.tar")


def test_a_closed_port_ends_in_an_environment_fault(server):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(EnvironmentFault, match="in 3 attempts"):
        RemoteStore(url, retries=RetryPolicy(attempts=3, base_s=0.001)).read("x", 0, 1)


def test_an_absent_object_is_not_retried(server):
    store = remote(server)
    with pytest.raises(DataError, match=r"a/none\.tar: there is no such file"):
        store.read("none.tar", 0, 10)
    assert not store.exists("none.tar")
    assert len(server.requests) <= 4  # fsspec asks by HEAD, then by GET


def test_a_changed_object_is_named(server):
    store = remote(server, recheck_s=0.0)
    store.read("small.tar", 0, 10)
    server.objects["a/small.tar"] = SMALL[::-1]
    with pytest.raises(DataError, match=r"a/small\.tar: the object is not the one"):
        store.read("small.tar", 0, 10)


@pytest.mark.parametrize("pin", [Pin(size=7), Pin(size=len(SMALL), etag="other")])
def test_an_object_that_differs_from_the_index_is_refused_before_a_byte_is_read(server, pin):
    store = remote(server)
    store.pin("small.tar", pin)
    with pytest.raises(DataError, match=r"expected .* found 100000 bytes"):
        store.read("small.tar", 0, 5)
    assert server.count("GET", "a/small.tar") == 0


def test_a_server_without_ranges_needs_a_cache(server, tmp_path):
    server.serves_ranges = False
    with pytest.raises(EnvironmentFault, match="ignores range requests"):
        remote(server).read("large.tar", 5, 10)
    cached = remote(server, ShardCache(tmp_path, 10 * len(LARGE)))
    assert cached.read("large.tar", 5, 10) == LARGE[5:15]
    assert cached.read("large.tar", 500_000, 10) == LARGE[500_000:500_010]


def test_writing_over_http_is_refused_in_words(server):
    with pytest.raises(DataError, match="can only be read"):
        remote(server).write_file("x", b"1")


def test_an_unknown_protocol_is_named():
    with pytest.raises(DataError, match="'nonsense' is not a protocol"):
        open_store("nonsense://bucket").read("x", 0, 1)


# HTTP with a cache


def test_a_small_shard_is_fetched_once_and_then_read_without_the_network(server, tmp_path):
    store = remote(server, ShardCache(tmp_path, 2**20))
    for start in range(0, 90_000, 10_000):
        assert store.read("small.tar", start, 100) == SMALL[start : start + 100]
    assert server.count("GET", "a/small.tar") == 1
    again = remote(server, ShardCache(tmp_path, 2**20))
    assert again.read("small.tar", 3, 5) == SMALL[3:8]
    assert server.count("GET", "a/small.tar") == 1


def test_a_large_shard_is_read_by_range_until_its_background_fetch_is_done(server, tmp_path):
    server.fail_every, server.truncate_every = 4, 7
    cache = ShardCache(tmp_path, 2 * len(LARGE))
    store = remote(server, cache)
    assert store.read("large.tar", 77, 1000) == LARGE[77:1077]
    wait_until(lambda: list(tmp_path.glob("*.shard")))
    store.read("large.tar", 0, 1)
    asked = len(server.requests)
    assert store.read("large.tar", len(LARGE) - 10, 10) == LARGE[-10:]
    assert len(server.requests) == asked
    assert next(tmp_path.glob("*.shard")).read_bytes() == LARGE


def test_equal_names_in_two_places_do_not_meet(server, tmp_path):
    server.objects["b/small.tar"] = SMALL[::-1]
    cache = ShardCache(tmp_path, 2**20)
    assert remote(server, cache).read("small.tar", 0, 50) == SMALL[:50]
    assert RemoteStore(f"{server.url}/b", cache, retries=FAST).read("small.tar", 0, 50) == SMALL[::-1][:50]


def test_a_changed_object_is_another_cache_entry(server, tmp_path):
    cache = ShardCache(tmp_path, 2**20)
    assert remote(server, cache).read("small.tar", 0, 50) == SMALL[:50]
    server.objects["a/small.tar"] = SMALL[::-1]
    assert remote(server, cache).read("small.tar", 0, 50) == SMALL[::-1][:50]


def test_content_that_differs_from_the_index_is_never_cached(server, tmp_path):
    store = remote(server, ShardCache(tmp_path, 2**20))
    store.pin("small.tar", Pin(size=len(SMALL), sha256="0" * 64))
    with pytest.raises(DataError, match="expected sha256 0000"):
        store.read("small.tar", 0, 5)
    assert not list(tmp_path.glob("*.shard"))
    assert not list(tmp_path.glob("*.part"))


def test_an_object_that_changes_while_it_is_fetched_is_never_cached(server, tmp_path):
    def change(method, name):
        if method == "GET":
            server.objects["a/small.tar"] = SMALL[::-1]

    server.during = change
    with pytest.raises(DataError, match=r"a/small\.tar: the object is not the one.*while it was fetched"):
        remote(server, ShardCache(tmp_path, 2**20)).read("small.tar", 0, 5)
    assert not list(tmp_path.glob("*.shard"))


def test_the_least_recently_used_shard_goes_first_and_the_quota_holds(server, tmp_path):
    for name in "abc":
        server.objects[f"a/{name}.tar"] = name.encode() * 1000
    cache = ShardCache(tmp_path, 2500)
    store = remote(server, cache)
    for age, name in ((300, "a"), (200, "b")):
        store.read(f"{name}.tar", 0, 1)
        newest = max(tmp_path.glob("*.shard"), key=lambda file: file.stat().st_mtime)
        os.utime(newest, (time.time() - age,) * 2)
    remote(server, cache).read("a.tar", 0, 1)  # used again, by another reader
    store.read("c.tar", 0, 1)
    assert cache.used_bytes() == 2000
    kept = {file.read_bytes()[:1] for file in tmp_path.glob("*.shard")}
    assert kept == {b"a", b"c"}
    assert store.read("b.tar", 500, 1) == b"b"


def test_an_object_beyond_the_quota_is_read_by_ranges(server, tmp_path):
    store = remote(server, ShardCache(tmp_path, 5000))
    assert store.read("small.tar", 50, 60) == SMALL[50:110]
    assert not list(tmp_path.glob("*.shard"))


def test_what_a_dead_writer_left_is_removed_and_what_a_live_one_holds_is_not(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    (tmp_path / "dead.part").write_bytes(b"x" * 900)
    inside = []

    def write(descriptor):
        inside.append(cache.fill("other", "1", 900, lambda d: os.write(d, b"z" * 900)))  # no room beside this one
        os.write(descriptor, b"y" * 500)

    assert cache.fill("url", "1", 500, write) is not None
    assert inside == [None]
    assert cache.used_bytes() == 500


def test_a_failed_fetch_leaves_nothing(tmp_path):
    cache = ShardCache(tmp_path, 1000)

    def write(descriptor):
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError):
        cache.fill("url", "1", 500, write)
    assert cache.used_bytes() == 0
    assert cache.find("url", "1") is None


def _read_in_child(store, start, results):
    data = store.read("large.tar", start, 5000)
    gc.collect()  # a child that cleans up must not close what its parent uses
    time.sleep(0.1)
    results.put((os.getpid(), hashlib.sha256(data).hexdigest()))


def test_processes_that_want_the_same_shard_fetch_it_once(server, tmp_path):
    store = remote(server, ShardCache(tmp_path, 10 * len(LARGE)))
    server.objects["a/large.tar"] = middling = LARGE[:FETCH_AT_ONCE_BYTES]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=_read_in_child, args=(store, start, results)) for start in (1, 2, 3)]
    for child in children:
        child.start()
    got = {results.get()[1] for _ in children}
    for child in children:
        child.join(30)
    assert got == {hashlib.sha256(middling[start : start + 5000]).hexdigest() for start in (1, 2, 3)}
    whole = [asked for kind, path, asked in server.requests if (kind, path) == ("GET", "a/large.tar") and not asked]
    assert len(whole) == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_in_use_may_cross_into_a_child(server, method):
    store = remote(server)
    store.read("large.tar", 0, 10)  # the parent has a loop, a session and a thread now
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(store, 99, results))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    pid, digest = results.get()
    assert pid == child.pid
    assert digest == hashlib.sha256(LARGE[99:5099]).hexdigest()
    assert store.read("large.tar", 7, 9) == LARGE[7:16]


def test_columns_come_as_local_files_with_and_without_a_cache(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for cache in (None, ShardCache(tmp_path / "cache", 2**20)):
        file = remote(server, cache).local_path("small.tar")
        assert file.read_bytes() == SMALL
        assert tmp_path in file.parents
    with pytest.raises(EnvironmentFault, match="does not fit"):
        remote(server, ShardCache(tmp_path / "tiny", 1000)).local_path("small.tar")
