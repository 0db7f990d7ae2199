"""A run that only logs, and what an MLflow store holds of it afterwards."""

import math

import PIL.Image
import PIL.ImageDraw

from sixfold.tracking.config import MLflowConfig
from sixfold.tracking.events import EventLog
from sixfold.tracking.settings import Cursor, MirrorSettings
from sixfold.tracking.tracker import open_tracker

RECIPE = "flow/dit-test"
PARAMETERS = {"long": "x" * 7000} | {f"p{i}": i for i in range(150)}


def train(run_dir, uri, *, resumed_step=0, steps=20, close_timeout_s=60.0, lr=1e-3, params=PARAMETERS, **settings):
    """A run that only logs."""
    log = EventLog(run_dir)
    log.begin(step=resumed_step)
    (run_dir / "recipe.yaml").write_text(f"name: {RECIPE}\noptimizer: {{lr: {lr}}}\n")
    tracker = open_tracker(
        MLflowConfig(uri=uri, close_timeout_s=close_timeout_s, system_metrics_interval_s=0.5, **settings),
        log,
        run_id=run_dir.name,
        recipe_name=RECIPE,
        params={"optimizer": {"lr": lr}, **params},
        tags={"git.commit": "abc"},
        recipe_path=run_dir / "recipe.yaml",
    )
    for step in range(resumed_step + 1, steps + 1):
        values = {"train/loss": 1 / step, "train/inf": math.inf, "bad%name": float(step), "val/nan": math.nan}
        log.metrics(step=step, samples=8 * step, values=values)
        if step % 10 == 0:
            draw_samples(step).save(run_dir / f"sample-{step}.png")
            (run_dir / f"sample-{step}.txt").write_text(f"text {step}")
            log.image(key="samples/grid", step=step, path=run_dir / f"sample-{step}.png")
            log.text(key="samples/text", step=step, path=run_dir / f"sample-{step}.txt")
            log.checkpoint(step=step, uri=f"file:///checkpoints/{step}")
    log.finished(step=steps, status="finished")
    tracker.close()
    log.close()
    return tracker


def draw_samples(step, cells=4, cell_px=40):
    """A grid of discs that shrink from cell to cell, with the step written on it."""
    image = PIL.Image.new("L", (cells * cell_px, cells * cell_px))
    draw = PIL.ImageDraw.Draw(image)
    for index in range(cells**2):
        corner = (index % cells * cell_px, index // cells * cell_px)
        draw.circle((corner[0] + cell_px / 2, corner[1] + cell_px / 2), cell_px / (2.2 + 0.3 * index), fill=200)
    draw.text((4, 4), f"step {step}", fill=255)
    return image


class Stored:
    """What a store holds of a run."""

    def __init__(self, run_dir, uri):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        settings = MirrorSettings.read(run_dir)
        self.run_id = Cursor.read(run_dir, settings.mirror).run_id
        self.run = self.client.get_run(self.run_id)

    def steps(self, metric):
        return [point.step for point in self.client.get_metric_history(self.run_id, metric)]

    def values(self, metric):
        return {point.step: point.value for point in self.client.get_metric_history(self.run_id, metric)}

    def images(self):
        paths = [file.path for file in self.client.list_artifacts(self.run_id, "images")]
        return sorted(path.split("+timestamp")[0] for path in paths if path.endswith(".png"))

    def artifacts(self, folder=None):
        return sorted(file.path for file in self.client.list_artifacts(self.run_id, folder))


def assert_complete(stored, steps=20):
    assert stored.steps("train/loss") == list(range(1, steps + 1))
    assert stored.values("train/loss") == {step: 1 / step for step in range(1, steps + 1)}
    assert stored.steps("bad_name") == list(range(1, steps + 1))
    assert all(math.isnan(value) for value in stored.values("val/nan").values())
    assert all(math.isnan(value) for value in stored.values("train/inf").values())
    assert stored.images() == [f"images/samples~grid+step+{step}" for step in range(10, steps + 1, 10)]
    assert stored.artifacts("texts/samples/text") == [
        f"texts/samples/text/step_{step:09d}.txt" for step in range(10, steps + 1, 10)
    ]
    assert stored.run.info.status == "FINISHED"
    assert stored.run.data.params["optimizer.lr"] == "0.001"
    assert len(stored.run.data.params) == 152
    assert "cut from 7000 characters" in stored.run.data.params["long"]
    assert stored.run.data.tags["git.commit"] == "abc"
    assert stored.run.data.tags["checkpoint.uri"] == f"file:///checkpoints/{steps}"
    assert f"**samples/grid** at step {steps}" in stored.run.data.tags["mlflow.note.content"]
    assert "recipe.yaml" in stored.artifacts()
    (model,) = stored.client.search_logged_models([stored.run.info.experiment_id], f"source_run_id = '{stored.run_id}'")
    assert model.tags["checkpoint.uri"] == f"file:///checkpoints/{steps}"
    assert str(model.status) == "READY"
    experiment = stored.client.get_experiment(stored.run.info.experiment_id)
    assert (experiment.name, experiment.tags["mlflow.experimentKind"]) == (RECIPE, "custom_model_development")
