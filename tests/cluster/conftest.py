"""Real clusters, started once a session. In CI a cluster that cannot start fails the tests that need it."""

import json
import os
import subprocess
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from cluster_jobs import NODES, RECIPE, REFERENCE, TINY, Job, processes_naming, sixfold
from ray_runs import Nodes
from sixfold.errors import EnvironmentFault
from sixfold_launchers import ray_cluster

DEV_CLUSTER = Path(__file__).resolve().parents[2] / "infra" / "slurm" / "dev-cluster"
FIRST = ("test_slurm_chaos", "test_ray_training", "test_ray_slurm", "test_all_kinds")
"""Files in the order that two workers end together: each begins with two, and the first takes longest."""


def pytest_collection_modifyitems(items):
    """Mark what stands here, so that `make test` can leave it to `make cluster`."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(1200))
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def unavailable(why):
    """Fail where clusters are promised, skip with the reason where they are not."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session", autouse=True)
def book(tmp_path_factory):
    """A job book of the tests' own, and one thread a rank."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SIXFOLD_STATE", str(tmp_path_factory.mktemp("book")))
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


class SlurmCluster:
    """A dev cluster: its folder, its commands, its daemons."""

    command = DEV_CLUSTER

    def __init__(self, state):
        self.state = state

    def __call__(self, *command):
        """Run a Slurm command and return its output."""
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    def daemon(self, name):
        """The process id of munged, slurmctld or a node's slurmd."""
        daemons = json.loads((self.state / "daemons.json").read_text())
        return next(daemon["pid"] for daemon in daemons if daemon["name"] == name)

    def field(self, job, name):
        """One field of a job as the controller shows it."""
        shown = self("scontrol", "--oneliner", "show", "job", job)
        return next(part.partition("=")[2] for part in shown.split() if part.startswith(f"{name}="))

    def nodes(self, job):
        """The names of the nodes that a job runs on."""
        return self("scontrol", "show", "hostnames", self.field(job, "NodeList")).split()

    def start_now(self, job):
        """Spare a requeued job the two minutes that Slurm holds it back; whether it was waiting."""
        if self.field(job, "JobState") != "PENDING":
            return False
        # A node refuses a credential of the second in which it revoked the job's last one.
        requeued = datetime.fromisoformat(self.field(job, "SubmitTime"))
        if datetime.now() < requeued + timedelta(seconds=2):
            return False
        with suppress(subprocess.CalledProcessError):  # it has just started by itself
            self("scontrol", "update", f"JobId={job}", "StartTime=now")
        return True

    def kill_node(self, node):
        """What a power failure does to a node: its daemon and everything under it are gone at once."""
        tasks = [process for process in psutil.process_iter() if self._stands_on(process, node)]
        steps = {parent for task in tasks for parent in task.parents() if parent.name().startswith("slurmstepd")}
        # First what would still report the others' end.
        for process in [psutil.Process(self.daemon(node)), *steps, *tasks]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _stands_on(self, process, node):
        try:
            environment = process.environ()
        except psutil.Error:
            return False
        mine = environment.get("SLURM_CONF") == str(self.state / "slurm.conf")
        return mine and environment.get("SLURMD_NODENAME") == node

    def mend(self):
        """Start the daemons again that have ended, and wait until every node is idle."""
        subprocess.run([DEV_CLUSTER, "up", "--state", self.state], check=True, capture_output=True)

    def kill_daemon(self, node):
        """Take a node's slurmd away; what it started runs on."""
        psutil.Process(self.daemon(node)).kill()

    def is_idle(self):
        """Whether no allocation is held and no job waits."""
        return self("squeue", "--noheader") == ""


@pytest.fixture(scope="session")
def slurm_cluster(book, tmp_path_factory):
    """A real Slurm of several nodes on this host; SLURM_CONF names it to every command."""
    state = tmp_path_factory.mktemp("slurm")
    up = subprocess.run(
        [DEV_CLUSTER, "up", "--nodes", str(NODES), "--state", state], capture_output=True, text=True, check=False
    )
    if up.returncode:
        unavailable(f"no Slurm: {up.stderr.strip()}")
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(state / "slurm.conf"))
    yield SlurmCluster(state)
    patch.undo()
    subprocess.run([DEV_CLUSTER, "down", "--state", state], check=True)


@pytest.fixture(scope="session")
def nodes(book):
    """A real Ray of three nodes with a CPU each, one the head; a test may take some away and must bring them back."""
    nodes = Nodes(ray_cluster.default_folder())
    try:
        nodes.bring_up(3)
        yield nodes
    except EnvironmentFault as fault:
        unavailable(f"no Ray: {fault}")
    finally:
        ray_cluster.down(nodes.folder)


@pytest.fixture(scope="session")
def text(demo_data):
    """The data set of the small language model."""
    return demo_data / "stdlib"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder in which jobs are submitted; runs lie in `runs` below it."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "runs").mkdir()
    return folder


@pytest.fixture(scope="session")
def submit(text, workplace):
    """Submit the small language model to a profile; what still runs here at the end is ended."""
    jobs = []

    def submit_to(profile, *arguments, **options):
        jobs.append(Job.submit(profile, *arguments, data=text, runs=workplace / "runs", **options))
        return jobs[-1]

    yield submit_to
    for process in [process for job in jobs for process in processes_naming(job.id)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def refuse(text, workplace):
    """Submit what cannot be submitted; return the one screen that says so."""

    def submit(code, *arguments, to="slurm", environment=None, directory=workplace, inside=()):
        with_code = ["--with", "snapshot.policy=installed"] if "snapshot" not in str(arguments) else []
        runs = ["--with", f"runs={workplace}/runs"] if "runs=" not in str(arguments) else []
        done = sixfold(
            "submit", RECIPE, "--to", to, f"data.path={text}", "train.steps=3", *TINY, *with_code, *runs, *arguments,
            environment=environment, directory=directory, check=False, inside=inside,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "fix:" in done.stderr
        assert len(done.stderr.splitlines()) <= 12
        return done.stderr

    return submit


@pytest.fixture(scope="session")
def reference(submit):
    """The undisturbed run that others are held to: two local ranks, mirrored in MLflow."""
    job = submit("local", *REFERENCE, settings=("ranks=2",))
    job.wait_until_finished()
    return job
