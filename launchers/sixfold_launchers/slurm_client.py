"""Slurm's own commands: one place that runs them, says what they refuse, and reads what they answer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sixfold.errors import EnvironmentFault, Fault
from sixfold_launchers.contract import INTERRUPTED, State

_TIMEOUT_S = 60.0
_FIELDS = ("JobID", "JobArrayID", "State", "Reason", "NodeList", "RestartCnt", "exit_code")
_WORDS: dict[State, tuple[str, ...]] = {
    "pending": ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
    "running": ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"),
    "interrupted": ("NODE_FAIL", "PREEMPTED"),
    "finished": ("COMPLETED",),
    "cancelled": ("CANCELLED", "REVOKED"),
    "failed": ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
}


class SlurmRefusal(Exception):
    """What a Slurm command said when it refused."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job, or one task of an array, as the cluster describes it.

    Attributes:
        job_id: what commands take: ``123``, or ``123_4`` in an array.
        index: place in the array; None for a job that is none.
        state: Slurm's word.
        exit_code: of the batch script.
        killed: whether a signal ended the batch script, so that it could not ask for another turn.
    """

    job_id: str
    index: int | None
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    exit_code: int = 0
    killed: bool = False

    def read_state(self) -> State:
        """The state in the job book's words; what Slurm calls failed or timed out may only have been interrupted."""
        if self.state in ("FAILED", "TIMEOUT") and self.exit_code == INTERRUPTED:
            return "interrupted"
        if self.state == "FAILED" and self.killed:
            return "interrupted"
        return state_of(self.state)


def state_of(word: str) -> State:
    """The job book's word for Slurm's; ``lost`` for one that Slurm did not have when this was written."""
    return next((state for state, words in _WORDS.items() if word in words), "lost")


def slurm(*command: str, text: str | None = None) -> str:
    """Run a Slurm command and return its output.

    Raises:
        SlurmRefusal: it refused, in its own words.
        EnvironmentFault: it is not installed, or the controller does not answer.
    """
    program = shutil.which(command[0])
    if program is None:
        raise EnvironmentFault.of(
            f"{command[0]} is not installed on this machine",
            fix="submit from a login node of the cluster; for one on this machine: infra/slurm/dev-cluster up",
        )
    configuration = os.environ.get("SLURM_CONF")
    if configuration is not None and not Path(configuration).is_file():  # Slurm itself would look for it for a minute
        raise _no_answer("there is no such configuration file")
    try:
        done = subprocess.run(
            [program, *command[1:]], input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _no_answer(f"no answer in {_TIMEOUT_S:.0f} s") from error
    if done.returncode == 0:
        return done.stdout + (done.stderr if "--test-only" in command else "")
    said = done.stderr.strip() or done.stdout.strip()
    if re.search(
        r"(?i)unable to contact slurm controller|connection refused|could not establish a configuration", said
    ):
        raise _no_answer(said.splitlines()[-1])
    raise SlurmRefusal(said)


def _no_answer(said: str) -> EnvironmentFault:
    return EnvironmentFault(
        Fault(
            what=f"the Slurm controller does not answer: {said}",
            where=f"SLURM_CONF={_configuration()}",
            fix="see whether `scontrol ping` reaches it; for a cluster on this machine: infra/slurm/dev-cluster up",
        )
    )


def _configuration() -> str:
    return os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf")


def partitions() -> str:
    """The cluster's partitions in a line, with what their nodes have."""
    rows = slurm("sinfo", "--noheader", "-o", "%R|%D|%c|%m|%G|%l").splitlines()
    described = []
    for row in rows:
        name, nodes, cpus, memory, gres, limit = row.split("|")
        gpus = "" if gres == "(null)" else f", {gres}"
        described.append(f"{name} ({nodes} nodes with {cpus} CPUs, {memory} MiB{gpus}; limit {limit})")
    return "; ".join(described)


def refusal_fault(said: str, script: Path | str) -> Fault:
    """Turn sbatch's refusal into a fault that lists what the cluster has."""
    reasons = [re.sub(r"^(sbatch|allocation failure): (error: )?", "", line) for line in said.splitlines()]
    what = next((r for r in reasons if "sbatch" not in r.lower()), reasons[0] if reasons else "no reason given")
    what = re.sub(r"^(allocation failure|Batch job submission failed): ", "", what)
    fix = "change the profile, or override it: --with nodes=1 --with partition=NAME --with gpus_per_node=N"
    return Fault(what=f"Slurm refuses the job: {what}", where=str(script), allowed=partitions(), fix=fix)


def tasks_named(name: str) -> list[Task]:
    """Every job and array task of a name that the controller remembers, running or not; oldest first."""
    layout = ",".join(f"{field}:256|" for field in _FIELDS)
    output = slurm("squeue", "--noheader", "--states=all", "--array", f"--name={name}", "-O", layout)
    rows = sorted((line for line in output.splitlines() if line.strip()), key=lambda line: int(line.split("|")[0]))
    return [_parse(row) for row in rows]


def _parse(line: str) -> Task:
    _, job_id, state, reason, nodes, restarts, code = (part.strip() for part in line.split("|")[: len(_FIELDS)])
    index = job_id.partition("_")[2]
    exit_code, killed = read_end(code)
    return Task(
        job_id=job_id,
        index=int(index) if index.isdigit() else None,
        state=state,
        reason="" if reason == "None" else reason,
        nodes=nodes,
        restarts=int(restarts or 0),
        exit_code=exit_code,
        killed=killed,
    )


def read_end(text: str) -> tuple[int, bool]:
    """The exit code, and whether a signal ended the script, of ``75``, ``0:9`` or a raw wait status (19200, 9)."""
    code, *signals = [int(number) for number in re.findall(r"\d+", text)] or [0]
    if signals:
        return code, signals[0] > 0
    return (code >> 8, False) if code > 255 else (code, code == signal.SIGKILL)
