"""A real multi-node Ray cluster on this machine: raylets on loopback with ports, folder and token of their own.

Several such clusters, and other people's, may stand side by side. A cluster's processes are those of its nodes'
sessions and those that inherited a variable with its mark; they are stopped, nothing else is touched (``ray stop``
would end every Ray of the machine). A token of mode 0600 keeps other users of the machine out: without it nobody can
join a node or submit a job.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sixfold.errors import EnvironmentFault, UserError
from sixfold_launchers.job_book import state_folder
from sixfold_launchers.profiles import SECRET_WORDS
from sixfold_launchers.ray_server import RayServer

HOST = "127.0.0.1"  # of the dashboard; nodes have loopback addresses of their own
MARK = "SIXFOLD_RAY_CLUSTER"
"""The variable that every process of a cluster inherits; its value is the cluster's mark."""

READY_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 96 << 20  # Ray Train moves functions and reports through it, training data never
_OF_THE_MACHINE = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|TZ|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV|PYTHON\w+|"
    r"(LC|XDG|CUDA|NVIDIA|NCCL|GLOO|OMP|MKL|TORCH|DS|RAY|MLFLOW|SIXFOLD)_\w+"
)
# A node that refuses five checks in a row is dead; on loopback they can follow each other faster than Ray's default.
_QUICK_DEATH = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}


@dataclass(frozen=True, kw_only=True)
class RayNode:
    """One node of a cluster: the process that keeps its raylet, and when it began (a pid alone may be reused).

    ``agent_port`` is where its agent listens; Ray's default is one port for all nodes and clusters of a machine. The
    head has number 0; numbers are not used again, since a dead node's address and folder may linger.
    """

    number: int
    pid: int
    started_s: float
    agent_port: int

    @property
    def host(self) -> str:
        """Its address, 127.0.0.2 and on: for 127.0.0.1 Ray would take the machine's public one."""
        return f"127.0.0.{self.number + 2}"

    @property
    def is_running(self) -> bool:
        """Whether it is still that process."""
        process = _process(self.pid)
        return process is not None and abs(process.create_time() - self.started_s) < 1.0


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A cluster's record, kept in its folder as ``cluster.json`` from before the first process starts.

    Attributes:
        folder: where the record, the token and the logs lie.
        mark: what identifies its processes.
        temporary: Ray's own folder; short, since the paths of sockets may have no more than 107 characters.
        port: where nodes and drivers join.
        dashboard_port: where jobs are submitted.
        client_port: where Ray's remote client would be served; given so that clusters do not meet at the default.
        cpus_per_node: CPUs that each node offers to Ray; a number for scheduling, which needs no such cores.
        nodes: the head, then the others.
        started: how many nodes were ever started, dead ones too.
    """

    folder: str
    mark: str
    temporary: str
    port: int
    dashboard_port: int
    client_port: int
    cpus_per_node: int
    nodes: tuple[RayNode, ...] = ()
    started: int = 0

    @property
    def address(self) -> str:
        """What ``RAY_ADDRESS`` is for drivers."""
        return f"127.0.0.2:{self.port}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted, and people look."""
        return f"http://{HOST}:{self.dashboard_port}"

    @property
    def token_file(self) -> Path:
        """The file whose content lets a process in."""
        return Path(self.folder) / "token"

    @property
    def server(self) -> RayServer:
        """Its job server."""
        return RayServer(self.dashboard, self.token_file)

    def environment(self) -> dict[str, str]:
        """What a client, a driver or a node needs to be let in."""
        return authentication(self.token_file)


def authentication(token_file: Path) -> dict[str, str]:
    """Variables that switch Ray's token authentication on: heads, joining nodes, drivers and clients all need them."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def default_folder() -> Path:
    """Where ``sixfold ray`` keeps the cluster of this user on this machine."""
    return state_folder() / "ray"


def up(folder: Path, *, nodes: int, cpus_per_node: int = 2, timeout_s: float = READY_TIMEOUT_S) -> RayCluster:
    """Bring a cluster up, or go on with the one that is: dead nodes are replaced, missing ones added.

    Raises:
        EnvironmentFault: Ray is not installed, or a node died or did not join in time (its last words are shown).
        UserError: a running cluster has more nodes than asked for.
    """
    _check_installed()
    deadline_s = time.monotonic() + timeout_s
    while True:
        cluster = _complete(folder, nodes, cpus_per_node, deadline_s)
        try:
            wait_until_ready(cluster, nodes=nodes, timeout_s=deadline_s - time.monotonic())
        except EnvironmentFault:
            # Ray gives a raylet half a minute to come up, which a busy machine may exceed: dead nodes are replaced.
            if all(node.is_running for node in cluster.nodes) or time.monotonic() > deadline_s:
                raise
            continue
        return cluster


def _complete(folder: Path, nodes: int, cpus_per_node: int, deadline_s: float) -> RayCluster:
    """Start what is missing of a cluster; all of it if the head is."""
    cluster = find(folder)
    if cluster is not None and not (cluster.nodes and cluster.nodes[0].is_running):
        down(folder)
        cluster = None
    if cluster is None:
        cluster = _prepare(folder, cpus_per_node)
    alive = tuple(node for node in cluster.nodes if node.is_running)
    if len(alive) > nodes:
        raise UserError.of(
            f"the cluster is up with {len(alive)} nodes, {nodes} were asked for",
            where=str(folder),
            fix="run `sixfold ray down` first, or ask for as many as there are",
        )
    dead = tuple(node for node in cluster.nodes if node not in alive)
    _end(lambda: _processes(lambda pid: os.getsid(pid) in _sessions(dead)))  # a killed raylet's agents linger
    cluster = _record(replace(cluster, nodes=alive))
    while len(cluster.nodes) < nodes:
        cluster = add_node(cluster)
        while cluster.nodes[0].is_running and not _listens(cluster.nodes[0], cluster.port):
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.1)
    return cluster


def add_node(cluster: RayCluster) -> RayCluster:
    """Start one more node, the head if it is the first, and return the cluster with it; it joins within seconds."""
    (agent_port,) = _free_ports(1)
    node = RayNode(number=cluster.started, pid=0, started_s=0.0, agent_port=agent_port)
    with _log_of(cluster, node).open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *node_arguments(cluster, node)],
            env={**passed_on(os.environ), **cluster.environment(), MARK: cluster.mark, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at the terminal it was started from is not for it
        )
    found = _process(process.pid)
    node = replace(node, pid=process.pid, started_s=time.time() if found is None else found.create_time())
    return _record(replace(cluster, nodes=(*cluster.nodes, node), started=cluster.started + 1))


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """What of a shell's environment nodes are started with: every job of the cluster sees it, hence no secrets."""
    return {
        name: value
        for name, value in environment.items()
        if _OF_THE_MACHINE.fullmatch(name) and not SECRET_WORDS.search(name)
    }


def node_arguments(cluster: RayCluster, node: RayNode) -> list[str]:
    """The arguments of ``ray start`` for a node."""
    common = [
        "start",
        "--block",
        f"--node-ip-address={node.host}",
        f"--num-cpus={cluster.cpus_per_node}",
        "--num-gpus=0",
        f"--dashboard-agent-listen-port={node.agent_port}",
        # In a folder that nodes share, one unpacks a job's code again while ranks of another import it.
        f"--temp-dir={cluster.temporary}/{node.number}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
    ]
    if node.number > 0:
        # One log monitor a machine, or every line of a worker would be shown once for each node.
        return [*common, f"--address={cluster.address}", "--include-log-monitor=false"]
    return [
        *common,
        "--head",
        f"--port={cluster.port}",
        f"--dashboard-host={HOST}",
        f"--dashboard-port={cluster.dashboard_port}",
        f"--ray-client-server-port={cluster.client_port}",
        f"--system-config={json.dumps(_QUICK_DEATH)}",
    ]


def find(folder: Path) -> RayCluster | None:
    """Return the cluster whose record lies in ``folder``, running or not; None if there is none."""
    path = folder / "cluster.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    nodes = tuple(RayNode(**node) for node in record.pop("nodes"))
    return RayCluster(nodes=nodes, **record)


def down(folder: Path) -> int:
    """Stop what :func:`up` started there, and only that; return how many processes were ended, 0 if none were left."""
    cluster = find(folder)
    if cluster is None:
        return 0
    ended = _end(lambda: processes_of(cluster))
    shutil.rmtree(cluster.temporary, ignore_errors=True)
    for name in ("cluster.json", "token"):
        (folder / name).unlink(missing_ok=True)
    return ended


def wait_until_ready(cluster: RayCluster, *, nodes: int, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Return once the head counts ``nodes`` living nodes and takes jobs.

    Raises:
        EnvironmentFault: a node's process ended, or they were not there in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        for node in cluster.nodes:
            if not node.is_running:
                raise EnvironmentFault.of(
                    f"node {node.number} of the Ray cluster has ended:\n{_last_lines(_log_of(cluster, node))}",
                    where=cluster.folder,
                    fix="look at the words above; `sixfold ray down` clears what is left",
                )
        found = _joined(cluster)
        if found >= nodes:
            return
        if time.monotonic() > deadline_s:
            words = _last_lines(_log_of(cluster, cluster.nodes[-1]))
            raise EnvironmentFault.of(
                f"{found} of {nodes} Ray nodes were there after {timeout_s:.0f} s:\n{words}",
                where=cluster.folder,
                fix="free memory and cores of this machine, then try again",
            )
        time.sleep(0.2)


def processes_of(cluster: RayCluster) -> list[int]:
    """Pids of a cluster's living processes, with those of jobs and ranks, zombies left out.

    Some of Ray's processes rename themselves, which overwrites the environment that others see: these are known by
    their session. A session's number is not given to another while it has members.
    """
    wanted, sessions = f"{MARK}={cluster.mark}".encode(), _sessions(cluster.nodes)

    def belongs(pid: int) -> bool:
        marked = wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return marked or os.getsid(pid) in sessions

    return _processes(belongs)


def _sessions(nodes: Sequence[RayNode]) -> set[int]:
    """The nodes' sessions, less those whose number another process has taken over."""
    return {node.pid for node in nodes if node.is_running or _process(node.pid) is None}


def _processes(belongs: Callable[[int], bool]) -> list[int]:
    """Pids of living processes for which ``belongs`` answers yes, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            if belongs(pid) and _process(pid) is not None:
                found.append(pid)
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


def _prepare(folder: Path, cpus_per_node: int) -> RayCluster:
    folder.mkdir(parents=True, exist_ok=True)
    port, dashboard_port, client_port = _free_ports(3)
    cluster = RayCluster(
        folder=str(folder.absolute()),
        mark=secrets.token_hex(8),
        temporary=tempfile.mkdtemp(prefix="sixfold-ray-", dir="/tmp"),
        port=port,
        dashboard_port=dashboard_port,
        client_port=client_port,
        cpus_per_node=cpus_per_node,
    )
    write_token(cluster.token_file)
    return _record(cluster)


def write_token(path: Path) -> None:
    """Write a new token that only this user can read, from the first byte on."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _record(cluster: RayCluster) -> RayCluster:
    path = Path(cluster.folder) / "cluster.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(cluster), indent=2) + "\n")
    temporary.replace(path)
    return cluster


def _end(find_processes: Callable[[], list[int]]) -> int:
    """End all processes found: first asked, then not; new ones may appear while old ones go."""
    ended: set[int] = set()
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    number = signal.SIGTERM
    while found := find_processes():
        if time.monotonic() > deadline_s:
            number = signal.SIGKILL
        for pid in found:
            if pid not in ended or number == signal.SIGKILL:
                _send(pid, number)
        ended.update(found)
        time.sleep(0.1)
    for pid in ended:
        _reap(pid)
    return len(ended)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)


def _reap(pid: int) -> None:
    """Forget a child of this very process; others are reaped by their own parents."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _listens(node: RayNode, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((node.host, port)) == 0


def _joined(cluster: RayCluster) -> int:
    """How many nodes the head counts; 0 while it does not answer, or the agent that starts drivers does not listen."""
    try:
        return len(cluster.server.nodes()) if _listens(cluster.nodes[0], cluster.nodes[0].agent_port) else 0
    except EnvironmentFault:
        return 0


def _log_of(cluster: RayCluster, node: RayNode) -> Path:
    return Path(cluster.folder) / f"node-{node.number}.log"


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(line for line in lines[-12:] if line.strip())


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _process(pid: int) -> Any:
    """The process with a pid, None if it is gone or waits to be reaped."""
    import psutil  # type: ignore[import-untyped]  # it ships no types

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def _check_installed() -> None:
    if find_spec("ray") is None:
        raise EnvironmentFault.of("Ray is not installed", fix="pip install 'sixfold[ray]'")


def describe(cluster: RayCluster) -> Mapping[str, Any]:
    """What ``sixfold ray status`` tells: plain data without the token."""
    alive = [node.is_running for node in cluster.nodes]
    return {
        "address": cluster.address,
        "dashboard": cluster.dashboard,
        "token_file": str(cluster.token_file),
        "nodes": len(cluster.nodes),
        "nodes_running": sum(alive),
        "nodes_joined": _joined(cluster) if alive and alive[0] else 0,
        "cpus_per_node": cluster.cpus_per_node,
    }
