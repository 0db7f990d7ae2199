"""How long a user waits for the first step: `sixfold run` here, and `sixfold submit --to ray` on a cluster that is up.

    python tests/benchmarks/bench_startup.py --data data/stdlib [--rounds 5] [--only run] [KEY=VALUE ...]

Prints the median and the extremes of the seconds from the start of the command to the first step in the event log. The
first round warms the files up and is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sixfold.tracking.events import EVENTS, read_metrics
from sixfold_launchers import ray_cluster

TIMEOUT_S = 300.0
SIXFOLD = (sys.executable, "-m", "sixfold.cli.main")
HERE = ("--with", "snapshot.policy=installed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lm/moe-smoke")
    parser.add_argument("--data", default="data/stdlib")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["run", "ray"])
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    settings = [options.recipe, f"data.path={Path(options.data).absolute()}", "train.log_every_steps=1"]
    settings += ["tracking.type=jsonl", *options.overrides]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SIXFOLD_STATE"] = str(folder / "state")
        if options.only != "ray":
            report("sixfold run", [run_here(settings, folder / f"run-{n}") for n in range(options.rounds + 1)])
        if options.only != "run":
            ray_cluster.up(ray_cluster.default_folder(), nodes=2)
            try:
                waits = [submit(settings, folder / f"ray-{n}") for n in range(options.rounds + 1)]
            finally:
                ray_cluster.down(ray_cluster.default_folder())
            report("submit --to ray", waits)


def run_here(settings: list[str], run: Path) -> float:
    """Seconds from `sixfold run` to its first step."""
    started = time.perf_counter()
    command = subprocess.Popen([*SIXFOLD, "run", *settings, "--run-dir", str(run)], stdout=subprocess.DEVNULL)
    seconds = first_step(run, started, command)
    command.terminate()
    command.wait()
    return seconds


def submit(settings: list[str], run: Path) -> float:
    """Seconds from `sixfold submit --to ray` to the job's first step."""
    started = time.perf_counter()
    command = [*SIXFOLD, "submit", *settings, "--to", "ray", *HERE, "--run-dir", str(run), "--key", run.name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = first_step(run, started)
    subprocess.run([*SIXFOLD, "jobs", "cancel", run.name], check=True, stdout=subprocess.DEVNULL)
    return seconds


def first_step(run: Path, started: float, command: subprocess.Popen[bytes] | None = None) -> float:
    """Wait for a run's first step."""
    while not (run / EVENTS).exists() or not read_metrics(run).get("train/loss"):
        assert command is None or command.poll() is None, "the command ended before the first step"
        assert time.perf_counter() - started < TIMEOUT_S, f"{run} took no step"
        time.sleep(0.02)
    return time.perf_counter() - started


def report(what: str, seconds: list[float]) -> None:
    counted = seconds[1:]
    print(
        f"{what:16} {statistics.median(counted):5.1f} s to the first step "
        f"({min(counted):.1f} to {max(counted):.1f}, median of {len(counted)})"
    )


if __name__ == "__main__":
    main()
