"""Samples how busy this machine is: CPU, memory, disk, network, and GPUs where there are any."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # it ships no types

from sixfold.tracking.config import JsonlConfig, MLflowConfig
from sixfold.tracking.events import EventLog

MEBIBYTE = 1 << 20
_POLL_S = 0.5

logger = logging.getLogger("sixfold.tracking")


class SystemMetrics:
    """Measures the host between two calls of :meth:`sample`; rates are means over that interval.

    Disk and network count the whole host; ``process_memory_mib`` is this process's resident memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self._time_s, self._bytes = time.monotonic(), _byte_counters()
        psutil.cpu_percent()  # the first call only opens the interval
        self._nvml = _load_nvml()

    def sample(self) -> dict[str, float]:
        """Return ``system/*`` metrics."""
        now_s, counters = time.monotonic(), _byte_counters()
        elapsed_s = max(now_s - self._time_s, 1e-6)
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._folder))
        values = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_percent": memory.percent,
            "system/memory_used_mib": (memory.total - memory.available) / MEBIBYTE,
            "system/process_memory_mib": self._process.memory_info().rss / MEBIBYTE,
            "system/disk_used_percent": disk.percent,
            "system/disk_free_mib": disk.free / MEBIBYTE,
        }
        for name in counters.keys() & self._bytes.keys():
            values[f"system/{name}_mib_per_s"] = (counters[name] - self._bytes[name]) / MEBIBYTE / elapsed_s
        self._time_s, self._bytes = now_s, counters
        return values | _gpu_memory() | self._gpu_use()

    def _gpu_use(self) -> dict[str, float]:
        if self._nvml is None:
            return {}
        values = {}
        for index in range(self._nvml.nvmlDeviceGetCount()):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            values[f"system/gpu_{index}_percent"] = float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            values[f"system/gpu_{index}_power_w"] = self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        return values


@contextmanager
def sampling(config: MLflowConfig | JsonlConfig, log: EventLog) -> Iterator[None]:
    """Sample into the log from a thread of its own, as the recipe's ``tracking`` says; whatever mirrors the log."""
    if not config.system_metrics:
        yield
        return
    sampler, ended = SystemSampler(log, interval_s=config.system_metrics_interval_s), threading.Event()

    def run() -> None:
        try:
            while not ended.wait(_POLL_S):
                sampler()
            sampler()  # a run that was shorter than that
        except Exception as error:  # a broken sensor costs its own values, not training and not the other metrics
            logger.warning("system metrics are off: %s", error)

    thread = threading.Thread(target=run, name="sixfold-system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class SystemSampler:
    """Writes system metrics into the event log at an interval, at most once a step."""

    def __init__(self, log: EventLog, *, interval_s: float) -> None:
        self._log = log
        self._interval_s = interval_s
        self._metrics = SystemMetrics(log.run_dir)
        self._next_s = time.monotonic()
        self._step = 0

    def __call__(self) -> None:
        """Sample if it is time to and training has moved on."""
        step, samples = self._log.progress
        if step == self._step or time.monotonic() < self._next_s:
            return
        self._step, self._next_s = step, time.monotonic() + self._interval_s
        self._log.metrics(step=step, samples=samples, values=self._metrics.sample())


def _load_nvml() -> Any:
    """Return NVIDIA's management library, or None where its Python binding or a driver is missing."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _gpu_memory() -> dict[str, float]:
    """Memory torch holds on this process's GPU; torch is asked only when training has loaded it already."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {
        "system/gpu_allocated_mib": torch.cuda.memory_allocated() / MEBIBYTE,
        "system/gpu_peak_allocated_mib": torch.cuda.max_memory_allocated() / MEBIBYTE,
        "system/gpu_reserved_mib": torch.cuda.memory_reserved() / MEBIBYTE,
    }


def _byte_counters() -> dict[str, float]:
    """Bytes since boot; a container may hide the disks."""
    counters: dict[str, float] = {}
    if (disk := psutil.disk_io_counters()) is not None:
        counters |= {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
    if (network := psutil.net_io_counters()) is not None:
        counters |= {"network_sent": network.bytes_sent, "network_received": network.bytes_recv}
    return counters
