"""Stores without rename: a marker object commits, against fsspec's memory store and a real S3 endpoint."""

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from checkpoint_helpers import empty_state, equal, extra_of, open_checkpointer, state_of, write_steps
from sixfold.checkpoint.export import read_parameters
from sixfold.checkpoint.store import ObjectStore
from sixfold.checkpoint.verification import newest_verified


@pytest.fixture(scope="module")
def s3_endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request, monkeypatch, tmp_path):
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return f"memory://{tmp_path.name}/checkpoints"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_endpoint"))
    bucket = tmp_path.name.replace("_", "-").lower()[-40:].strip("-")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    fsspec.filesystem("s3").invalidate_cache()
    return f"s3://{bucket}/run/checkpoints"


def _names(url):
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return sorted(path.rsplit("/", 1)[-1] for path in files.ls(root, detail=False))


def test_round_trip_retention_and_replacement_without_rename(url):
    write_steps(url, 1, 2, 3, keep=2)
    names = _names(url)
    assert [name for name in names if name.endswith(".commit")] == ["step_00000002.commit", "step_00000003.commit"]
    assert len([name for name in names if name.startswith("step_") and "-" in name]) == 2, "expired objects are gone"
    candidate = newest_verified(url, print)
    assert candidate.step == 3
    expected = state_of(3)["denoiser"]["parameters/body.weight"]
    assert read_parameters(candidate, "denoiser", averaged=False)["body.weight"].equal(expected)

    messages = []
    files, root = fsspec.core.url_to_fs(url)
    content = bytearray(files.cat_file(f"{root}/{candidate.folder}/__0_0.distcp"))
    content[len(content) // 2] ^= 1
    files.pipe_file(f"{root}/{candidate.folder}/__0_0.distcp", bytes(content))
    run = open_checkpointer(url, keep=2)
    states = empty_state()
    run.load(run.newest_verified(messages.append), states)
    assert "does not match its hash" in messages[0]
    assert equal(states, state_of(2))
    run.save(3, state_of(30), extra_of(3))
    run.close()
    run.load(run.newest_verified(messages.append), states)
    assert equal(states, state_of(30))
    assert len(messages) == 1
    assert len(_names(url)) == 5, "latest, two markers, two folders"


def test_what_no_marker_names_does_not_count_and_is_removed(url, monkeypatch):
    write_steps(url, 1)

    class Stop(BaseException):
        pass

    def crash(*args):
        raise Stop

    monkeypatch.setattr(ObjectStore, "commit", crash)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    run = open_checkpointer(url)
    run.save(2, state_of(2), extra_of(2))
    run._thread.join()
    monkeypatch.undo()
    assert any(name.startswith("step_00000002-") for name in _names(url)), "complete, manifest included"
    assert newest_verified(url, print).step == 1
    open_checkpointer(url)
    assert not any(name.startswith("step_00000002-") for name in _names(url))
