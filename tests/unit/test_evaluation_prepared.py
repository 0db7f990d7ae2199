"""What evaluation will need is looked at before the first step: a run must not train for a measure it cannot have."""

import json

import pytest
import torch

from commands import sixfold
from latent_cases import train_run
from sixfold.distributed.process_group import World
from sixfold.errors import DataError, RecipeError
from sixfold.evaluation.manifolds import balls_around
from sixfold.recipe.load import load_recipe
from sixfold.train.evaluator import Evaluator
from sixfold.train.inference import load_trained

SMALL = ("data.global_batch=8", "networks.denoiser.depth=1", "networks.denoiser.width=16", "tracking={type: jsonl}")


def recipe_with(demo_data, *overrides):
    return load_recipe("flow/dit-smoke", [f"data.path={demo_data / 'digits'}", *SMALL, *overrides]).recipe


def evaluator_with(demo_data, folder, *settings):
    evaluation = [f"evaluation.{setting}" for setting in ("show_samples=4", "resamples=0", *settings)]
    return Evaluator(recipe_with(demo_data, *evaluation), World(device=torch.device("cpu")), folder)


def test_a_run_that_could_not_be_measured_does_not_train(demo_data, tmp_path):
    overrides = (
        "evaluation={metrics: [fd], features: pixel, resamples: 0}",
        f"evaluation.reference={demo_data / 'scenes'}",
    )
    words = ("run", "flow/dit-smoke", f"data.path={demo_data / 'digits'}", *SMALL, "train.steps=4", *overrides)
    ended = sixfold(*words, "--run-dir", str(tmp_path / "run"), folder=tmp_path)
    said, _ = ended.communicate(timeout=200)
    assert ended.returncode == 2, said
    assert "reference images are 16x16 with 3 channels, samples are 8x8 with 1 channel" in said
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if "event" in event] == ["started", "finished"]
    assert not any("metrics" in event for event in events)


@pytest.mark.parametrize("metric", ["fd", "precision_recall"])
def test_references_of_another_size_are_known_beforehand(demo_data, tmp_path, metric):
    settings = (f"metrics=[{metric}]", "features=pixel", f"reference={demo_data / 'scenes'}")
    with pytest.raises(DataError, match="reference images are 16x16 with 3 channels"):
        evaluator_with(demo_data, tmp_path, *settings).prepare()
    evaluator_with(demo_data, tmp_path, f"metrics=[{metric}]", "features=pixel").prepare()


def test_balls_around_references_are_made_once(demo_data, tmp_path):
    settings = ("metrics=[precision_recall, density_coverage]", "features=pixel", "reference_features=50")
    evaluator_with(demo_data, tmp_path, *settings).prepare()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("radii-*.safetensors")}
    assert sorted(path.name.rpartition("-")[0] for path in kept) == ["radii-3", "radii-5"]
    again = evaluator_with(demo_data, tmp_path, *settings)
    again.prepare()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("radii-*.safetensors")} == kept
    for metric, neighbours in zip(again._metrics, (3, 5), strict=True):
        assert torch.equal(metric._data.radii, balls_around(metric._data.centres, neighbours=neighbours).radii)


def test_too_few_references_are_known_beforehand(demo_data, tmp_path):
    own = [f"data.path={demo_data / 'scenes'}", "networks.denoiser.image_size=16", "networks.denoiser.channels=3"]
    unconditional = ("networks.denoiser.classes=0", "objective.label_drop=0")
    recipe = recipe_with(demo_data, *own, *unconditional, "evaluation={metrics: [fd], features: pixel, resamples: 0}")
    evaluator = Evaluator(recipe, World(device=torch.device("cpu")), tmp_path)
    with pytest.raises(DataError, match="too few for the covariance of 768 pixel features"):
        evaluator.prepare()


def test_a_network_without_classes_is_shown_and_measured_on_labelled_data(demo_data, tmp_path):
    overrides = (
        "networks.denoiser.classes=0",
        "objective.label_drop=0",
        "evaluation={metrics: [loss], show_samples: 4}",
    )
    run = train_run(recipe_with(demo_data, *overrides), tmp_path / "run", steps=1)
    trained = load_trained(run, overrides=("evaluation.metrics=[nearest_neighbour]", "evaluation.samples=8"))
    evaluator = Evaluator(trained.recipe, World(device=trained.device), tmp_path)
    samples = evaluator.samples_to_show(trained.networks)
    assert samples is not None
    assert samples.conditions == {}
    assert [estimate.samples for estimate in evaluator.sample_estimates(trained.networks)] == [8]


def test_a_guide_that_knows_other_images_is_refused(demo_data, tmp_path):
    run = train_run(recipe_with(demo_data, "evaluation=null"), tmp_path / "run", steps=1)
    guided = recipe_with(
        demo_data,
        "networks.denoiser.classes=5",
        f"networks.guide={{type: trained, run: {run}}}",
        "objective.guide=guide",
        "sampling.guidance={type: autoguidance, scale: 2.0}",
        "evaluation={metrics: [loss], show_samples: 4}",
    )
    with pytest.raises(RecipeError, match=r"networks\.guide\.classes is 10, that of networks\.denoiser is 5"):
        Evaluator(guided, World(device=torch.device("cpu")), tmp_path)
