"""The training stream: this rank's part of each global batch, prefetched by position.

A stock ``DataLoader`` fetches item s of a map-style data set: the rank's slots of the global batch that begins after s
consumed samples. Workers therefore need no state, and resuming is asking for another first item.
"""

from __future__ import annotations

import functools
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sixfold.distributed.stop_signals import children_shielded
from sixfold.errors import DataError
from sixfold.objectives.contract import Batch
from sixfold_data.background import ReadAhead
from sixfold_data.batches import Fetched, GlobalBatches, end_with_rank
from sixfold_data.config import DataConfig
from sixfold_data.decode import with_unit_range
from sixfold_data.describe import combined_fingerprint
from sixfold_data.order import ORDER_VERSION
from sixfold_data.quarantine import Quarantine

logger = logging.getLogger(__name__)

_SMALL_BYTES = 1 << 20

DataState = dict[str, int | str]
"""What a checkpoint keeps of the stream, beside the samples consumed; equal on all ranks."""


class TrainStream:
    """Iterator of this rank's part of each global batch, from any position on.

    Args:
        config: the ``data`` section.
        seed: the recipe's seed.
        rank, world_size: this rank's share; ranks must divide lanes.
        start_samples: samples consumed so far, a multiple of the lanes.
        quarantine_path: file that lists unreadable samples and is shared by ranks and attempts; None counts those of
            this rank alone.

    Attributes:
        corrupt_count: distinct unreadable samples that the job has met, earlier attempts included.

    Raises:
        DataError: the data set is malformed or has changed, or unreadable samples exceed their budget.
        RecipeError: the ranks cannot share the lanes evenly.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        start_samples: int,
        quarantine_path: Path | None,
    ) -> None:
        config.check_world_size(world_size)
        if start_samples % config.lane_count:
            raise DataError.of(
                f"{start_samples} consumed samples are not a whole number for each of {config.lane_count} lanes",
                where="data.lanes",
                fix="resume with the lanes that the run was started with",
            )
        if config.buckets is not None and start_samples % config.global_batch:
            raise DataError.of(
                f"{start_samples} consumed samples are not whole batches of {config.global_batch}",
                where="data.global_batch",
                fix="resume with the global batch that the run was started with: each batch is of one bucket",
            )
        self._config = config
        self._seed = seed
        self._batches = GlobalBatches(config, seed=seed, rank=rank, world_size=world_size)
        sources = self._batches.sources  # opened here, so that faults of the data show before anything starts
        # Buckets share their data set's manifest.
        self._fingerprint = combined_fingerprint([source.manifest for source in sources[: len(config.paths)]])
        samples = sum(len(source.order) for source in sources)
        if self._batches.left_out and rank == 0:
            logger.warning(
                "%d of %d samples are never read: their buckets have fewer samples than the %d lanes",
                self._batches.left_out,
                samples,
                config.lane_count,
            )
        self._quarantine = Quarantine(
            config.corrupt,
            fingerprint=self._fingerprint,
            split=config.splits.train,
            samples=samples,
            log=quarantine_path,
        )
        self._waited_s = 0.0
        self._loader = _make_loader(self._batches, config, start_samples)
        with children_shielded():
            loaded: Iterator[Fetched] = iter(self._loader)
        # Without loader processes, a thread reads the next batch during the step.
        self._ahead = None if self._loader.num_workers else ReadAhead(loaded, _share_device())
        self._items: Iterator[Fetched] = self._ahead or loaded

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started_s = time.perf_counter()
        fetched = next(self._items)
        self._waited_s += time.perf_counter() - started_s
        if fetched.error is not None:
            raise fetched.error
        for damage in fetched.damages:
            self._quarantine.add(damage)
        return Batch(_unpacked(fetched.fields), torch.from_numpy(fetched.positions))

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for data since this was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    @property
    def corrupt_count(self) -> int:
        """Distinct unreadable samples that all ranks have met, in this attempt and those before it."""
        return self._quarantine.count

    def state(self) -> DataState:
        """Return what fixes the order, for the checkpoint; together with the samples consumed it is the whole state.

        What chooses among samples is there where it is set: states without it are those of all samples.
        """
        config = self._config
        chosen: DataState = {}
        if config.filter is not None and config.filter.text:
            chosen["filter"] = config.filter.text
        if config.buckets is not None:
            chosen |= {"buckets": config.buckets.text, "global_batch": config.global_batch}
        return chosen | {
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "order_version": ORDER_VERSION,
            "split": config.splits.train,
            "lanes": config.lane_count,
            "mixture": ":".join(map(str, config.mixture_parts)),
            "shuffle_block_shards": config.shuffle_block_shards,
            "shuffle_window_sequences": config.shuffle_window_sequences,
            "sequence_length": config.sequence_length or 0,
        }

    def check_state(self, saved: Mapping[str, int | str]) -> None:
        """Raise DataError unless a checkpoint's state fixes the same order as this stream's."""
        state = self.state()
        differing = [name for name in {**state, **saved} if saved.get(name) != state.get(name)]
        if differing:
            raise DataError.of(
                "the data are not those of the checkpoint: "
                + "; ".join(f"{key} was {saved.get(key, 'none')}, is {state.get(key, 'none')}" for key in differing),
                where=", ".join(self._config.paths),
                fix="resume with the same seed, data set and order, or start a new run",
            )

    def close(self) -> None:
        """Stop the loader's processes, or its thread."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead, self._items = None, iter(())
        del self._loader


def _make_loader(batches: GlobalBatches, config: DataConfig, start_samples: int) -> DataLoader[Fetched]:
    workers = default_workers() if config.workers is None else config.workers
    return DataLoader(
        batches,
        batch_size=None,
        sampler=itertools.count(start_samples, config.global_batch),
        num_workers=workers,
        collate_fn=_packed if workers else _finished,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=config.prefetch if workers else None,
        multiprocessing_context=_worker_context() if workers else None,
        worker_init_fn=end_with_rank if workers else None,
    )


def _worker_context() -> BaseContext:
    """Return a forkserver: forking a process that runs threads (gloo, trackers) may inherit a lock nobody releases."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([GlobalBatches.__module__])  # torch is imported once, not by each worker
    return context


def _share_device() -> Callable[[], None]:
    """Return what makes another thread pin memory for this thread's accelerator, where there is one.

    A new thread begins on the first device, and would make a context there that holds memory of another rank's.
    """
    if not torch.cuda.is_available():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def default_workers() -> int:
    """Return 4 where a rank has 8 cores or more, else 0: on few cores, decoding in the training process is cheaper."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 4 if cores >= 8 else 0


def _finished(item: Any) -> Fetched:
    """Make pixels numbers, in the thread that reads ahead."""
    fetched: Fetched = item
    return fetched._replace(fields=with_unit_range(fetched.fields))


def _packed(item: Any) -> Fetched:
    """Make a batch ready to leave a loader process: small fields as arrays, which travel inside the message.

    Every tensor is a file of its own, and a handshake. Small pixels become numbers only where they arrive.
    """
    fetched: Fetched = item
    image = fetched.fields.get("image")
    fields = fetched.fields if image is None or _is_small(image) else with_unit_range(fetched.fields)
    return fetched._replace(
        fields={name: np.asarray(field) if _is_small(field) else field for name, field in fields.items()}
    )


def _is_small(field: Tensor) -> bool:
    return field.nbytes <= _SMALL_BYTES and field.dtype != torch.bfloat16  # which arrays lack


def _unpacked(fields: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    tensors = {
        name: torch.from_numpy(field) if isinstance(field, np.ndarray) else field for name, field in fields.items()
    }
    return with_unit_range(tensors)
