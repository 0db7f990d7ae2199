"""Text to image on pictures of many aspect ratios: parity and exact resume hold where each batch has another shape."""

from pathlib import Path

import pytest
import torch

from data_sets import make_mixed_images
from latent_cases import train_run
from ranks import rank_pool
from recipe_cases import advance, save, saved_tensors
from sixfold.distributed.process_group import join
from sixfold.errors import DataError, RecipeError
from sixfold.recipe.load import load_recipe
from sixfold.train.assembly import assemble, open_checkpointer
from sixfold.train.fitting import check_data_fits
from sixfold.train.inference import evaluate_run
from sixfold.train.run_folder import RunFolder
from sixfold.train.worker import Job
from sixfold_data.describe import describe

SIZES = [((20, 20), (30, 20), (18, 28))[number % 3] for number in range(50)]
SMALL = (
    "data.global_batch=8",
    "data.lanes=4",
    "objective.codec=null",
    "networks.codec=null",
    "networks.denoiser.image_size=16",
    "networks.denoiser.patch_size=4",
    "networks.denoiser.position_grid=6",
    "networks.denoiser.channels=1",
    "networks.denoiser.width=32",
    "networks.denoiser.depth=2",
    "networks.denoiser.text_width=16",
    "networks.denoiser.pooled_width=16",
    "networks.text_encoder.width=16",
    "engine.precision=fp32",
    "tracking.type=jsonl",
)
BUCKETS = "data.buckets={sizes: [[16, 16], [16, 24], [24, 16]]}"
HALF = 5
"""Steps: two of them fill an epoch of a bucket, which has some 15 samples and gives 8 a batch."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    captions = [f"picture {number}" for number in range(len(SIZES))]
    return make_mixed_images(tmp_path_factory.mktemp("mixed") / "set", SIZES, captions=captions, val=5)


def recipe_on(path, *overrides):
    return load_recipe("flow/mmdit-smoke", [f"data.path={path}", *SMALL, BUCKETS, *overrides]).recipe


def train_and_save(recipe, folder, until):
    """Resume the run if it has a checkpoint, train to step ``until``, save; return losses and gradient norms."""
    run, world = RunFolder(Path(folder)), join()
    checkpointer = open_checkpointer(recipe, world, run.checkpoints)
    job = Job(recipe=recipe, world=world, folder=run, training=assemble(recipe, world), checkpointer=checkpointer)
    job.restore(lambda note: None)
    trajectory = [pair for _ in range(until - job.training.progress.step) for pair in advance(job.training)]
    save(job)
    job.close()
    return trajectory


def run(ranks, pictures, folder, until, *overrides):
    results = rank_pool(ranks).run(_train, str(pictures), str(folder), until, overrides)
    assert all(result == results[0] for result in results)
    return results[0]


def _train(path, folder, until, overrides):
    recipe = recipe_on(path, "evaluation=null", "train.ema={type: constant, decay: 0.9}", *overrides)
    return train_and_save(recipe, folder, until)


def test_buckets_train_alike_on_any_ranks_and_resume_bitwise(pictures, tmp_path):
    whole = run(2, pictures, tmp_path / "whole", 2 * HALF)
    first = run(2, pictures, tmp_path / "halves", HALF)
    second = run(2, pictures, tmp_path / "halves", 2 * HALF)
    assert first + second == whole
    expected, resumed = (saved_tensors(tmp_path / run, 2 * HALF) for run in ("whole", "halves"))
    assert [key for key, value in expected.items() if not torch.equal(value, resumed[key])] == []
    alone = run(1, pictures, tmp_path / "alone", 2 * HALF)
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(whole), rtol=1e-5, atol=0)
    accumulated = run(2, pictures, tmp_path / "accumulated", 2 * HALF, "engine.micro_batch=2")
    torch.testing.assert_close(torch.tensor(accumulated), torch.tensor(whole), rtol=1e-5, atol=0)


def test_going_on_with_another_filter_is_refused(pictures, tmp_path):
    train_and_save(recipe_on(pictures), tmp_path, 1)
    with pytest.raises(DataError, match="filter was none, is min_caption_bytes=3"):
        train_and_save(recipe_on(pictures, "data.filter.min_caption_bytes=3"), tmp_path, 2)


def test_held_out_loss_is_taken_over_all_buckets(pictures, tmp_path):
    recipe = recipe_on(pictures, "evaluation.metrics=[loss]", "evaluation.batch=2", "evaluation.held_out_samples=null")
    train_run(recipe, tmp_path / "run", steps=1)
    (loss,) = [estimate for estimate in evaluate_run(tmp_path / "run").estimates if estimate.name == "loss"]
    assert loss.samples == 5
    assert loss.value > 0


def test_networks_that_cannot_read_the_buckets_are_refused(pictures):
    recipe = recipe_on(pictures)
    check_data_fits(recipe, describe(recipe.data))
    for change, message in (
        ("networks.denoiser.position_grid=5", r"16x24, 24x16.*\n.*multiples of 4, up to 20"),
        ("data.buckets={sizes: [[16, 16], [22, 16]]}", "pictures of 22x16"),
    ):
        recipe = recipe_on(pictures, change)
        with pytest.raises(RecipeError, match=message):
            check_data_fits(recipe, describe(recipe.data))
    squares = load_recipe(
        "flow/dit-smoke",
        [f"data.path={pictures}", BUCKETS, "networks.denoiser.image_size=16", "evaluation.metrics=[loss]"],
    ).recipe
    with pytest.raises(RecipeError, match="type mmdit"):
        check_data_fits(squares, describe(squares.data))
    with pytest.raises(RecipeError, match="several sizes"):
        recipe_on(pictures, "evaluation.metrics=[fd]")
