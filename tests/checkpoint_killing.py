"""Saves in child processes that die, at random moments or before each single file operation; run by tests.

Children are forked from this process, which has imported everything but runs no threads: a trial costs milliseconds
instead of an import of torch. Every checkpoint that a child has seen committed is *acknowledged* by one line in a file,
written before the child goes on; a restart must never find less than that.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint_helpers import empty_state, equal, extra_of, open_checkpointer, state_of
from sixfold.checkpoint.config import CheckpointConfig
from sixfold.checkpoint.manifest import MANIFEST, decode
from sixfold.checkpoint.ranks import new_group
from sixfold.checkpoint.store import open_store
from sixfold.checkpoint.verification import file_faults, newest_verified


def child(directory: Path, acknowledged: Path, rank: int, size: int, rendezvous: str) -> None:
    """Resume, check, then save steps until killed."""
    group = None
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
        group = new_group(CheckpointConfig(timeout_s=20.0))
    run = open_checkpointer(directory, group=group, rank=rank, world_size=size, keep=2, keep_every=7)
    candidate = run.newest_verified(reject)
    step = 0
    if candidate is not None:
        states = empty_state()
        assert run.load(candidate, states) == extra_of(candidate.step)
        assert equal(states, state_of(candidate.step)), f"step {candidate.step} is a mixture"
        step = candidate.step
    lines = acknowledged.read_text().split() if acknowledged.exists() else []
    assert step >= max(map(int, lines), default=0), f"step {lines[-1]} was committed, found {step}"
    while True:
        step += 1
        run.save(step, state_of(step), extra_of(step))
        for committed in run.poll():
            if rank == 0:
                with acknowledged.open("a") as stream:
                    stream.write(f"{committed.step}\n")


def reject(message: str) -> None:
    """A kill must never leave a committed checkpoint that does not verify."""
    if "rejected" in message:
        raise AssertionError(message)


def trial(directory: Path, acknowledged: Path, size: int, chance: random.Random, number: int) -> None:
    """Fork the ranks, kill one at a random moment, then the others as a launcher would."""
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                child(directory, acknowledged, rank, size, f"{acknowledged}.rendezvous-{number}")
            except AssertionError:
                traceback.print_exc()
                os._exit(9)
            except BaseException:  # a rank whose peer was killed before it
                os._exit(8)
        pids.append(pid)
    before = acknowledged.stat().st_size if acknowledged.exists() else 0
    if number % 2:  # half of the kills fall into the start (cleaning, verifying, first save), half among later saves
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (acknowledged.exists() and acknowledged.stat().st_size > before):
            time.sleep(0.002)
    time.sleep(chance.uniform(0.0, 0.12))
    chance.shuffle(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if 9 in codes:
        raise SystemExit(f"trial {number} of {size} ranks: {codes}")


def random_kills(folder: Path, kills: int) -> None:
    """Kill ranks at random moments of saving over and over, and print what was found."""
    chance = random.Random(int.from_bytes(os.urandom(4), "little"))
    directory, acknowledged = folder / "checkpoints", folder / "acknowledged"
    for number in range(kills):
        trial(directory, acknowledged, 1 if number < kills // 2 else 2, chance, number)
    run = open_checkpointer(directory, keep=2)
    candidate = run.newest_verified(reject)
    states = empty_state()
    run.load(candidate, states)
    assert equal(states, state_of(candidate.step))
    newest = max(map(int, acknowledged.read_text().split()))
    assert not [path for path in directory.iterdir() if ".tmp-" in path.name]
    print(json.dumps({"kills": kills, "newest": candidate.step, "acknowledged": newest}))


MUTATING_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def save_and_die(directory: Path, acknowledge: int, operation: int) -> None:
    """Save, expire and replace checkpoints, but stop dead before the given file operation under ``directory``."""
    done = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        if event in MUTATING_EVENTS and (event != "open" or str(directory) in str(arguments[0])):
            done += 1
            if done == operation:
                os._exit(7)

    sys.addaudithook(hook)
    for steps in ((1, 2), (2, 3)):  # the second opens what the first left, as a restart would, and replaces its newest
        run = open_checkpointer(directory, keep=1, asynchronous=False)
        for step in steps:
            run.save(step, state_of(step), extra_of(step))
            os.write(acknowledge, bytes([step]))
        run.close()


def crash_everywhere(folder: Path) -> None:
    """For every n, die before the n-th file operation; what was acknowledged must be there, whole, and nothing half."""
    operation, died = 0, True
    while died:
        operation += 1
        directory = folder / f"before-{operation}"
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            save_and_die(directory, theirs, operation)
            os._exit(0)
        os.close(theirs)
        died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        acknowledged = max(os.read(ours, 64), default=0)
        os.close(ours)
        candidate = newest_verified(directory, reject)
        assert (0 if candidate is None else candidate.step) >= acknowledged, f"operation {operation}: {candidate}"
        for committed in open_store(directory).committed():  # not only the newest: it may be damaged one day
            manifest = decode((directory / committed.folder / MANIFEST).read_bytes())
            assert not file_faults(open_store(directory), committed.folder, manifest, list(manifest.files))
        run = open_checkpointer(directory, keep=1)
        if candidate is not None:
            states = empty_state()
            assert run.load(candidate, states) == extra_of(candidate.step)
            assert equal(states, state_of(candidate.step)), f"operation {operation}: step {candidate.step} is a mixture"
        run.save(9, state_of(9), extra_of(9))
        run.close()
        left = sorted(path.name for path in directory.iterdir() if path.is_dir())
        assert left == ["step_00000009"], f"operation {operation} left {left}"
    print(json.dumps({"operations": operation - 1}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "random":
        random_kills(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        crash_everywhere(Path(sys.argv[2]))
