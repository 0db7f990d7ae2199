"""One node of a Ray that lives inside a Slurm allocation, started by one srun on all nodes.

Run as ``python -m sixfold_launchers.ray_node ORDER RUN_FOLDER``. Task 0 keeps the head, waits until every node has
joined, and keeps the driver; the others keep a raylet each. All keep watch: what dies ends its task, and with
``--kill-on-bad-exit`` the step. Ports and folders come from the job's number, the token is the job's own, so that
several jobs and users on one node do not meet. No Slurm program is called.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sixfold.distributed.stop_signals import STOP_SIGNALS, shield
from sixfold.errors import EnvironmentFault, SixfoldError
from sixfold_launchers.contract import port_of
from sixfold_launchers.profiles import SlurmRayProfile
from sixfold_launchers.ray_cluster import authentication, write_token
from sixfold_launchers.ray_driver import end_with_parent
from sixfold_launchers.ray_order import DRIVER_MODULE, Order, Requests
from sixfold_launchers.ray_server import RayServer

JOIN_TIMEOUT_S = 180.0
_POLL_S = 0.2
_DIED = 128 + signal.SIGKILL
_NOTICE_S = 3.0  # `ray start --block` looks at what it started once a second
_HEAD, _DASHBOARD, _CLIENT, _FIRST_AGENT, _AGENTS = 0, 1, 2, 3, 13  # of a job's 16 ports


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this task stands in the allocation, from Slurm's variables.

    Attributes:
        cluster: its name; another that shares a node may have a job of the same number.
        job: the job's number.
        attempt: how often the job was started before.
        node: number of this node, 0 is the head's.
        nodes: how many there are.
    """

    cluster: str = ""
    job: int
    attempt: int
    node: int
    nodes: int

    @classmethod
    def read(cls, slurm: Mapping[str, str]) -> Place:
        """Read it in a task of srun."""
        return cls(
            cluster=slurm.get("SLURM_CLUSTER_NAME", ""),
            job=int(slurm["SLURM_JOB_ID"]),
            attempt=int(slurm.get("SIXFOLD_ATTEMPT", "0")),
            node=int(slurm["SLURM_PROCID"]),
            nodes=int(slurm["SLURM_NTASKS"]),
        )

    def port(self, offset: int) -> int:
        """One of the job's ports."""
        return port_of(self.job, self.attempt, offset=offset)

    @property
    def temporary(self) -> Path:
        """Ray's folder on this node; short, since the paths of its sockets may have no more than 107 characters."""
        return Path(f"/tmp/{self._prefix}-{self.attempt}-{self.node}")

    def remove_left_behind(self) -> None:
        """Remove the folders that keepers of earlier attempts were killed in."""
        for path in Path("/tmp").glob(f"{self._prefix}-*-*"):
            if int(path.name.split("-")[-2]) < self.attempt:
                shutil.rmtree(path, ignore_errors=True)

    @property
    def _prefix(self) -> str:
        owner = hashlib.sha256(f"{os.getuid()}@{self.cluster}".encode()).hexdigest()[:8]
        return f"sfray-{owner}-{self.job}"


@dataclass(frozen=True)
class Meeting:
    """Files in the run's folder by which the nodes of one attempt find the head, and learn of the end."""

    run: Path
    place: Place

    @property
    def token(self) -> Path:
        """The job's token, readable by its owner alone."""
        return self._path("token")

    @property
    def address(self) -> Path:
        """Where the head listens; it is there once the head has chosen."""
        return self._path("address")

    @property
    def ready(self) -> Path:
        """There when every node has joined."""
        return self._path("ready")

    @property
    def ended(self) -> Path:
        """There when the driver or Ray on any node has ended, and all nodes go."""
        return self._path("ended")

    def clear(self) -> None:
        """Remove them, and those of attempts that were killed."""
        for path in self.run.glob(".ray-*"):
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.run / f".ray-{self.place.job}-{self.place.attempt}-{name}"


def head_arguments(place: Place, profile: SlurmRayProfile, host: str) -> list[str]:
    """Arguments of ``ray start`` for the head; its dashboard listens to this node alone."""
    return [
        *_common_arguments(place, profile, host),
        "--head",
        f"--port={place.port(_HEAD)}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={place.port(_DASHBOARD)}",
        f"--ray-client-server-port={place.port(_CLIENT)}",
    ]


def worker_arguments(place: Place, profile: SlurmRayProfile, host: str, address: str) -> list[str]:
    """Arguments of ``ray start`` for another node."""
    return [*_common_arguments(place, profile, host), f"--address={address}"]


def _common_arguments(place: Place, profile: SlurmRayProfile, host: str) -> list[str]:
    return [
        "start",
        "--block",
        f"--node-ip-address={host}",
        f"--num-cpus={profile.cpus_per_node}",
        f"--num-gpus={profile.gpus_per_node}",
        f"--temp-dir={place.temporary}",
        # Nodes of a test cluster are one machine: their agents must not meet at Ray's one default.
        f"--dashboard-agent-listen-port={place.port(_FIRST_AGENT + place.node % _AGENTS)}",
        # Any free ports: Ray's default range holds those of the job.
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
    ]


def main() -> int:
    """Keep this node until the driver has ended; return the task's exit code."""
    order, run = Order.read(Path(sys.argv[1])), Path(sys.argv[2])
    place = Place.read(os.environ)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: Requests(run).make("stop"))
    try:
        place.remove_left_behind()
        make_own_folder(place.temporary)
    except SixfoldError as error:
        sys.stderr.write(f"node {place.node}: {error}\n")
        return error.exit_code
    try:
        return _keep_head(order, run, place) if place.node == 0 else _keep_worker(order, run, place)
    except SixfoldError as error:
        sys.stderr.write(f"node {place.node}: {error}\n")
        return error.exit_code
    finally:
        shutil.rmtree(place.temporary, ignore_errors=True)


def make_own_folder(path: Path) -> None:
    """Make a new folder that this user alone may enter, in place of what an earlier attempt left there.

    Raises:
        EnvironmentFault: somebody else made one of that name.
    """
    try:
        if path.exists() and path.lstat().st_uid == os.getuid():
            shutil.rmtree(path)
        path.mkdir(mode=0o700)
    except OSError as error:
        raise EnvironmentFault.of(
            f"Ray's folder cannot be made: {error.strerror}", where=str(path), fix="have its owner remove it"
        ) from error


def _keep_head(order: Order, run: Path, place: Place) -> int:
    profile, meeting, host = _profile(order), Meeting(run, place), own_address()
    meeting.clear()
    write_token(meeting.token)
    ray = Ray(head_arguments(place, profile, host), meeting)
    try:
        address = f"{host}:{place.port(_HEAD)}"
        _write(meeting.address, address)
        _wait_for_nodes(place, meeting, ray)
        _write(meeting.ready, "")
        driver = subprocess.Popen(
            [sys.executable, "-m", DRIVER_MODULE, sys.argv[1], "--run", str(run)],
            env={**os.environ, **authentication(meeting.token), "RAY_ADDRESS": address},
            preexec_fn=_in_our_hands,  # noqa: PLW1509  # no threads here
        )
        return _first_to_end(driver, ray, meeting)
    finally:
        _write(meeting.ended, "")
        ray.stop()
        meeting.token.unlink(missing_ok=True)


def _keep_worker(order: Order, run: Path, place: Place) -> int:
    profile, meeting = _profile(order), Meeting(run, place)
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    while not meeting.address.exists():
        if time.monotonic() > deadline_s:
            raise _too_late("the head did not start", place)
        time.sleep(_POLL_S)
    ray = Ray(worker_arguments(place, profile, own_address(), meeting.address.read_text()), meeting)
    try:
        while not meeting.ended.exists():
            if ray.has_died():
                return _died("Ray", place)
            time.sleep(_POLL_S)
        return 0
    finally:
        _write(meeting.ended, "")
        ray.stop()


def _first_to_end(driver: subprocess.Popen[bytes], ray: Ray, meeting: Meeting) -> int:
    """Wait for the driver; if Ray dies under it, on any node, end it too. The driver may be the first to notice."""
    while (code := driver.poll()) is None and not ray.has_died() and not meeting.ended.exists():
        time.sleep(_POLL_S)
    if code is None:
        driver.kill()
        driver.wait()
    elif code == 0 or not (ray.dies_within(_NOTICE_S) or meeting.ended.exists()):
        return code if code >= 0 else 128 - code
    return _died("Ray's head", meeting.place) if ray.has_died() else _DIED  # another node has said so


def _wait_for_nodes(place: Place, meeting: Meeting, ray: Ray) -> None:
    server = RayServer(f"http://127.0.0.1:{place.port(_DASHBOARD)}", meeting.token)
    deadline_s, found = time.monotonic() + JOIN_TIMEOUT_S, 0
    while found < place.nodes:
        if ray.has_died():
            raise _too_late("Ray's head has ended", place)
        if time.monotonic() > deadline_s:
            raise _too_late(f"{found} of {place.nodes} Ray nodes have joined", place)
        time.sleep(_POLL_S)
        try:
            found = len(server.nodes())
        except EnvironmentFault:
            continue  # it is starting


def _too_late(what: str, place: Place) -> SixfoldError:
    return EnvironmentFault.of(
        what, where=f"job {place.job}, node {place.node}, Ray's logs in {place.temporary}", fix="requeue the job"
    )


class Ray:
    """Ray on this node.

    Until all nodes have joined it is started again when it ends: it gives itself, and the head, half a minute to come
    up, which a busy machine may exceed.
    """

    def __init__(self, arguments: Sequence[str], meeting: Meeting) -> None:
        self._arguments, self._meeting = arguments, meeting
        self._deadline_s = time.monotonic() + JOIN_TIMEOUT_S
        self._process = self._start()

    def has_died(self) -> bool:
        """Whether it has ended for good."""
        if self._process.poll() is None:
            return False
        if self._meeting.ready.exists() or time.monotonic() > self._deadline_s:
            return True
        self.stop()
        self._process = self._start()
        return False

    def dies_within(self, timeout_s: float) -> bool:
        """Whether it ends in a moment."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """End it with all it started, at once: nothing in it is needed again, and none of it hears a request."""
        import psutil  # type: ignore[import-untyped]  # it ships no types

        while processes := [each for each in psutil.process_iter() if _session_of(each.pid) == self._process.pid]:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.poll()
            psutil.wait_procs(processes, timeout=_POLL_S)
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *self._arguments],
            env={**os.environ, **authentication(self._meeting.token), "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_in_our_hands,  # noqa: PLW1509  # no threads here; Ray's own reaper ends its session
        )


def _in_our_hands() -> None:
    """Have this process end with the keeper, and only by it.

    Slurm asks every process of a step to end. The keeper is to have the ranks save first, and they need Ray meanwhile.
    """
    end_with_parent()
    shield()


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None  # it has ended


def _died(what: str, place: Place) -> int:
    """Say so; return an exit code that reads as an end by a signal: the job may go on after it, on one node too."""
    sys.stderr.write(f"{what} has died on node {place.node}; the step ends\n")
    return _DIED


def own_address() -> str:
    """The address by which other nodes reach this one: that of the way out, or loopback where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent; the kernel names the interface it would take
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def _profile(order: Order) -> SlurmRayProfile:
    assert isinstance(order.profile, SlurmRayProfile)
    return order.profile


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
