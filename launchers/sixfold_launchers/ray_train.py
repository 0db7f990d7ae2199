"""Ray Train runs Sixfold's worker on every rank of a job; this module runs on the cluster and alone knows Ray Train.

Ray decides where ranks live, notices when they or their nodes die, and starts them again; what is trained and saved is
the worker's own affair. The checkpoints in the run folder are the only truth: nothing is reported to Ray, and no state
of Ray's is needed to go on. The trainer is the one that Ray's ``TorchTrainer`` is made of, less its process group: the
worker joins its own (:func:`sixfold.distributed.process_group.join`), and neither driver nor controller imports torch.

Proved with Ray 2.60; of what is not public there, :class:`Trainer` (policies), :class:`Asked` and :func:`rooms` (nodes
that are being drained, free resources by node) make use.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private.state import available_resources_per_node, state
from ray.train import TrainingFailedError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from sixfold.errors import EnvironmentFault, user_facing
from sixfold_launchers.contract import leave_outcome, read_outcome
from sixfold_launchers.ray_order import Order, Requests, choose_ranks, rank_numbers
from sixfold_launchers.secrets import put_into_environment

__all__ = ["TrainingFailedError", "connect", "train_run"]

_LOOK_INTERVAL_S = 0.5
_SETTLE_S = 10.0
_SAVE_TIMEOUT_S = 600.0
_PROBE_TIMEOUT_S = 1.0


class SavedToRegroup(Exception):
    """All ranks have saved and ended so that others take over: not a failure, hence not counted as one."""


class GivenUp(Exception):
    """A rank ended by an error that another attempt would only repeat; its message is in the run folder."""


# --------------------------------------------------------------------------------------------- what every rank does


def train_on_rank(config: dict[str, str]) -> None:
    """Train a run on this rank; runs in a thread of a worker process of Ray's.

    Args:
        config: ``order``, the path of the job's order, and ``run``, the run folder.

    Raises:
        SavedToRegroup: all ranks saved and ended before the run was complete.
        GivenUp: as described there.
    """
    context = ray.train.get_context()
    rank, folder = context.get_world_rank(), Path(config["run"])
    _keep_import_paths()
    from sixfold.train.run_folder import RunFolder

    try:
        order = Order.read(Path(config["order"]))
        _enter(order)
        status = _work(RunFolder(folder), rank, Asked(Requests(folder), asks_ray=context.get_local_rank() == 0))
    except Exception as error:  # the one place that reports for the rank
        known = user_facing(error)
        if known is None:
            raise
        RunFolder(folder).leave_error(rank, str(known))
        if isinstance(known, EnvironmentFault):
            raise RuntimeError(str(known)) from None  # another node, or another minute, may serve
        raise GivenUp(str(known)) from None
    if rank == 0:
        leave_outcome(folder, status)
    if status != "finished":
        raise SavedToRegroup(status)


def _work(folder: Any, rank: int, asked: Callable[[], bool]) -> str:
    """Train with the run folder held by rank 0: ranks of an earlier attempt may still be on their way out."""
    from contextlib import ExitStack

    from sixfold.distributed import process_group
    from sixfold.train.run_folder import held
    from sixfold.train.worker import run

    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(held(folder))
        status = run(folder, asked)
        process_group.leave()
    return status


class Asked:
    """Whether this rank wants all to save and end: its node is being taken away, or the run's folder holds a request.

    One rank that wants it is enough, the loop agrees on it. ``ray.train.get_preemption_info`` would make all ranks meet
    at every step; here each looks for itself, twice a second at most, and one rank a node asks Ray.
    """

    def __init__(self, requests: Requests, *, asks_ray: bool) -> None:
        self._requests = requests
        self._node = ray.get_runtime_context().get_node_id() if asks_ray else None
        self._looked_s = time.monotonic()

    def __call__(self) -> bool:
        """Look."""
        if time.monotonic() - self._looked_s < _LOOK_INTERVAL_S:
            return False
        self._looked_s = time.monotonic()
        is_leaving = self._node is not None and self._node in state.get_draining_nodes()
        return is_leaving or self._requests.read() is not None


def _keep_import_paths() -> None:
    """Make the import path absolute for children of this process; it is relative to the job's copy of the code."""
    path = os.environ.get("PYTHONPATH")
    if path is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in path.split(os.pathsep))


def _enter(order: Order) -> None:
    """Stand where the job was submitted, with its secrets."""
    try:
        os.chdir(order.directory)
    except OSError as error:
        raise EnvironmentFault.of(
            f"this node has no such folder: {error.strerror}",
            where=str(order.directory),
            fix="submit from a folder that every node mounts at the same place",
        ) from error
    put_into_environment(order.profile.secrets, order.profile.secrets_folder)


# ------------------------------------------------------------------------------------------ where and how many ranks


class Variables(BackendConfig):
    """Sets the variables by which ranks find each other; the worker makes the process group from them."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The class Ray asks for."""
        return _VariablesBackend


class _VariablesBackend(Backend):
    share_cuda_visible_devices = True  # device number = LOCAL_RANK, as everywhere

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Tell every rank of a group of several its place; a lone rank gets none, libraries take any for a group."""
        size = len(worker_group)
        if size == 1:
            return
        address, port = worker_group.execute_single(0, _meeting_point)
        worker_group.execute(_set_place, address=address, port=port)


def _meeting_point() -> tuple[str, int]:
    address: str = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
    return address, port


def _set_place(address: str, port: int) -> None:
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }


@dataclass(frozen=True)
class Room:
    """How many ranks a node has room for: in all, and beside what runs on it now."""

    total: int
    free: int


def rooms(needs: Mapping[str, float]) -> dict[str, Room]:
    """Room for ranks by node, of nodes that answer and are not about to be taken away.

    Ray goes on counting a node that died for up to half a minute; a rank placed there would not start.
    """
    leaving = set(state.get_draining_nodes())
    available = available_resources_per_node()
    return {
        node["NodeID"]: Room(total=_fit(node["Resources"], needs), free=_fit(available.get(node["NodeID"], {}), needs))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving and _answers(node)
    }


def _fit(resources: Mapping[str, float], needs: Mapping[str, float]) -> int:
    return int(min(resources.get(name, 0.0) // amount for name, amount in needs.items() if amount > 0))


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


class FollowCluster(ScalingPolicy):
    """Trains on as many ranks as the cluster has room for, among the numbers that divide the lanes.

    Fewer at once when nodes are lost. More when nodes have joined: the ranks are asked to save at a step boundary and
    start again in the larger number, so that growing costs a restart and no step. Ray's own elastic policy knows no
    divisors, and kills ranks without letting them save.
    """

    def __init__(self, config: Any, *, numbers: tuple[int, ...], requests: Requests, interval_s: float) -> None:
        super().__init__(config)
        self._numbers = numbers
        self._requests = requests
        self._interval_s = interval_s
        self._needs: Mapping[str, float] = config._resources_per_worker_not_none
        self._held: Counter[str] = Counter()  # ranks of the running or last group by node
        self._waiting_since_s: float | None = None
        self._looked_s = time.monotonic()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Choose a number; for some seconds wait for what others may be about to free.

        Ray ends the last group, and frees what it holds, only to start the next.
        """
        now = time.monotonic()
        self._waiting_since_s = self._waiting_since_s or now
        found = rooms(self._needs)
        ranks = choose_ranks(self._numbers, sum(room.total for room in found.values()))
        free = sum(min(room.total, room.free + self._held[node]) for node, room in found.items())
        if free < ranks:
            if now - self._waiting_since_s < _SETTLE_S:
                return NoopDecision()
            ranks = choose_ranks(self._numbers, free)  # others work here too
        self._held.clear()
        self._waiting_since_s = None
        self._looked_s = now
        self._requests.clear("regroup")
        _say(f"starting {ranks} ranks of {', '.join(map(str, self._numbers))}")
        return ResizeDecision(num_workers=ranks, resources_per_worker=dict(self._needs))

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Ask the ranks to save when there is room for more of them; they end, and the number is chosen anew."""
        now = time.monotonic()
        self._held = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        if now - self._looked_s >= self._interval_s and self._numbers[-1] > worker_group_state.num_workers:
            self._looked_s = now
            room = worker_group_state.num_workers + sum(room.free for room in rooms(self._needs).values())
            if choose_ranks(self._numbers, room) > worker_group_state.num_workers:
                _say(f"there is room for {room} ranks: {worker_group_state.num_workers} save and start again as more")
                self._requests.make("regroup")
        return NoopDecision()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._numbers[0]

    # A cluster's autoscaler hears of a group that does not fit by its placement group. Ray's coordinator, which these
    # hooks talk to, sees nodes come and go with 20 seconds' delay.
    def after_controller_start(self, train_run_context: Any) -> None:
        """Register nothing."""

    async def before_controller_shutdown(self) -> None:
        """Nothing was registered."""

    def before_controller_abort(self) -> None:
        """Nothing was registered."""


class Budget(DefaultFailurePolicy):
    """Restarts after ranks and nodes died, up to the profile's budget; regrouping is free, giving up is final."""

    def __init__(self, config: Any, requests: Requests) -> None:
        super().__init__(config)
        self._requests = requests

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Decide by what the ranks raised."""
        errors = list(getattr(training_failed_error, "worker_failures", {}).values())
        if self._requests.read() == "stop" or any(isinstance(error, GivenUp) for error in errors):
            return FailureDecision.RAISE
        if errors and all(isinstance(error, SavedToRegroup) for error in errors):
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


class Trainer(DataParallelTrainer):
    """Ray Train's trainer with a scaling and a failure policy of our own, which it has no public argument for.

    It starts two processes less: placement groups need no cleaner, they end with the driver that they belong to, and
    the data plane is our own.
    """

    def __init__(self, *, scaling: ScalingPolicy, failures: DefaultFailurePolicy, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._scaling, self._failures = scaling, failures

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        spared = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in callbacks if not isinstance(callback, spared)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        replaced = {"scaling_policy": self._scaling, "failure_policy": self._failures}
        return super()._initialize_and_run_controller(**{**arguments, **replaced})


# -------------------------------------------------------------------------------------------- what the driver does


def train_run(order_path: Path, order: Order, run: Path) -> str:
    """Train one run on the cluster until it is complete, was stopped, or its budget of failures is spent.

    Returns:
        ``finished`` or ``interrupted``.

    Raises:
        TrainingFailedError: it failed for good; what the ranks left is in the run folder.
    """
    profile, requests = order.profile, Requests(run)
    numbers = rank_numbers(profile, _lanes(run))
    scaling = ray.train.ScalingConfig(
        num_workers=numbers[-1],
        use_gpu=profile.gpus_per_rank > 0,
        resources_per_worker={"CPU": profile.cpus_per_rank}
        | ({"GPU": profile.gpus_per_rank} if profile.gpus_per_rank else {}),
        placement_strategy=profile.placement,
    )
    failures = ray.train.FailureConfig(max_failures=profile.max_failures)
    trainer = Trainer(
        scaling=FollowCluster(scaling, numbers=numbers, requests=requests, interval_s=profile.grow_interval_s),
        failures=Budget(failures, requests),
        train_loop_per_worker=train_on_rank,
        train_loop_config={"order": str(order_path), "run": str(run)},
        backend_config=Variables(),
        scaling_config=scaling,
        # Ray wants a place for records of its own; nothing is ever read back from it.
        run_config=ray.train.RunConfig(name=run.name, storage_path=str(order.folder / "ray"), failure_config=failures),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        if requests.read() == "stop" and read_outcome(run) == "interrupted":
            return "interrupted"
        raise
    return "finished"


_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of a recipe start where the job was submitted
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line of a rank is shown twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # ranks look for themselves
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def connect() -> None:
    """Join the cluster that the job server, or RAY_ADDRESS, names."""
    os.environ |= _SETTINGS
    ray.init(log_to_driver=True, logging_level=logging.WARNING)


def _lanes(run: Path) -> int:
    from sixfold.recipe.load import load_recipe
    from sixfold.train.run_folder import RunFolder

    return load_recipe(RunFolder(run).recipe).recipe.data.lane_count


def _say(line: str) -> None:
    sys.stderr.write(f"sixfold: {line}\n")
    sys.stderr.flush()
