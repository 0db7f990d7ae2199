"""Training on latents: they are sampled by position, decoded by the codec that made them, and no other is let in."""

import numpy as np
import pytest
import torch
from PIL import Image

from latent_cases import codec_run, encode_run, make_scenes, train_run
from sixfold.distributed.process_group import World
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.objectives.contract import Batch
from sixfold.objectives.latents import clean_data
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.load import load_recipe
from sixfold.train.assembly import assemble
from sixfold.train.fitting import check_data_fits
from sixfold.train.inference import evaluate_run
from sixfold.train.rehearsal import rehearse_recipe
from sixfold.train.sampling import SampleOptions, guide_overrides, sample_run
from sixfold_data.config import DataConfig
from sixfold_data.describe import describe

SMALL = (
    "data.global_batch=8",
    "networks.denoiser.width=16",
    "networks.denoiser.depth=2",
    "networks.denoiser.heads=2",
    "tracking.type=jsonl",
)
SMALL_TEXT = (
    "networks.text_encoder.width=8",
    "networks.text_encoder.heads=2",
    "networks.denoiser.text_width=8",
    "networks.denoiser.pooled_width=8",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scenes, a codec's run and its latents of them."""
    folder = tmp_path_factory.mktemp("latents")
    make_scenes(folder / "scenes")
    codec_run(folder / "scenes", folder / "codec")
    encode_run(folder / "codec", folder / "scenes", folder / "latents")
    return folder


def recipe_on(made, *overrides, name="flow/mmdit-smoke", data="latents"):
    text = SMALL_TEXT if "mmdit" in name else ()
    named = [f"data.path={made / data}", f"networks.codec.run={made / 'codec'}", *SMALL, *text, *overrides]
    return load_recipe(name, named).recipe


def test_posteriors_are_sampled_by_position():
    n = 2000
    moments = torch.cat([torch.full((n, 1, 2, 2), 3.0), torch.full((n, 1, 2, 2), 2 * np.log(0.5))], dim=1)
    positions = torch.arange(n)
    drawn = clean_data(Batch({"latent": moments}, positions), PositionRandom(0, positions))
    assert drawn.mean() == pytest.approx(3.0, abs=0.03)
    assert drawn.std() == pytest.approx(0.5, abs=0.02)
    part = clean_data(Batch({"latent": moments[7:9]}, positions[7:9]), PositionRandom(0, positions[7:9]))
    assert torch.equal(part, drawn[7:9])


def test_text_to_image_on_latents_from_training_to_pictures(made, tmp_path):
    overrides = ("evaluation.samples=4", "evaluation.held_out_samples=4", "sampling.steps=2")
    run = train_run(recipe_on(made, *overrides), tmp_path / "run", steps=2)
    prompt = "a red circle above a blue square"
    options = SampleOptions(count=2, prompt=prompt, out=tmp_path / "out")
    written = sample_run(run, options)
    assert written.files[0].name == "grid.png"
    arrays = np.load(tmp_path / "out" / "samples.npz")
    assert arrays["image"].shape == (2, 3, 32, 32)
    assert np.abs(arrays["image"]).max() <= 1.0
    assert bytes(arrays["caption"][0][: len(prompt)].astype(np.uint8)).decode() == prompt
    estimates = {estimate.name: estimate for estimate in evaluate_run(run).estimates}
    assert 0.0 <= estimates["prompt_alignment"].value <= 1.0
    assert estimates["prompt_relation"].samples == 4
    assert estimates["loss"].value > 0
    with Image.open(written.files[0]) as grid:
        assert grid.width > 100


def test_latents_of_another_codec_are_refused(made, tmp_path):
    other = codec_run(made / "scenes", tmp_path / "other", "seed=1")
    recipe = recipe_on(made, f"networks.codec.run={other}")
    with pytest.raises(RecipeError, match="the latents are of codec"):
        assemble(recipe, World())
    further = codec_run(made / "scenes", tmp_path / "further", steps=3)
    with pytest.raises(RecipeError, match=r"networks\.codec\.step"):
        assemble(recipe_on(made, f"networks.codec.run={further}"), World())


def test_data_and_codec_come_together(made):
    pixels = ("objective.codec=null", "networks.codec=null")
    with pytest.raises(RecipeError, match="the objective names no codec"):
        assemble(recipe_on(made, *pixels), World())
    with pytest.raises(RecipeError, match="not latents"):
        assemble(recipe_on(made, data="scenes"), World())


def test_misfits_are_named_before_anything_starts(made):
    info = describe(DataConfig(path=str(made / "latents"), global_batch=1))
    assert (info.image_size, info.channels) == ((8, 8), 4)
    check_data_fits(recipe_on(made), info)
    with pytest.raises(RecipeError, match=r"latents of 8x8.*\n.*fix: set networks\.denoiser\.image_size=8$"):
        check_data_fits(recipe_on(made, "networks.denoiser.image_size=16"), info)
    with pytest.raises(
        RecipeError, match=r"is a network of type codec\n.*fix: name another run as networks\.guide\.run"
    ):
        check_data_fits(recipe_on(made, *guide_overrides(str(made / "codec"))), info)
    images = describe(DataConfig(path=str(made / "scenes"), global_batch=1))
    encode = f"sixfold data encode {made / 'codec'} {made / 'scenes'} --out {made / 'scenes-latents'}"
    with pytest.raises(RecipeError, match=f"not latents\n  fix: encode them with `{encode}`"):
        check_data_fits(recipe_on(made, data="scenes"), images)
    uncaptioned = type(images)(**{**images.__dict__, "kind": "images", "tokenizer": None})
    with pytest.raises(RecipeError, match="images without captions"):
        check_data_fits(recipe_on(made), uncaptioned)
    with pytest.raises(RecipeError, match="captions do not fit the encoder"):
        check_recipe(recipe_on(made, "data.caption_length=64"))
    with pytest.raises(RecipeError, match="needs captions"):
        check_recipe(recipe_on(made, "evaluation.metrics=[prompt_alignment]", name="flow/latent-dit-smoke"))
    with pytest.raises(RecipeError, match="the data are latents"):
        check_recipe(recipe_on(made, "evaluation.metrics=[fd]", name="flow/latent-dit-smoke"))


def test_a_rehearsal_needs_no_latents(made):
    found = rehearse_recipe(recipe_on(made), 4)
    assert set(found) == {"denoiser", "text_encoder", "codec"}
