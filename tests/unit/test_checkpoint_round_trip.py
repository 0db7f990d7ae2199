"""What is saved is what comes back, and saving does not get in the way of training."""

import json
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoint_helpers import empty_state, equal, extra_of, open_checkpointer, state_of, write_steps
from sixfold.checkpoint import checkpointer as checkpointer_module
from sixfold.checkpoint.store import FileStore
from sixfold.errors import CheckpointError


def _nothing_to_say(message):
    raise AssertionError(f"a sound directory needs no comment: {message}")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, asynchronous):
    states = {**state_of(1), **state_of(2, role="critic")}
    states["denoiser"]["parameters/odd"] = torch.tensor([float("inf"), float("-inf"), -0.0, 1e-45])
    states["denoiser"]["empty"] = torch.zeros(0, 3)
    states["denoiser"]["half"] = torch.randn(5).to(torch.bfloat16)
    states["denoiser"]["view"] = torch.randn(6, 8)[::2, 1:5]  # neither contiguous nor alone in its storage
    writing = open_checkpointer(tmp_path, asynchronous=asynchronous)
    writing.save(7, states, extra_of(7))
    writing.close()
    (committed,) = writing.poll()
    assert (committed.step, committed.uri) == (7, str(tmp_path / "step_00000007"))

    reading = open_checkpointer(tmp_path)
    candidate = reading.newest_verified(_nothing_to_say)
    templates = {
        role: {name: torch.ones_like(value) for name, value in state.items()} for role, state in states.items()
    }
    assert reading.load(candidate, templates) == extra_of(7)
    assert candidate.step == 7
    assert equal(templates, states)


def test_a_new_directory_has_no_candidate(tmp_path):
    assert open_checkpointer(tmp_path / "run" / "checkpoints").newest_verified(_nothing_to_say) is None


def test_a_template_may_ask_for_part_of_a_checkpoint_but_not_for_more(tmp_path):
    write_steps(tmp_path, 1)
    reading = open_checkpointer(tmp_path)
    candidate = reading.newest_verified(_nothing_to_say)
    part = {"denoiser": {"ema/body.bias": torch.zeros(37)}}
    reading.load(candidate, part)
    assert torch.equal(part["denoiser"]["ema/body.bias"], state_of(1)["denoiser"]["ema/body.bias"])
    more = {"denoiser": {"ema/head": torch.zeros(2), "parameters/body.bias": torch.zeros(4)}}
    with pytest.raises(CheckpointError) as caught:
        reading.load(candidate, more)
    assert "roles/denoiser/ema/head is not in it" in str(caught.value)
    assert "parameters/body.bias has shape (37,) in it, here (4,)" in str(caught.value)


def test_another_recipe_is_refused_and_the_difference_named(tmp_path):
    write_steps(tmp_path, 1, settings={"networks.denoiser": {"width": 128, "depth": 4}, "seed": 0})
    reading = open_checkpointer(
        tmp_path,
        recipe_hash="recipe-2",
        fingerprint="data-2",
        settings={"networks.denoiser": {"width": 256, "depth": 4}, "seed": 0},
    )
    candidate = reading.newest_verified(_nothing_to_say)
    with pytest.raises(CheckpointError) as caught:
        reading.load(candidate, empty_state())
    text = str(caught.value)
    assert "networks.denoiser.width is 256, the checkpoint has 128" in text
    assert "data-2" in text
    assert "data-1" in text
    assert "seed" not in text
    assert "depth" not in text
    assert caught.value.exit_code == 2


def test_a_changed_recipe_hash_alone_may_resume(tmp_path):
    write_steps(tmp_path, 1, settings={"seed": 0})
    reading = open_checkpointer(tmp_path, recipe_hash="train.steps-extended", settings={"seed": 0})
    states = empty_state()
    reading.load(reading.newest_verified(_nothing_to_say), states)
    assert equal(states, state_of(1))


def test_stock_dcp_reads_our_checkpoints(tmp_path):
    """The format is DCP's own: its public loader, which knows nothing of this project, agrees on every value."""
    write_steps(tmp_path, 3)
    loaded = {f"roles/denoiser/{name}": value for name, value in empty_state()["denoiser"].items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(loaded, checkpoint_id=tmp_path / "step_00000003", no_dist=True)
    assert all(torch.equal(loaded[f"roles/denoiser/{name}"], value) for name, value in state_of(3)["denoiser"].items())


def test_a_step_is_saved_once_and_a_failed_step_again(tmp_path):
    run = open_checkpointer(tmp_path)
    run.save(3, state_of(3), extra_of(3))
    assert run.save(3, state_of(3), extra_of(3)).skipped
    run.wait()
    assert [each.step for each in run.poll()] == [3]
    resumed = open_checkpointer(tmp_path)
    resumed.load(resumed.newest_verified(_nothing_to_say), empty_state())
    assert resumed.save(3, state_of(3), extra_of(3)).skipped


class _GatedStore(FileStore):
    """A real store whose data files wait for a gate, and which notes what happens in which order."""

    def __init__(self, root):
        super().__init__(root)
        self.gate = threading.Event()
        self.writing = threading.Event()
        self.history = []

    def writer(self, path):
        if path.endswith(".distcp"):
            self.history.append(f"write {path.split('.')[0]}")
            self.writing.set()
            assert self.gate.wait(60)
        return super().writer(path)

    def commit(self, temporary, step, attempt):
        self.history.append(f"commit step_{step:08d}")
        return super().commit(temporary, step, attempt)


@pytest.fixture
def gated(tmp_path, monkeypatch):
    store = _GatedStore(tmp_path)
    monkeypatch.setattr(checkpointer_module, "open_store", lambda location: store)
    return store


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, gated):
    run = open_checkpointer(tmp_path)
    states = state_of(1)
    run.save(1, states, extra := extra_of(1))
    assert gated.writing.wait(60)
    for _ in range(3):  # further optimizer steps, in place, with the write still held up
        for value in states["denoiser"].values():
            value.add_(1)
        extra["progress"]["step"] += 1
        assert run.poll() == []
    assert gated.history == ["write step_00000001"]
    gated.gate.set()
    run.wait()
    assert [each.step for each in run.poll()] == [1]

    loaded = empty_state()
    assert run.load(run.newest_verified(_nothing_to_say), loaded) == extra_of(1)
    assert equal(loaded, state_of(1)), "the staged copy must not follow the live state"


def test_at_most_one_save_is_in_flight_and_buffers_are_reused(tmp_path, gated):
    run = open_checkpointer(tmp_path)
    run.save(1, state_of(1), extra_of(1))
    first = {name: value.data_ptr() for name, value in run._buffers._buffers.items()}
    assert gated.writing.wait(60)
    second = threading.Thread(target=lambda: run.save(2, state_of(2), extra_of(2)))
    second.start()
    gated.gate.set()
    second.join()
    run.wait()
    assert gated.history == [
        "write step_00000001",
        "commit step_00000001",
        "write step_00000002",
        "commit step_00000002",
    ]
    assert {name: value.data_ptr() for name, value in run._buffers._buffers.items()} == first
    loaded = empty_state()
    run.load(run.newest_verified(_nothing_to_say), loaded)
    assert equal(loaded, state_of(2))


def test_extra_must_be_plain_json(tmp_path):
    run = open_checkpointer(tmp_path)
    with pytest.raises(AssertionError, match="plain JSON"):
        run.save(1, state_of(1), {"data": {"position": (1, 2)}})
    with pytest.raises(ValueError, match="JSON"):
        run.save(1, state_of(1), {"loss": float("nan")})


def test_the_folder_reads_like_documentation(tmp_path):
    write_steps(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000005"]
    assert (tmp_path / "latest").read_text() == "step_00000005"
    manifest = json.loads((tmp_path / "step_00000005" / "MANIFEST.json").read_text())["manifest"]
    assert manifest["extra"] == extra_of(5)
    assert manifest["identity"]["recipe_hash"] == "recipe-1"
    assert manifest["identity"]["rng_version"].startswith("philox")
    files = {path.name: path.stat().st_size for path in (tmp_path / "step_00000005").iterdir()}
    files.pop("MANIFEST.json")
    assert {name: record["size_bytes"] for name, record in manifest["files"].items()} == files
    text = b"".join(path.read_bytes() for path in (tmp_path / "step_00000005").iterdir())
    assert str(tmp_path).encode() not in text, "a checkpoint may be moved"


def test_settings_import_no_torch():
    code = "import sixfold.checkpoint.config, sys; sys.exit('torch' in sys.modules or 'fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
