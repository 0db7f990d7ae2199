"""What `sixfold sample` and `evaluate` take instead of a recipe's own: a guide, metrics, features, a reference."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from latent_cases import train_run
from sixfold.cli.main import build_app
from sixfold.errors import TrainingError, UserError
from sixfold.evaluation.extractor_config import PreprocessingConfig
from sixfold.evaluation.pretrained import read_preprocessing
from sixfold.recipe.load import load_recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Digits, and a network after eight steps and after two."""
    from sixfold_data.build import BuildOptions
    from sixfold_data.demo import build_digits

    root = tmp_path_factory.mktemp("by-command")
    build_digits(BuildOptions(out=root / "digits"))
    for name, steps in (("late", 8), ("early", 2)):
        settings = [f"data.path={root}/digits", "networks.denoiser.depth=1", "tracking.type=jsonl", "sampling.steps=3"]
        train_run(load_recipe("flow/dit-smoke", settings).recipe, root / name, steps)
    return root


def invoke(*words):
    return CliRunner().invoke(build_app(), [str(word) for word in words])


def sampled(runs, out, *words):
    done = invoke("sample", runs / "late", "--n", 4, "--out", out, *words)
    assert done.exit_code == 0, done.output
    return np.load(next(out.glob("*.npz")))["image"]


def test_an_early_checkpoint_guides(runs, tmp_path):
    plain = sampled(runs, tmp_path / "plain")
    early = sampled(runs, tmp_path / "early", "--guide", f"{runs / 'early'}@2")
    itself = sampled(runs, tmp_path / "itself", "--guide", runs / "late")
    stronger = sampled(runs, tmp_path / "stronger", "--guide", runs / "early", "--guidance", "4")
    np.testing.assert_allclose(itself, plain, atol=1e-5)  # nothing to push away from
    assert np.abs(early - plain).max() > 1e-3
    assert np.abs(stronger - plain).mean() > np.abs(early - plain).mean()


def test_a_guide_that_is_not_there_is_named(runs, tmp_path):
    missing = invoke("sample", runs / "late", "--guide", f"{runs / 'early'}@7", "--out", tmp_path / "none")
    assert "no checkpoint of step 7" in str(missing.exception)
    unknown = invoke("sample", runs / "late", "--guide", "nobody", "--out", tmp_path / "none")
    assert "nobody" in str(unknown.exception)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with random weights, as ``save_pretrained`` leaves it, for images of another size and scale."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 10},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=6,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    described = {
        "do_resize": True,
        "size": {"shortest_edge": 20},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
        "do_normalize": True,
        "image_mean": [0.481, 0.457, 0.408],
        "image_std": [0.268, 0.261, 0.275],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    return folder


def test_cmmd_is_measured_in_the_space_of_a_clip_by_command(runs, clip):
    features = json.dumps({"type": "transformers", "path": str(clip), "normalized": True})
    done = invoke(
        *("evaluate", runs / "late", "--metrics", "cmmd", "--features", features),
        *("--reference", runs / "digits", "--samples", 8, "--json"),
    )
    assert done.exit_code == 0, done.output
    (found,) = (each for each in json.loads(done.stdout)["estimates"] if each["name"] == "cmmd")
    assert (found["name"], found["samples"], found["space"]) == ("cmmd", 8, clip.name)
    assert found["value"] > 0


def no_number_for_drawn(images):
    """The pixels; NaN of an image with other values than the seventeen of the digits."""
    values = images.flatten(1)
    drawn = ((values + 1) * 8 - ((values + 1) * 8).round()).abs().amax(1) > 0.05
    return torch.where(drawn[:, None], torch.nan, values)


def test_features_of_samples_that_are_no_numbers_are_refused(runs):
    features = json.dumps({"type": "callable", "target": f"{__name__}:no_number_for_drawn"})
    done = invoke("evaluate", runs / "late", "--metrics", "kid", "--features", features, "--samples", 8)
    assert isinstance(done.exception, TrainingError)
    assert "8 of 8 rows of drawn samples" in str(done.exception)
    assert "are not finite numbers" in str(done.exception)


def test_what_cannot_be_measured_is_refused_by_the_recipes_checks(runs):
    done = invoke("evaluate", runs / "late", "--metrics", "bits_per_byte", "--json")
    assert "bits_per_byte does not apply" in str(done.exception)


def test_preprocessing_is_what_the_network_was_saved_with(clip):
    found = json.loads((clip / "preprocessor_config.json").read_text())
    assert read_preprocessing(found) == PreprocessingConfig(
        image_size=20, crop=16, mean=[0.481, 0.457, 0.408], std=[0.268, 0.261, 0.275]
    )
    plain = read_preprocessing({"do_resize": False, "image_mean": [0.5], "image_std": [0.25]})
    assert plain == PreprocessingConfig(mean=[0.5], std=[0.25])
    assert read_preprocessing({**found, "size": 20, "resample": 2}).interpolation == "bilinear"
    with pytest.raises(ValueError, match="not that of a square"):
        read_preprocessing({**found, "size": {"height": 16, "width": 20}})
    with pytest.raises(ValueError, match="resample is 1"):
        read_preprocessing({**found, "resample": 1})


def test_a_network_that_says_nothing_of_its_images_is_refused(runs, clip, tmp_path):
    for file in clip.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).symlink_to(file)
    features = json.dumps({"type": "transformers", "path": str(tmp_path)})
    done = invoke("evaluate", runs / "late", "--metrics", "cmmd", "--features", features, "--samples", 8)
    assert isinstance(done.exception, UserError)
    assert "how the network wants its images cannot be read" in str(done.exception)
    nowhere = json.dumps({"type": "transformers", "path": "weights/none"})
    done = invoke("evaluate", runs / "late", "--metrics", "cmmd", "--features", nowhere, "--samples", 8)
    assert "there is no folder weights/none" in str(done.exception)
