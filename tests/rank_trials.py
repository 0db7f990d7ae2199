"""Two ranks that train, are asked to stop or killed at some moment, and go on in the next trial; run by tests.

Ranks are forked from this process, which has imported everything but runs no threads: a trial costs a second instead of
an import of torch. They enter where a launcher's ranks do, with requests blocked until they can hear them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import accelerate
import torch
import torch._dynamo

from sixfold.distributed.stop_signals import STOP_SIGNALS
from sixfold.recipe.load import load_recipe
from sixfold.tracking.events import read_metrics
from sixfold.train import rank as entry
from sixfold.train import worker
from sixfold_launchers.local import rank_environment, rendezvous

IMPORTED_FOR_THE_RANKS = (accelerate, torch._dynamo, worker)
RANKS = 2
GRACE_S = 60.0


class Ranks:
    """The forked ranks of one trial."""

    def __init__(self, run: Path) -> None:
        shared = rendezvous(RANKS)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self.pids = [self._fork(run, rank_environment(rank, shared)) for rank in range(RANKS)]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _fork(self, run: Path, environment: dict[str, str]) -> int:
        pid = os.fork()
        if pid == 0:
            os.environ |= environment
            sys.argv = ["rank", str(run)]
            with (run / "output.txt").open("a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            try:
                entry.main()
            except SystemExit as end:
                os._exit(int(end.code or 0))
            sys.stdout.flush()
            os._exit(0)
        return pid

    def ask(self, *ranks: int, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to some ranks."""
        for rank in ranks:
            os.kill(self.pids[rank], number)

    def end(self) -> float:
        """Wait until all have ended well; return the seconds it took."""
        asked = time.monotonic()
        left = dict(enumerate(self.pids))
        while left:
            for rank, pid in list(left.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    assert code == 0, f"rank {rank} ended with {code}"
                    del left[rank]
            assert time.monotonic() - asked < GRACE_S, f"ranks {list(left)} still run {GRACE_S} s after the request"
            time.sleep(0.005)
        return time.monotonic() - asked


def newest_loss(run: Path) -> int:
    """The newest logged step."""
    return max(read_metrics(run).get("train/loss", {0: 0.0}))


def saved_step(run: Path) -> int:
    """The newest committed step."""
    return max(
        (int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_????????")), default=0
    )


def wait_for_steps(run: Path, more: int) -> None:
    """Wait until the run has logged so many more steps."""
    log = run / "events.jsonl"
    before = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + 120
    while not log.exists() or log.stat().st_size <= before or newest_loss(run) < more:
        assert time.monotonic() < deadline, (run / "output.txt").read_text()[-2000:]
        time.sleep(0.01)


def kill(run: Path, number: int, chance: random.Random) -> float:
    """Kill one rank at a random moment after a step, or while a checkpoint is written; its launcher ends the other."""
    ranks = Ranks(run)
    wait_for_steps(run, (newest_loss(run) if (run / "events.jsonl").exists() else 0) + 1)
    if number % 2:
        wait_for_save(run)
    time.sleep(chance.uniform(0.0, 0.05 if number % 2 else 0.1))
    killed = chance.randrange(RANKS)
    ranks.ask(killed, number=signal.SIGKILL)
    ranks.ask(1 - killed, number=signal.SIGKILL)  # it may have ended by then, of its lost peer
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks.pids]
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] != 0
    return 0.0


def wait_for_save(run: Path) -> None:
    """Wait until a checkpoint is being written."""
    deadline = time.monotonic() + GRACE_S
    while not list((run / "checkpoints").glob("*.tmp-*")):
        assert time.monotonic() < deadline, "no checkpoint was seen being written"
        time.sleep(0.0005)


def preempt(run: Path, number: int, chance: random.Random) -> float:
    """Ask at one kind of moment: anywhere from the first, while a checkpoint is written, or inside a collective."""
    reached = newest_loss(run) if (run / "events.jsonl").exists() else 0
    ranks = Ranks(run)
    kind = number % 4
    if kind == 0:
        time.sleep(chance.uniform(0.0, 0.5))  # starting, restoring, first steps
        ranks.ask(0, 1)
    elif kind == 1:
        wait_for_steps(run, reached + 1)
        time.sleep(chance.uniform(0.0, 0.1))
        ranks.ask(chance.randrange(RANKS))  # one rank hears it, all stop
    elif kind == 2:
        wait_for_steps(run, reached + 1)
        wait_for_save(run)
        ranks.ask(0, 1)
    else:
        wait_for_steps(run, reached + 1)
        waiting = chance.randrange(RANKS)
        ranks.ask(1 - waiting, number=signal.SIGSTOP)
        time.sleep(0.1)  # by now the other rank waits for it in a collective
        ranks.ask(waiting)
        time.sleep(chance.uniform(0.0, 0.1))
        ranks.ask(1 - waiting, number=signal.SIGCONT)
    seconds = ranks.end()
    assert saved_step(run) == newest_loss(run) > reached, "the last step is not saved"
    return seconds


DISTURBANCES = {"preempt": preempt, "kill": kill}


def main(disturbance: str, folder: Path, trials: int) -> None:
    """Disturb one run over and over, train another undisturbed as far, and print what was found."""
    torch.set_num_threads(1)
    chance = random.Random(int.from_bytes(os.urandom(4), "little"))
    disturbed, undisturbed = folder / "disturbed", folder / "undisturbed"
    recipe = load_recipe(disturbed / "recipe.yaml").recipe
    for component in (recipe.objective, recipe.engine, *recipe.networks.values()):
        component.load()  # its modules are imported here, once
    seconds = [DISTURBANCES[disturbance](disturbed, number, chance) for number in range(trials)]
    ranks, until = Ranks(undisturbed), newest_loss(disturbed)
    wait_for_steps(undisturbed, until)
    ranks.ask(0, 1)
    ranks.end()
    losses = [read_metrics(run)["train/loss"] for run in (disturbed, undisturbed)]
    print(
        json.dumps(
            {
                "trials": trials,
                "slowest_s": max(seconds),
                "steps": until,
                "equal": all(losses[0][step] == losses[1][step] for step in range(1, until + 1)),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
