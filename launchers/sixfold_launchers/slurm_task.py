"""One rank under srun: Slurm's variables become the worker's, secrets are read here, and rank 0 leaves the outcome.

Run as ``python -m sixfold_launchers.slurm_task RUN_FOLDER [--secrets FOLDER NAME...]``. Nothing here calls a Slurm
program: compute nodes and containers often lack them.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from sixfold.train.rank import StopRequest
from sixfold_launchers.contract import leave_outcome, port_of


def main() -> None:
    """Work as one rank on the run folder named on the command line."""
    stop_requested = StopRequest()
    folder, secrets = Path(sys.argv[1]), sys.argv[3:]
    os.environ.update(rank_variables(os.environ))

    from sixfold.errors import user_facing
    from sixfold.tracking.events import last_status
    from sixfold.train import worker
    from sixfold.train.run_folder import RunFolder, held
    from sixfold_launchers.secrets import put_into_environment

    rank = int(os.environ.get("RANK", "0"))
    with ExitStack() as stack:
        try:
            if secrets:
                put_into_environment(secrets[1:], secrets[0])
            if rank == 0:
                stack.enter_context(held(RunFolder(folder)))
        except Exception as error:  # as in the worker: what the user can mend goes where the launcher looks for it
            known = user_facing(error)
            if known is None:
                raise
            RunFolder(folder).leave_error(rank, str(known))
            sys.exit(f"rank {rank}: {known}")
        worker.main(stop_requested)
        status = last_status(folder)
        if rank == 0 and status is not None:
            leave_outcome(folder, status)


def rank_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """Translate a step's SLURM_* variables to those that a rank is told by; none for a rank that is alone."""
    size = int(slurm["SLURM_NTASKS"])
    threads = {"OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS") or slurm.get("SLURM_CPUS_PER_TASK", "1")}
    if size == 1:
        return threads
    return {
        **threads,
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": re.split(r"\D", slurm["SLURM_STEP_TASKS_PER_NODE"])[0],
        "MASTER_ADDR": _first_node(slurm),
        "MASTER_PORT": str(port_of(int(slurm["SLURM_JOB_ID"]), int(slurm.get("SIXFOLD_ATTEMPT", "0")))),
    }


def _first_node(slurm: Mapping[str, str]) -> str:
    """Where rank 0 runs: its node's name if that resolves here, else the address that srun, on that node, gives."""
    name = hosts(slurm["SLURM_STEP_NODELIST"])[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return slurm["SLURM_LAUNCH_NODE_IPADDR"]
    return name


def hosts(nodelist: str) -> list[str]:
    """Expand Slurm's list of nodes: ``n[1-2,07],gpu3`` to n1, n2, n07, gpu3; ``scontrol show hostnames`` without it."""
    names: list[str] = []
    for group in re.findall(r"(?:[^,\[\]]+|\[[^\]]*\])+", nodelist):
        parts = [_choices(part) for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", group)]
        names.extend("".join(choice) for choice in itertools.product(*parts))
    return names


def _choices(part: str) -> list[str]:
    if not part.startswith("["):
        return [part]
    found: list[str] = []
    for numbers in part[1:-1].split(","):
        first, _, last = numbers.partition("-")
        found.extend(str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1))
    return found


if __name__ == "__main__":
    main()
