"""What the cluster tests share: the command, a small language model, and what its runs and processes show."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from sixfold.tracking.events import read_events, read_metrics
from tracked_run import Stored

RECIPE = "lm/moe-smoke"
TINY = [
    "train.log_every_steps=1",
    "data.global_batch=8",
    "data.sequence_length=32",
    "networks.lm.width=32",
    "networks.lm.depth=2",
    "evaluation=null",
    "sampling=null",
    "engine.precision=fp32",
]

PATIENCE_S = 400  # for what takes seconds on an idle machine
STEPS = 120
NODES = 9
"""Of the Slurm cluster that the tests start."""
REFERENCE = (
    "data.global_batch=12",
    "data.lanes=12",  # which 1, 2, 3, 4, 6 and 12 ranks can share
    f"train.steps={STEPS}",
    "checkpoint.every_steps=10",
    "optimizer.lr=3e-4",  # ranks of another number round otherwise, which larger steps amplify
    "tracking.type=mlflow",
    "tracking.system_metrics=false",
    "tracking.close_timeout_s=120",  # the whole run is mirrored when it ends, however busy the machine
)
"""What the fixture `reference` trains; submitted elsewhere it must train the same."""


def sixfold(*arguments, environment=None, directory=None, timeout=PATIENCE_S, check=True, inside=()):
    """Run the real command, inside another if need be; return it finished."""
    done = subprocess.run(
        [*inside, sys.executable, "-m", "sixfold.cli.main", *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


class Job:
    """A job submitted by the real command, and what it did."""

    def __init__(self, described):
        self.id, self.cluster_id, self.logs = described["job_id"], described["cluster_id"], Path(described["logs"])
        self.runs = [Path(run) for run in described["runs"]]
        self.run = self.runs[0]

    @classmethod
    def submit(cls, profile, *arguments, data, runs, settings=(), environment=None, recipe=RECIPE):
        """Submit the small language model, or another recipe, and return at once."""
        # Elsewhere runs what is tested here: the checkout, which may be dirty.
        code = "snapshot.policy=installed" if profile == "local" else "snapshot.policy=changes"
        profile_settings = [part for setting in (f"runs={runs}", code, *settings) for part in ("--with", setting)]
        done = sixfold(
            "submit", recipe, "--to", profile, f"data.path={data}", *TINY, *profile_settings, *arguments, "--json",
            environment=environment, directory=Path(runs).parent,
        )  # fmt: skip
        return cls(json.loads(done.stdout))

    def state(self):
        """The state that the book knows after asking the cluster."""
        return json.loads(sixfold("jobs", "show", self.id, "--json").stdout)["state"]

    def log(self):
        """Everything the job printed."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.logs.glob("*.out")))

    def wait_for_step(self, step, timeout=PATIENCE_S):
        """Wait until a run has logged a step."""
        wait_for(lambda: max(losses(self.run), default=0) >= step, f"{self.run} came to no step {step}", timeout, self)

    def wait_until_finished(self, timeout=PATIENCE_S):
        """Wait until every run has finished, and the launcher has said so."""
        wait_for(
            lambda: all(outcome(run) == "finished" for run in self.runs), f"{self.id} did not finish", timeout, self
        )

    def ranks(self):
        """The processes that train the first run now, here or on Slurm, by Ray or without."""
        marks = ("sixfold_launchers.slurm_task", "sixfold.train.")
        found = [process for process in processes_naming(self.run) if any(m in command_of(process) for m in marks)]
        ranks = {process.pid: process for process in found if not command_of(process).startswith("srun")}
        # A child that a rank has just forked still bears its command line.
        return [process for process in ranks.values() if process.ppid() not in ranks] + self.ray("ray::RayTrainWorker")

    def wait_for_ranks(self, count, other_than=(), meanwhile=lambda: None):
        """Wait until ``count`` new ranks are there, which is seconds before they train; return them."""
        found = []

        def there():
            meanwhile()
            found[:] = [rank for rank in self.ranks() if rank not in other_than]
            return len(found) == count

        wait_for(there, f"{count} ranks did not start", PATIENCE_S, self, every_s=0.3)
        return found

    def ray_folders(self):
        """Ray's folders on this host, of a job that has a Ray of its own inside Slurm."""
        return list(Path("/tmp").glob(f"sfray-*-{self.cluster_id}-*"))

    def ray(self, title):
        """Processes of the job's own Ray with a text in their command line."""
        naming = [process for folder in self.ray_folders() for process in processes_naming(f"{folder}/")]
        sessions = {session_of(process) for process in naming} - {None}
        return [process for process in processes_of_sessions(sessions) if title in command_of(process)]

    def leftovers(self):
        """What is on this host of the job: processes, and folders of its own Ray."""
        places = [self.run, *self.ray_folders()]
        return [command_of(process) for place in places for process in processes_naming(place)] + self.ray_folders()

    def wait_until_gone(self):
        """Wait until the cluster says that the job has finished, and nothing is left of it on this host."""
        wait_for(lambda: self.state() == "finished", "the job did not end", PATIENCE_S, self)
        wait_for(lambda: self.leftovers() == [], "something outlived the job", PATIENCE_S, self)


def wait_for(condition, failure, timeout, job=None, every_s=0.05):
    """Wait for a condition; on failure show what the job printed."""
    deadline = time.monotonic() + timeout
    while not condition():
        shown = "" if job is None else f"\n{job.log()[-3000:]}"
        assert time.monotonic() < deadline, f"{failure} within {timeout} s{shown}"
        time.sleep(every_s)


def losses(run):
    """Loss by step; empty before the first."""
    if not (run / "events.jsonl").is_file():
        return {}
    return read_metrics(run).get("train/loss", {})


def outcome(run):
    """How the run's last attempt ended, as the launcher leaves it."""
    path = run / "outcome"
    return path.read_text().strip() if path.exists() else None


def attempts(run):
    """The steps after which attempts started, one for each time that a run was started or resumed."""
    if not (run / "events.jsonl").is_file():
        return []
    return [event["step"] for event in read_events(run) if event.get("event") in ("started", "resumed")]


def wait_for_attempt(job, number, step=1, timeout=PATIENCE_S):
    """Wait until a run was started or resumed so many times, and has taken ``step`` steps since."""

    def reached():
        starts = attempts(job.run) if losses(job.run) else []
        return len(starts) >= number and max(losses(job.run), default=0) >= starts[-1] + step

    wait_for(reached, f"{job.run} did not come to attempt {number}", timeout, job)


def logged_steps(run):
    """The step of every metrics line that holds a loss, in order: a step written twice shows."""
    return [event["step"] for event in read_events(run) if "train/loss" in event.get("metrics", {})]


def mirrored(run, workplace):
    """A run in the MLflow store of the folder it was submitted in: names of what it holds, and points by metric."""
    stored = Stored(run, f"sqlite:///{workplace}/mlflow.db")
    metrics = [name for name in stored.run.data.metrics if not name.startswith("system/")]
    tags = {
        name for name in stored.run.data.tags if not name.startswith(("variable.", "version.", "mlflow.source.git"))
    }
    return {
        "parameters": set(stored.run.data.params),
        "tags": tags,
        "status": stored.run.info.status,
        "artifacts": stored.artifacts(),
        "points": {name: stored.steps(name) for name in metrics},
    }


def files_holding(words, folders):
    """Every file below the folders that holds one of the words."""
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return [path for path in files if any(word in path.read_bytes() for word in words)]


def command_of(process):
    """A process's command line; empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def processes_naming(path):
    """Processes with a path in their command line or working below it."""
    return [process for process in psutil.process_iter() if str(path) in command_of(process)]


def processes_of_sessions(sessions):
    """Processes of some sessions, in the sessions' order."""
    found = [(session_of(process), process) for process in psutil.process_iter()]
    return [process for wanted in dict.fromkeys(sessions) for session, process in found if session == wanted]


def session_of(process):
    """The session of a process; None when it has ended."""
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


class Held:
    """Holds ranks between two instructions, so that a test acts at a known step and nothing is trained meanwhile."""

    def __init__(self, processes):
        self.processes = processes

    def __enter__(self):
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.is_running():
                process.send_signal(signal.SIGCONT)

    def __getitem__(self, index):
        return self.processes[index]


class Frozen(Held):
    """Holds the ranks of a job on this machine or Slurm."""

    def __init__(self, job, ranks=None):
        self.job = job
        super().__init__(job.ranks() if ranks is None else ranks)

    def are_told_to_save(self):
        """Whether the job's ranks will hear, when they go on, that they are to save and end."""
        return (self.job.run / "request").exists() or self._has_pending(signal.SIGTERM, signal.SIGUSR1)

    def _has_pending(self, *numbers):
        masks = [pending(process.pid) for process in self.processes if process.is_running()]
        return all(any(mask >> (number - 1) & 1 for number in numbers) for mask in masks)


def pending(pid):
    """The mask of signals that wait for a process; every signal where it has just ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return -1
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return int(lines["ShdPnd"], 16) | int(lines["SigPnd"], 16)
