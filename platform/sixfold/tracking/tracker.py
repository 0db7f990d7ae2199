"""Opens the tracker that a recipe asks for, and replays what a run could not send."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sixfold.errors import EnvironmentFault, UserError
from sixfold.tracking.config import JsonlConfig, MLflowConfig
from sixfold.tracking.contract import Tracker
from sixfold.tracking.events import EventLog
from sixfold.tracking.mlflow import MLflowMirror, quieten
from sixfold.tracking.names import flatten
from sixfold.tracking.settings import MirrorSettings, absolute_uri
from sixfold.tracking.spool import RETRY_WHEN_CLOSING_S, Spool, SpoolThread, logger


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What a tracker shows of a run besides its events.

    Attributes:
        run_id: name of the run folder.
        recipe_name: e.g. ``flow/dit-smoke``.
        params: the resolved recipe as nested plain data.
        tags: e.g. ``collect_environment().as_tags()``.
        recipe_path: file with the resolved recipe, or None.
    """

    run_id: str
    recipe_name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    recipe_path: Path | None


def open_tracker(
    config: MLflowConfig | JsonlConfig,
    log: EventLog,
    *,
    run_id: str,
    recipe_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    recipe_path: Path | None,
) -> Tracker:
    """Start following ``log`` as the recipe's ``tracking`` says, on rank 0 only; return at once and never raise later.

    Args:
        config: the recipe's tracking section.
        log: the run's event log, open.
        run_id: name of the run folder.
        recipe_name: e.g. ``flow/dit-smoke``.
        params: the resolved recipe as nested plain data.
        tags: e.g. ``collect_environment().as_tags()``.
        recipe_path: file with the resolved recipe, or None.
    """
    run = RunDescription(run_id=run_id, recipe_name=recipe_name, params=params, tags=tags, recipe_path=recipe_path)
    tracker: Tracker = config.load()(config, log, run)
    return tracker


class NoTracker:
    """The tracker of ``type: jsonl``: the event log is all there is."""

    def __init__(self, config: JsonlConfig, log: EventLog, run: RunDescription) -> None:
        self._path = log.path

    @property
    def where(self) -> str:
        """The event log."""
        return str(self._path)

    def close(self) -> None:
        """Nothing to send."""


class MLflowTracker:
    """The tracker of ``type: mlflow``: follows the event log from a thread of its own."""

    def __init__(self, config: MLflowConfig, log: EventLog, run: RunDescription) -> None:
        quieten()
        settings = _settings(config, log.run_dir, run)
        settings.write(log.run_dir)
        self._close_timeout_s = config.close_timeout_s
        self._mirror = MLflowMirror(log.run_dir, settings)
        self._thread = SpoolThread(Spool(log.run_dir, self._mirror), self._mirror)
        self._thread.start()

    @property
    def where(self) -> str:
        """A link to the run on a server, or the command that shows it."""
        return self._mirror.where

    @property
    def failures(self) -> int:
        """How often sending failed, and was put off, in this attempt."""
        return self._thread.failures

    def close(self) -> None:
        """Send the rest within ``close_timeout_s``; say so if something had to stay behind."""
        if not self._thread.stop(self._close_timeout_s):
            logger.warning(
                "%s has not received everything. Nothing is lost: resuming the run sends the rest, and so does "
                "`sixfold tracking replay %s`",
                self._mirror.name,
                self._mirror.run_dir,
            )


def replay(run_dir: Path, *, timeout_s: float = 60.0) -> int:
    """Send what a run's mirror has not received yet, and return how many events that were.

    Raises:
        UserError: the run was never mirrored.
        EnvironmentFault: the store cannot be used, or a living attempt is sending already.
    """
    settings = MirrorSettings.read(run_dir)
    if settings is None:
        raise UserError.of(
            "this run was not tracked by MLflow, so there is nothing to send",
            where=str(run_dir),
            fix="resume it with tracking.type=mlflow: the whole event log is sent then",
        )
    mirror = MLflowMirror(run_dir, settings)
    spool = Spool(run_dir, mirror)
    deadline_s, total = time.monotonic() + timeout_s, 0
    try:
        while True:
            try:
                sent = spool.pump()
            except Exception as error:  # whatever the store's library raises: try again until the time is up
                spool.disconnect()
                if time.monotonic() >= deadline_s or isinstance(error, ImportError):
                    raise _unusable(mirror.name, run_dir, error) from error
                time.sleep(RETRY_WHEN_CLOSING_S)
                continue
            total += sent
            if sent == 0:
                return total
    finally:
        spool.close()


def _settings(config: MLflowConfig, run_dir: Path, run: RunDescription) -> MirrorSettings:
    uri, experiment = absolute_uri(config.uri), config.experiment or run.recipe_name
    kept = MirrorSettings.read(run_dir)
    moved = kept is None or (kept.uri, kept.experiment) != (uri, experiment)
    return MirrorSettings(
        uri=uri,
        experiment=experiment,
        run_id=run.run_id,
        run_name=config.run_name or run.run_id,
        recipe_name=run.recipe_name,
        recipe=None if run.recipe_path is None else str(run.recipe_path.absolute()),
        parameters=flatten(run.params),
        tags={**run.tags, **config.tags},
        mirror=uuid.uuid4().hex if kept is None or moved else kept.mirror,
    )


def _unusable(name: str, run_dir: Path, error: Exception) -> EnvironmentFault:
    if isinstance(error, BlockingIOError):
        what, fix = "another process is sending this run's events", "wait for it, or stop the run"
    elif isinstance(error, ImportError):
        what, fix = f"a package is missing: {error}", "pip install 'sixfold[mlflow]'"
    else:
        what, fix = f"{name} cannot be used: {error}", "start the server, or check tracking.uri"
    fault = EnvironmentFault.of(what, where=str(run_dir), fix=fix)
    assert isinstance(fault, EnvironmentFault)
    return fault
