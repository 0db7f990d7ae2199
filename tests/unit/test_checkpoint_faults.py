"""Damage is found and named, and the checkpoint before takes over; a full disk costs nothing that was saved."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_helpers import empty_state, equal, extra_of, open_checkpointer, state_of, write_steps
from sixfold.checkpoint import checkpointer as checkpointer_module
from sixfold.checkpoint import manifest as manifests
from sixfold.checkpoint.store import FileStore
from sixfold.checkpoint.verification import newest_verified
from sixfold.errors import CheckpointError, EnvironmentFault


def _data_file(folder: Path) -> Path:
    return folder / "__0_0.distcp"


def _flip(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 0x10
    path.write_bytes(content)


def _edit_manifest(folder: Path, **changes) -> None:
    """Change the manifest and keep its own hash right."""
    document = json.loads((folder / "MANIFEST.json").read_text())
    document["manifest"] |= changes
    document["sha256"] = manifests._hash(document["manifest"])
    (folder / "MANIFEST.json").write_text(json.dumps(document))


DAMAGES = {
    "flipped byte": (lambda folder: _flip(_data_file(folder)), "__0_0.distcp does not match its hash"),
    "flipped byte in the metadata": (lambda folder: _flip(folder / ".metadata"), ".metadata does not match its hash"),
    "truncated": (lambda folder: os.truncate(_data_file(folder), 100), "__0_0.distcp has 100 bytes, the manifest says"),
    "emptied": (lambda folder: os.truncate(_data_file(folder), 0), "has 0 bytes"),
    "missing file": (lambda folder: _data_file(folder).unlink(), "__0_0.distcp is missing"),
    "missing metadata": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "missing manifest": (lambda folder: (folder / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    "garbage manifest": (lambda folder: (folder / "MANIFEST.json").write_bytes(b"\x00\xff" * 50), "not a manifest"),
    "manifest of a list": (lambda folder: (folder / "MANIFEST.json").write_text("[1]"), "not a manifest"),
    "flipped byte in the manifest": (lambda folder: _flip(folder / "MANIFEST.json", 0.2), "MANIFEST.json"),
    "another format": (lambda folder: _edit_manifest(folder, format=99), "format version 99"),
    "another step": (lambda folder: _edit_manifest(folder, step=4), "MANIFEST.json is of step 4"),
    "a path outside": (
        lambda folder: _edit_manifest(folder, files={"../x": {"size_bytes": 1, "sha256": "0" * 64}}),
        "no c",
    ),
    "folder instead of a file": (
        lambda folder: (_data_file(folder).unlink(), _data_file(folder).mkdir()),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_newest_falls_back_loudly_to_the_one_before(tmp_path, damage):
    write_steps(tmp_path, 1, 2)
    harm, reason = DAMAGES[damage]
    harm(tmp_path / "step_00000002")
    messages = []
    run = open_checkpointer(tmp_path)
    candidate = run.newest_verified(messages.append)
    assert candidate.step == 1
    assert reason in messages[0]
    assert "step_00000002" in messages[0]
    assert "falling back" in messages[0]
    states = empty_state()
    run.load(candidate, states)
    assert equal(states, state_of(1))

    # The run goes on past the damaged checkpoint, takes its place, and stops mentioning it.
    run.save(2, state_of(20), extra_of(2))
    run.close()
    quiet = []
    again = open_checkpointer(tmp_path)
    again.load(again.newest_verified(quiet.append), states)
    assert equal(states, state_of(20))
    assert quiet == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000002"]


def test_when_nothing_verifies_the_user_decides(tmp_path):
    write_steps(tmp_path, 1, 2)
    for step in (1, 2):
        _flip(_data_file(tmp_path / f"step_{step:08d}"))
    with pytest.raises(CheckpointError) as caught:
        newest_verified(tmp_path, lambda message: None)
    assert "step_00000001" in str(caught.value)
    assert "step_00000002" in str(caught.value)
    assert "another --run-dir" in str(caught.value)


def test_a_rejected_checkpoint_neither_counts_as_kept_nor_stays(tmp_path):
    write_steps(tmp_path, 10, 20, 30, keep=3)
    _flip(_data_file(tmp_path / "step_00000030"))
    run = open_checkpointer(tmp_path, keep=2)
    run.load(run.newest_verified(lambda message: None), empty_state())
    run.save(25, state_of(25), extra_of(25))
    run.wait()
    assert _folders(tmp_path) == ["step_00000020", "step_00000025", "step_00000030"], "not yet passed"
    run.save(40, state_of(40), extra_of(40))
    run.close()
    assert _folders(tmp_path) == ["step_00000025", "step_00000040"]


def _folders(directory):
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def test_latest_that_points_nowhere_is_said_and_not_believed(tmp_path):
    write_steps(tmp_path, 1)
    (tmp_path / "latest").write_text("step_00000009")
    messages = []
    assert newest_verified(tmp_path, messages.append).step == 1
    assert messages
    assert "names step_00000009" in messages[0]
    (tmp_path / "latest").unlink()
    assert newest_verified(tmp_path, messages.append).step == 1


@pytest.mark.parametrize("crash_before", ["commit", "replace", "retire"])
def test_a_crash_between_the_acts_of_a_commit_leaves_a_whole_checkpoint(tmp_path, monkeypatch, crash_before):
    """The machine stops dead before renaming, before moving ``latest``, or before deleting what expired."""
    write_steps(tmp_path, 1, keep=1)

    class Stop(BaseException):
        pass

    def crash(*args):
        raise Stop

    run = open_checkpointer(tmp_path, keep=1, asynchronous=False)
    monkeypatch.setattr(FileStore, crash_before, crash)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    with pytest.raises(AssertionError, match="without an outcome"):
        run.save(2, state_of(2), extra_of(2))
    monkeypatch.undo()
    again = open_checkpointer(tmp_path, keep=1)
    states = empty_state()
    again.load(again.newest_verified(lambda message: None), states)
    assert equal(states, state_of(1 if crash_before == "commit" else 2))
    assert not [name for name in _folders(tmp_path) if ".tmp-" in name]


def test_a_crash_while_a_checkpoint_takes_another_ones_place_loses_neither(tmp_path):
    """Between the two renames of a replacement the earlier checkpoint is there under another name."""
    write_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.superseded-cafe.1")
    assert newest_verified(tmp_path, lambda message: None).step == 2
    write_steps(tmp_path, 3, keep=1)
    assert _folders(tmp_path) == ["step_00000003"]


def test_what_dead_attempts_left_is_removed_at_the_start(tmp_path):
    write_steps(tmp_path, 1)
    (tmp_path / "step_00000002.tmp-dead.1").mkdir()
    (tmp_path / "step_00000002.tmp-dead.1" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "notes").mkdir()  # not ours
    assert newest_verified(tmp_path, lambda message: None).step == 1
    open_checkpointer(tmp_path)
    assert _folders(tmp_path) == ["notes", "step_00000001"]


class _Explosive:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_metadata_is_unpickled_only_when_its_hash_matches_and_only_into_metadata(tmp_path, monkeypatch):
    """A crafted pickle is not run, neither behind the manifest's back nor with a manifest that vouches for it."""
    monkeypatch.chdir(tmp_path)
    write_steps(tmp_path / "run", 1)
    folder = tmp_path / "run" / "step_00000001"
    candidate = newest_verified(tmp_path / "run", print)
    (folder / ".metadata").write_bytes(pickle.dumps(_Explosive()))
    run = open_checkpointer(tmp_path / "run")
    with pytest.raises(CheckpointError, match="hash"):
        run.load(candidate, empty_state())
    with (folder / ".metadata").open("rb") as stream:
        record = manifests.hash_stream(stream)
    files = {name: each.model_dump() for name, each in candidate.manifest.files.items()} | {
        ".metadata": record.model_dump()
    }
    _edit_manifest(folder, files=files)
    with pytest.raises(CheckpointError, match="no checkpoint of this format has"):
        run.load(newest_verified(tmp_path / "run", print), empty_state())
    assert not Path("exploded").exists()


class _FullDevice(FileStore):
    """Data goes to the kernel's always-full device: a real ENOSPC where no small disk can be mounted."""

    full = False

    def writer(self, path):
        return Path("/dev/full").open("wb") if self.full and path.endswith(".distcp") else super().writer(path)


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A directory on a 2 MiB file system, and a function that fills it (or the nearest thing)."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)]
    if os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0:

        def fill(full):
            if full:
                free = os.statvfs(directory)
                (directory / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - 40_000))
            else:
                (directory / "ballast").unlink()

        yield directory, fill
        subprocess.run(["umount", str(directory)], check=True)
    else:
        monkeypatch.setattr(checkpointer_module, "open_store", _FullDevice)
        yield directory, lambda full: setattr(_FullDevice, "full", full)


def _save_and_wait(run, step, states):
    run.save(step, states, extra_of(step))
    run.wait()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_named_and_costs_nothing_that_was_saved(small_disk, asynchronous):
    directory, fill = small_disk
    big = {"denoiser": {"parameters/x": torch.arange(60_000.0)}}
    run = open_checkpointer(directory, asynchronous=asynchronous)
    run.save(1, big, extra_of(1))
    run.wait()
    fill(True)
    with pytest.raises(EnvironmentFault) as caught:
        _save_and_wait(run, 2, big)
    assert "disk is full" in str(caught.value)
    assert "step 2" in str(caught.value)
    assert str(directory) in str(caught.value)
    assert caught.value.exit_code == 3
    assert [path.name for path in directory.iterdir() if path.is_dir()] == ["step_00000001"], (
        "the partial folder is gone"
    )
    assert newest_verified(directory, print).step == 1
    fill(False)
    assert not run.save(2, big, extra_of(2)).skipped, "a failed step may be saved again"
    run.close()
    assert newest_verified(directory, print).step == 2


def test_a_background_error_surfaces_at_the_next_poll(small_disk):
    directory, fill = small_disk
    run = open_checkpointer(directory)
    fill(True)
    run.save(1, {"denoiser": {"parameters/x": torch.arange(60_000.0)}}, extra_of(1))
    run._thread.join()
    with pytest.raises(EnvironmentFault, match="disk is full"):
        run.poll()
    assert run.poll() == []


def test_a_medium_that_lies_is_caught_before_anything_is_deleted(tmp_path, monkeypatch):
    """What is read back differs from what was written: nothing is committed, and nothing older goes."""
    write_steps(tmp_path, 1, keep=1)
    run = open_checkpointer(tmp_path, keep=1)
    honest = FileStore.reader

    def lying(self, path):
        content = bytearray((self.root / path).read_bytes())
        if path.endswith(".distcp"):
            content[len(content) // 2] ^= 1
            return io.BytesIO(content)
        return honest(self, path)

    monkeypatch.setattr(FileStore, "reader", lying)
    with pytest.raises(EnvironmentFault, match="not what was written"):
        _save_and_wait(run, 2, state_of(2))
    monkeypatch.undo()
    assert _folders(tmp_path) == ["step_00000001"]


def test_an_unusable_directory_is_named_at_the_start(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="cannot be kept there"):
        open_checkpointer(tmp_path / "file")


def test_a_programming_error_is_not_dressed_up_as_the_users(tmp_path, monkeypatch):
    run = open_checkpointer(tmp_path)
    monkeypatch.setattr(FileStore, "sizes", lambda self, folder: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        _save_and_wait(run, 1, state_of(1))
    assert _folders(tmp_path) == []


def test_killed_at_any_moment_nothing_committed_is_lost(tmp_path):
    """Twenty SIGKILLs, of a lone process and of one of two ranks: every restart finds all that was committed, whole."""
    report = _die("random", tmp_path, "20")
    assert report["kills"] == 20
    assert report["newest"] >= report["acknowledged"] > 0


def test_dying_before_any_file_operation_loses_nothing(tmp_path):
    """Random kills rarely hit the instants that matter; this visits each of saving, expiring, replacing, restarting."""
    assert _die("everywhere", tmp_path)["operations"] > 40


def _die(*arguments):
    script = Path(__file__).parent.parent / "checkpoint_killing.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
