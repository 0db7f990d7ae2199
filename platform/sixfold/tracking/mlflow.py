"""A run's counterpart in MLflow (3.4 or later): metrics, parameters, tags, sample grids, texts, where the model lies.

What must not happen twice is decided by asking the store itself: points at or below a metric's highest recorded step
are left out, images that are there already too. So neither a crash between sending and moving the cursor nor work done
again after a resume duplicates anything. Nothing but this module imports mlflow, and only where it is used: the import
takes seconds.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sixfold.errors import EnvironmentFault
from sixfold.tracking.description import Sample, describe
from sixfold.tracking.events import Event, read_events
from sixfold.tracking.names import image_key, metric_name, parameter_value, redact, tag_value
from sixfold.tracking.points import HighWater, Point, milliseconds
from sixfold.tracking.settings import Cursor, MirrorSettings, sqlite_path
from sixfold.tracking.spool import logger

T = TypeVar("T")

METRICS_A_BATCH = 1000
PARAMETERS_A_BATCH = 100
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
MIRROR_TAG = "sixfold.mirror"
NOTE_TAG = "mlflow.note.content"

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
    # The spool does the waiting: a call must come back soon, so that the end of a run stays bounded.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_STORED_IMAGE = re.compile(r"(?P<stem>images/(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+.*)\+compressed\.webp")
_MODEL_NAME_FORBIDDEN = re.compile(r"[/:.%\"']+")


def open_client(uri: str) -> Any:
    """Return a client of a store, whose tables are made or brought up to date first.

    MLflow does that without keeping others out: two runs that open a new sqlite file together, each half through its
    migrations, break each other's and may leave the file unusable. Hence a lock beside it.
    """
    quieten()
    from mlflow import MlflowClient

    database = sqlite_path(uri)
    if database is None:
        return MlflowClient(tracking_uri=uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def quieten() -> None:
    """Tell MLflow, before it is imported, not to report its use, draw progress bars or wait for minutes."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run in a store."""

    experiment: str
    experiment_id: str
    run_id: str
    name: str
    status: str

    def link(self, server: str) -> str:
        """Return the address of its charts on a server; MLflow's front page opens in another mode."""
        return f"{server.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}/model-metrics"


def newest_runs(uri: str, limit: int) -> list[TrackedRun]:
    """Return a store's newest runs, newest first.

    Raises:
        EnvironmentFault: MLflow is not installed, or the store cannot be used.
    """
    try:
        client = open_client(uri)
        experiments = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
        runs = client.search_runs(list(experiments), max_results=limit, order_by=["attributes.start_time DESC"])
    except ImportError as error:
        raise EnvironmentFault.of("MLflow is not installed", fix="pip install 'sixfold[mlflow]'") from error
    except Exception as error:  # MLflow lets errors of its database and HTTP libraries through
        raise EnvironmentFault.of(f"the MLflow store cannot be used: {error}", where=redact(uri)) from error
    return [
        TrackedRun(
            experiment=experiments[run.info.experiment_id],
            experiment_id=run.info.experiment_id,
            run_id=run.info.run_id,
            name=run.info.run_name,
            status=run.info.status,
        )
        for run in runs
    ]


class MLflowMirror:
    """One run's counterpart in an MLflow store; see :class:`~sixfold.tracking.spool.Mirror`."""

    def __init__(self, run_dir: Path, settings: MirrorSettings) -> None:
        self.run_dir = run_dir
        self.cursor = Cursor.read(run_dir, settings.mirror)
        self._settings = settings
        self._client: Any = None
        self._refused: set[str] = set()
        self._high_water = HighWater({})
        self._images: dict[tuple[str, int], str] = {}
        self._samples: dict[str, Sample] = {}
        self._model_id: str | None = None

    @property
    def name(self) -> str:
        """The store, without credentials."""
        return f"MLflow at {redact(self._settings.uri)}"

    @property
    def where(self) -> str:
        """A link to the run on a server, or the command that shows it."""
        uri = redact(self._settings.uri)
        experiment_id, run_id = self.cursor.experiment_id, self.cursor.run_id
        if not uri.startswith("http"):
            return f"sixfold ui --uri {uri} (experiment {self._settings.experiment}, run {self._settings.run_name})"
        if experiment_id is None or run_id is None:
            return uri
        experiment, name = self._settings.experiment, self._settings.run_name
        run = TrackedRun(experiment=experiment, experiment_id=experiment_id, run_id=run_id, name=name, status="")
        return run.link(uri)

    def connect(self) -> int:
        """Find or make the run, bring its parameters and tags up to date, and learn what it holds already."""
        self._client = open_client(self._settings.uri)
        experiment_id = self._find_experiment()
        run = self._find_run(experiment_id)
        if run is None:  # new, or deleted over there: it gets the whole log
            run = self._create_run(experiment_id)
            self.cursor = Cursor(mirror=self._settings.mirror)
        self.cursor = replace(self.cursor, experiment_id=experiment_id, run_id=run.info.run_id)
        self.commit(self.cursor.sequence)
        self._high_water = HighWater({metric.key: metric.step for metric in run.data.to_proto().metrics})
        self._images = self._stored_images()
        self._model_id = self._stored_model(experiment_id)
        self._send_parameters(run.data.params)
        self._send_tags(self._settings.tags)
        self._send_recipe(run.data.tags)
        return self.cursor.sequence

    def send(self, events: list[Event]) -> None:
        """Send events in order; what the store refuses for good is told once and left out, anything else raises."""
        measured: list[Event] = []
        for event in events:
            if "metrics" in event:
                measured.append(event)
                continue
            self._send_metrics(measured)
            measured = []
            self._send_other(event)
        self._send_metrics(measured)

    def commit(self, sequence: int) -> None:
        """Keep the cursor."""
        self.cursor = replace(self.cursor, sequence=sequence)
        self.cursor.write(self.run_dir)

    # --- finding the run -------------------------------------------------------------------------------------------

    def _find_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._settings.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            kind = {"mlflow.experimentKind": "custom_model_development"}
            with suppress(MlflowException):  # another run may make it at the same moment; the next line finds that one
                self._client.create_experiment(name, artifact_location=self._artifact_location(), tags=kind)
            experiment = self._client.get_experiment_by_name(name)
            if experiment is None:
                raise ConnectionError(f"experiment {name} could not be made")
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _artifact_location(self) -> str | None:
        """Keep artifacts beside the database: MLflow's default is ``mlruns`` in whatever folder the process runs in."""
        database = sqlite_path(self._settings.uri)
        if database is None:
            return None
        return str(database.with_name(f"{database.name}.artifacts") / metric_name(self._settings.experiment))

    def _find_run(self, experiment_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        if self.cursor.run_id is None:
            found = self._client.search_runs([experiment_id], f"tags.`{MIRROR_TAG}` = '{self._settings.mirror}'")
            return found[0] if found else None
        try:
            run = self._client.get_run(self.cursor.run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _create_run(self, experiment_id: str) -> Any:
        tags = {
            MIRROR_TAG: self._settings.mirror,
            "sixfold.run_id": self._settings.run_id,
            "sixfold.recipe": self._settings.recipe_name,
            "sixfold.run_folder": str(self.run_dir.absolute()),
            "mlflow.source.name": self._settings.recipe_name,
            "mlflow.source.type": "LOCAL",
        }
        with suppress(KeyError, OSError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        first = next(read_events(self.run_dir), None)  # the run may be seen over there long after it began
        started = None if first is None else milliseconds(first)
        return self._client.create_run(experiment_id, started, tags, self._settings.run_name)

    def _stored_images(self) -> dict[tuple[str, int], str]:
        """Return the artifact path of every image that is there in full, by key and step."""
        paths = (file.path for file in self._client.list_artifacts(self.cursor.run_id, "images"))
        matches = (match for path in paths if (match := _STORED_IMAGE.fullmatch(path)))
        return {(match["key"].replace("~", "/"), int(match["step"])): f"{match['stem']}.png" for match in matches}

    def _stored_model(self, experiment_id: str) -> str | None:
        models = self._client.search_logged_models([experiment_id], f"source_run_id = '{self.cursor.run_id}'")
        return str(models[0].model_id) if models else None

    # --- sending ---------------------------------------------------------------------------------------------------

    def _send_parameters(self, known: Mapping[str, str]) -> None:
        """Log what is new. A parameter cannot change over there: a resumed run's other values become tags."""
        from mlflow.entities import Param

        current = {metric_name(key): parameter_value(value) for key, value in self._settings.parameters.items()}
        new = [Param(key, value) for key, value in current.items() if key not in known]
        for batch in _batches(new, PARAMETERS_A_BATCH):
            self._client.log_batch(self.cursor.run_id, params=batch)
        self._send_tags({f"resumed.{key}": value for key, value in current.items() if known.get(key, value) != value})

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(metric_name(key), tag_value(redact(value))) for key, value in tags.items()]
        for batch in _batches(entries, PARAMETERS_A_BATCH):
            self._client.log_batch(self.cursor.run_id, tags=batch)

    def _send_recipe(self, known_tags: Mapping[str, str]) -> None:
        """Store the recipe; one that a resume changed gets a name of its own, so that the first one stays."""
        if self._settings.recipe is None or not Path(self._settings.recipe).is_file():
            return
        recipe = redact(Path(self._settings.recipe).read_text())
        digest = hashlib.sha256(recipe.encode()).hexdigest()
        first = known_tags.get("sixfold.recipe_sha256")
        if first == digest:
            return
        self._client.log_text(
            self.cursor.run_id, recipe, "recipe.yaml" if first is None else f"recipe-{digest[:8]}.yaml"
        )
        if first is None:
            self._send_tags({"sixfold.recipe_sha256": digest})

    def _send_metrics(self, events: Sequence[Event]) -> None:
        from mlflow.exceptions import MlflowException

        for batch in _batches(self._high_water.above(events), METRICS_A_BATCH):
            try:
                self._log_points(batch)
            except MlflowException as error:
                if not _is_refusal(error) or not self._is_alive():
                    raise
                self._send_one_by_one(batch)
            self._high_water.raise_to(batch)

    def _send_one_by_one(self, points: Sequence[Point]) -> None:
        from mlflow.exceptions import MlflowException

        for point in points:
            try:
                self._log_points([point])
            except MlflowException as error:
                if not _is_refusal(error):
                    raise
                self._tell_refused(point.name, error)

    def _log_points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self.cursor.run_id, metrics=[Metric(*point) for point in points])

    def _send_other(self, event: Event) -> None:
        match event["event"]:
            case "image":
                self._send_image(event)
            case "text":
                self._send_text(event)
            case "checkpoint":
                self._send_model(event)
            case "started":
                self._send_tags({"sixfold.attempt": "1"})
            case "resumed":
                self._client.update_run(self.cursor.run_id, status="RUNNING")
                self._send_tags({"sixfold.attempt": str(event["attempt"]), "sixfold.resumed_step": str(event["step"])})
            case "rolled_back":
                self._send_tags({"sixfold.rolled_back": f"from step {event['from_step']} to {event['step']}"})
            case "finished":
                status = STATUSES[event["status"]]
                self._client.set_terminated(self.cursor.run_id, status, end_time=milliseconds(event))

    def _send_image(self, event: Event) -> None:
        import PIL.Image

        key, step = image_key(event["key"]), int(event["step"])
        if (key, step) not in self._images:
            try:
                image = PIL.Image.open(self.run_dir / event["path"]).convert("RGB")
            except OSError as error:  # gone from the run folder, or not an image
                self._tell_refused(event["path"], error)
                return
            timestamp = milliseconds(event)
            self._client.log_image(self.cursor.run_id, image, key=key, step=step, timestamp=timestamp, synchronous=True)
            self._images = self._stored_images()
        self._describe(key, Sample(step=step, image=self._images[key, step]))

    def _send_text(self, event: Event) -> None:
        try:
            text = (self.run_dir / event["path"]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            self._tell_refused(event["path"], error)
            return
        key, step = image_key(event["key"]), int(event["step"])
        self._client.log_text(self.cursor.run_id, text, f"texts/{key}/step_{step:09d}.txt")
        self._describe(key, Sample(step=step, text=text))

    def _describe(self, key: str, sample: Sample) -> None:
        """Show the newest samples in the run's description."""
        self._samples[key] = sample
        note = self._client.get_run(self.cursor.run_id).data.tags.get(NOTE_TAG, "")
        self._client.set_tag(self.cursor.run_id, NOTE_TAG, describe(note, self._samples, str(self.cursor.run_id)))

    def _send_model(self, event: Event) -> None:
        """Keep one logged model a run, whose tags say where its newest checkpoint lies; no bytes are copied."""
        from mlflow.entities import LoggedModelOutput

        tags = {"checkpoint.uri": redact(event["uri"]), "checkpoint.step": str(event["step"])}
        if self._model_id is None:
            model = self._client.create_logged_model(
                self.cursor.experiment_id,
                name=_MODEL_NAME_FORBIDDEN.sub("-", self._settings.recipe_name),
                source_run_id=self.cursor.run_id,
                model_type="checkpoint",
            )
            self._client.log_outputs(self.cursor.run_id, [LoggedModelOutput(model.model_id, int(event["step"]))])
            self._client.finalize_logged_model(model.model_id, "READY")
            self._model_id = model.model_id
        self._client.set_logged_model_tags(self._model_id, tags)
        self._send_tags(tags)

    # --- refusals --------------------------------------------------------------------------------------------------

    def _is_alive(self) -> bool:
        """Whether the run can still be written: a refusal may mean that it was deleted over there."""
        return self._find_run(str(self.cursor.experiment_id)) is not None

    def _tell_refused(self, what: str, error: Exception) -> None:
        if what not in self._refused:
            self._refused.add(what)
            logger.warning("%s does not take %s: %s", self.name, what, str(error).splitlines()[0])


def _is_refusal(error: Any) -> bool:
    return error.error_code in {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}


def _batches(entries: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]
