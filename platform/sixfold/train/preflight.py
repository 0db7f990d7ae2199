"""A look at every node before the first step: what would cost a night if it were noticed after an hour.

All ranks report at once, and judge the same reports by the same rules, so that all go on or all stop. The price is a
few small messages: well under half a second on one machine.
"""

from __future__ import annotations

import platform
import secrets
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sixfold.distributed.collectives import barrier, broadcast_object, gather_objects
from sixfold.distributed.process_group import World
from sixfold.errors import EnvironmentFault, Fault
from sixfold.train.run_folder import RunFolder

LEAST_DISK_BYTES = 256 << 20
LARGEST_SKEW_S = 60.0
"""Clocks that differ more break certificates, caches and everyone's reading of logs."""
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank found.

    Attributes:
        host: the node's name.
        device: what computes.
        device_id: of this rank's device on the node; None for a CPU, which ranks share.
        versions: of Python, torch and what else must be the same everywhere.
        sees_token: whether a file that rank 0 wrote to the run folder is there.
        disk_free_bytes: at the run folder.
        clock_s: seconds since 1970, read by all ranks as they leave a barrier.
        allreduce_bytes_per_s: of a message, as every rank sees it.
    """

    host: str
    device: str
    device_id: int | None
    versions: tuple[tuple[str, str], ...]
    sees_token: bool
    disk_free_bytes: int
    clock_s: float
    allreduce_bytes_per_s: float


def preflight(world: World, folder: RunFolder) -> list[str]:
    """Examine all nodes together; a collective. Returns a table to show, empty for a rank that is alone.

    Raises:
        EnvironmentFault: something is wrong with a node, on all ranks, with every fault.
    """
    reports = gather_objects(_report(world, folder))
    faults = [*_faults(reports, folder)]
    if faults:
        raise EnvironmentFault(*faults)
    return _table(reports) if world.size > 1 else []


def _report(world: World, folder: RunFolder) -> RankReport:
    sees_token = _share_token(world, folder)
    bandwidth = _allreduce_bandwidth(world)
    barrier()
    clock = time.time()
    on_cuda = world.device.type == "cuda"
    return RankReport(
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(world.device) if on_cuda else f"CPU, {torch.get_num_threads()} threads",
        device_id=world.device.index if on_cuda else None,
        versions=(
            ("python", platform.python_version()),
            ("torch", torch.__version__),
            ("cuda", str(torch.version.cuda)),
        ),
        sees_token=sees_token,
        disk_free_bytes=shutil.disk_usage(folder.path).free if folder.path.exists() else 0,
        clock_s=clock,
        allreduce_bytes_per_s=bandwidth,
    )


def _share_token(world: World, folder: RunFolder) -> bool:
    """Rank 0 writes a file, and all look for it: is the run folder the same folder everywhere?"""
    token = broadcast_object(secrets.token_hex(8) if world.rank == 0 else None)
    path = folder.path / f".preflight-{token}"
    if world.rank == 0:
        path.write_text(token)
    barrier()
    seen = path.exists()
    barrier()
    if world.rank == 0:
        path.unlink()
    return seen


def _allreduce_bandwidth(world: World) -> float:
    """Bytes a second of a message summed over all ranks, the best of a few; 0 for a rank that is alone."""
    if world.size == 1:
        return 0.0
    message = torch.zeros((64 << 20 if world.device.type == "cuda" else 1 << 20) // 4, device=world.device)
    best = float("inf")
    for _ in range(_ROUNDS):
        _wait_for(world)
        started = time.perf_counter()
        dist.all_reduce(message)
        _wait_for(world)
        best = min(best, time.perf_counter() - started)
    return message.numel() * message.element_size() / best


def _wait_for(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _faults(reports: Sequence[RankReport], folder: RunFolder) -> Iterator[Fault]:
    blind = [rank for rank, report in enumerate(reports) if not report.sees_token]
    if blind:
        yield Fault(
            what=f"{_ranks(blind, reports)} cannot see what rank 0 writes to the run folder",
            where=str(folder.path),
            fix="put the run folder on storage that all nodes mount at the same place (--run-dir)",
        )
    full = [rank for rank, report in enumerate(reports) if report.disk_free_bytes < LEAST_DISK_BYTES]
    if full and not blind:
        yield Fault(
            what=f"{_ranks(full, reports)} has {reports[full[0]].disk_free_bytes >> 20} MiB free at the run folder",
            where=str(folder.path),
            allowed=f"{LEAST_DISK_BYTES >> 20} MiB and more",
            fix="free some space, or name another folder with --run-dir",
        )
    for name, expected in reports[0].versions:
        others = [rank for rank, report in enumerate(reports) if dict(report.versions)[name] != expected]
        if others:
            found = dict(reports[others[0]].versions)[name]
            yield Fault(
                what=f"{name} is {expected} on rank 0 and {found} on {_ranks(others, reports)}",
                fix="install the same environment on all nodes",
            )
    clocks = [report.clock_s for report in reports]
    if max(clocks) - min(clocks) > LARGEST_SKEW_S:
        behind, ahead = clocks.index(min(clocks)), clocks.index(max(clocks))
        yield Fault(
            what=f"the clocks of {reports[behind].host} and {reports[ahead].host} are "
            f"{max(clocks) - min(clocks):.0f} s apart",
            allowed=f"{LARGEST_SKEW_S:.0f} s",
            fix="synchronise the nodes' clocks (chrony, ntpd)",
        )
    yield from _shared_devices(reports)


def _shared_devices(reports: Sequence[RankReport]) -> Iterator[Fault]:
    users: dict[tuple[str, int], list[int]] = defaultdict(list)
    for rank, report in enumerate(reports):
        if report.device_id is not None:
            users[report.host, report.device_id].append(rank)
    for (host, device), ranks in users.items():
        if len(ranks) > 1:
            yield Fault(
                what=f"ranks {', '.join(map(str, ranks))} all use device {device} of {host}",
                fix="start as many ranks a node as it has devices, each with its own LOCAL_RANK",
            )


def _ranks(ranks: Sequence[int], reports: Sequence[RankReport]) -> str:
    """Name ranks with their nodes, the first few of many."""
    named = ", ".join(f"rank {rank} on {reports[rank].host}" for rank in ranks[:4])
    return named if len(ranks) <= 4 else f"{named} and {len(ranks) - 4} more"


def _table(reports: Sequence[RankReport]) -> list[str]:
    """One line a node, then what all of them have in common."""
    nodes: dict[str, list[RankReport]] = defaultdict(list)
    for report in reports:
        nodes[report.host].append(report)
    first = min(report.clock_s for report in reports)
    lines = [
        f"preflight  {host}: {len(ranks)} ranks, {ranks[0].device}, "
        f"{ranks[0].disk_free_bytes / (1 << 30):.0f} GiB free, clock +{ranks[0].clock_s - first:.3f} s"
        for host, ranks in nodes.items()
    ]
    slowest = min(report.allreduce_bytes_per_s for report in reports)
    versions = ", ".join(f"{name} {version}" for name, version in reports[0].versions if version != "None")
    lines.append(f"preflight  all-reduce over {len(reports)} ranks {slowest / 1e9:.2f} GB/s; {versions}")
    return lines
