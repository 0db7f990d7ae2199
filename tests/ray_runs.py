"""What the Ray tests see of a real local cluster: its nodes, the ranks on them, and how to take them away."""

import os
import subprocess
import sys
from contextlib import suppress

import psutil

from cluster_jobs import command_of, session_of, wait_for
from sixfold_launchers import ray_cluster


class Nodes:
    """A local Ray cluster, as its record has it at each moment."""

    def __init__(self, folder):
        self.folder = folder

    @property
    def cluster(self):
        """The record."""
        return ray_cluster.find(self.folder)

    @property
    def size(self):
        """Nodes that run."""
        return sum(node.is_running for node in self.cluster.nodes)

    def bring_up(self, nodes):
        """Start, complete or leave as it is; return the cluster."""
        return ray_cluster.up(self.folder, nodes=nodes, cpus_per_node=1)

    def processes(self, title):
        """Processes of the cluster, jobs' included, with a text in their command line."""
        ours = set(ray_cluster.processes_of(self.cluster))
        return [process for process in psutil.process_iter() if process.pid in ours and title in command_of(process)]

    def ranks(self):
        """The processes of all ranks, that on the head first."""
        order = [node.pid for node in self.cluster.nodes]
        sessions = {process: session_of(process) for process in self.processes("ray::RayTrainWorker")}
        living = [process for process, session in sessions.items() if session in order]
        return sorted(living, key=lambda process: order.index(sessions[process]))

    def wait_for_ranks(self, job, count, other_than=()):
        """Wait until ``count`` new ranks are there, which is seconds before they train; return them."""
        old = {process.pid for process in other_than}
        found = []

        def there():
            found[:] = [process for process in self.ranks() if process.pid not in old]
            return len(found) == count

        wait_for(there, f"{count} ranks did not start", 300, job)
        return found

    def drivers(self):
        """The processes that drive jobs: the children that talk to Ray."""
        return [process for process in self.processes("ray_driver --attempt") if "/bin/sh" not in command_of(process)]

    def node_of(self, rank):
        """The node that a rank runs on."""
        return next(node for node in self.cluster.nodes if node.pid == os.getsid(rank.pid))

    def kill(self, node):
        """Take a node away as a power failure would."""
        with suppress(psutil.NoSuchProcess):  # it is gone already
            process = psutil.Process(node.pid)
            for each in [process, *process.children(recursive=True)]:
                each.kill()
            psutil.wait_procs([process], timeout=10)

    def kill_raylet(self, node):
        """Take Ray's daemon away from under the ranks of a node."""
        raylets = [each for each in self.processes("/raylet/raylet") if session_of(each) == node.pid]
        for raylet in raylets:
            raylet.kill()

    def drain(self, node):
        """Announce that a node will be taken away in five minutes, as a cloud does to a preemptible machine."""
        cluster = self.cluster
        (node_id,) = [each["node_id"] for each in cluster.server.nodes() if each["node_ip"] == node.host]
        options = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test")
        command = ("drain-node", f"--address={cluster.address}", f"--node-id={node_id}", *options)
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *command, "--deadline-remaining-seconds=300"],
            env={**os.environ, **cluster.environment()},
            check=True,
            timeout=60,
            capture_output=True,
        )
