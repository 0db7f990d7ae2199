"""Image scores on real digits: the classifier, its cache, the gate's behaviour and the picture grid."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sixfold.errors import RecipeError
from sixfold.evaluation import features as features_module
from sixfold.evaluation.config import EvaluationConfig
from sixfold.evaluation.features import LabelledImages, load_or_train_classifier, train_classifier
from sixfold.evaluation.grid import sample_grid, write_sample_grid
from sixfold.evaluation.images import ImageScores

METRICS = ["fd", "kid", "nearest_neighbour", "conditional_accuracy"]


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    training, held_out = order[:1437], order[1437:]
    return (
        LabelledImages(images=images[training], labels=labels[training]),
        LabelledImages(images=images[held_out], labels=labels[held_out]),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("classifier")


@pytest.fixture(scope="module")
def scores(digits, cache):
    return ImageScores(EvaluationConfig(metrics=METRICS), *digits, cache=cache, fingerprint="digits")


def test_the_classifier_is_accurate_on_held_out_digits(scores):
    assert scores.classifier.accuracy >= 0.975


def test_held_out_digits_pass_the_gate(scores, digits):
    held_out = digits[1]
    measured = scores(held_out.images, held_out.labels)
    # the half-split distance compares 718 with 718 images, this one 360 with 1437: within sampling error the same scale
    assert measured["fd_ratio"] < 1.5
    assert measured["nearest_neighbour"] == pytest.approx(1.0)
    assert measured["conditional_accuracy"] == pytest.approx(scores.classifier.accuracy)
    assert abs(measured["kid"]) < 0.1


def test_copies_blur_and_a_missing_class_fail_it(scores, digits):
    training = digits[0]
    copies = scores(training.images, training.labels)
    assert copies["fd_ratio"] < 0.01
    assert copies["nearest_neighbour"] < 0.01
    blurred = torch.nn.functional.avg_pool2d(training.images, 3, stride=1, padding=1, count_include_pad=False)
    assert scores(blurred, training.labels)["fd_ratio"] > 3
    most = training.labels != 3
    assert scores(training.images[most], training.labels[most])["fd_ratio"] > 1.2
    shuffled = training.labels.roll(1)
    assert scores(training.images, shuffled)["conditional_accuracy"] < 0.3


def test_a_cached_classifier_is_the_same_one_and_other_data_get_their_own(scores, digits, cache, monkeypatch):
    monkeypatch.setattr(features_module, "train_classifier", None)  # training again would fail
    again = load_or_train_classifier(*digits, cache=cache, fingerprint="digits")
    assert torch.equal(again(digits[1].images), scores.classifier(digits[1].images))
    assert again.accuracy == scores.classifier.accuracy
    with pytest.raises(TypeError):
        load_or_train_classifier(*digits, cache=cache, fingerprint="other digits")


def test_training_is_a_function_of_data_and_seed_and_leaves_the_global_generator_alone(digits, monkeypatch):
    monkeypatch.setattr(features_module, "_STEPS", 5)
    state = torch.get_rng_state()
    first = train_classifier(digits[0]).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    second, other = train_classifier(digits[0]).state_dict(), train_classifier(digits[0], seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_data_without_labels_are_scored_in_pixels_and_refused_a_classifier(digits, cache):
    bare = LabelledImages(images=digits[0].images), LabelledImages(images=digits[1].images)
    with pytest.raises(RecipeError, match="no labels"):
        ImageScores(EvaluationConfig(metrics=["fd"]), *bare, cache=cache, fingerprint="bare")
    config = EvaluationConfig(metrics=["loss", "fd"], features="pixel")
    scores = ImageScores(config, *bare, cache=cache, fingerprint="bare")
    measured = scores(digits[1].images, None)
    assert set(measured) == {"fd", "fd_ratio"}
    assert measured["fd_ratio"] < 2


def test_the_grid_shows_each_image_above_its_caption(tmp_path):
    images = torch.stack([torch.full((1, 8, 8), value) for value in (-1.0, 0.0, 1.0, 5.0)])
    path = tmp_path / "samples" / "grid.png"
    write_sample_grid(path, images, ["a", "b", "c", "d"], columns=3)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (2 * (64 + 4 + 14) + 4, 3 * 68 + 4, 3)
    centres = [pixels[4 + 32 + row * 82, 4 + 32 + column * 68, 0] for row, column in [(0, 0), (0, 1), (0, 2), (1, 0)]]
    assert centres == [0, 128, 255, 255]
    assert (pixels[68:82, 4:68] < 128).any()  # the caption
    assert sample_grid(torch.zeros(2, 3, 100, 90)).size == (2 * 94 + 4, 108)
