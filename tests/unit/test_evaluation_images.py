"""Metrics of samples on real digits: the classifier, kept references, the gate, refusals, the picture grid."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sixfold.errors import DataError, RecipeError, UserError
from sixfold.evaluation import features as features_module
from sixfold.evaluation.config import EvaluationConfig
from sixfold.evaluation.contract import Drawn
from sixfold.evaluation.extractor_config import PreprocessingConfig
from sixfold.evaluation.extractors import preprocess
from sixfold.evaluation.features import LabelledImages, load_or_train_classifier, train_classifier
from sixfold.evaluation.frechet import moments
from sixfold.evaluation.grid import sample_grid, write_sample_grid
from sixfold.evaluation.references import References
from sixfold.evaluation.report import logged, table_rows
from sixfold.objectives.contract import Batch

METRICS = ["fd", "kid", "cmmd", "precision_recall", "density_coverage", "nearest_neighbour", "conditional_accuracy"]


@dataclass(frozen=True)
class Held:
    """Two splits in memory as an image source."""

    training: LabelledImages
    held_out: LabelledImages
    fingerprint: str = "digits"

    def whole(self, split):
        return getattr(self, split)

    def size(self, split):
        return len(self.whole(split).images)

    def shares(self, split):
        """Uneven batches in no order, the last one empty."""
        positions = torch.randperm(self.size(split), generator=torch.Generator().manual_seed(1))
        for part in (*torch.split(positions, 700), positions[:0]):
            yield Batch({"image": self.whole(split).images[part]}, part)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    training, held_out = order[:1437], order[1437:]
    return Held(
        LabelledImages(images=images[training], labels=labels[training]),
        LabelledImages(images=images[held_out], labels=labels[held_out]),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


def references_of(source, cache, **config):
    settings = EvaluationConfig.model_validate({"metrics": METRICS, "resamples": 20, **config})
    return References(settings, source, cache=cache, device=torch.device("cpu"), rank=0)


def measure(references, images, labels=None):
    """Every metric's value, as an evaluation of one rank takes it."""
    drawn = Drawn(images=images, conditions={} if labels is None else {"label": labels})
    metrics = [settings.load()(settings, references) for settings in references.config.sample_metrics]
    return {each.name: each for metric in metrics for each in metric.estimates(metric.rows(drawn))}


@pytest.fixture(scope="module")
def references(digits, cache):
    return references_of(digits, cache)


def test_held_out_digits_pass_the_gate(references, digits):
    found = measure(references, digits.held_out.images, digits.held_out.labels)
    value = {name: estimate.value for name, estimate in found.items()}
    assert references.classifier().accuracy >= 0.975
    # the half-split distance compares 718 with 718 images, this one 360 with 1437: within sampling error the same scale
    assert value["fd_ratio"] < 1.5
    assert value["nearest_neighbour"] == pytest.approx(1.0)
    assert value["conditional_accuracy"] == pytest.approx(references.classifier().accuracy)
    assert abs(value["kid"]) < 0.1
    assert abs(value["cmmd"]) < 1.0
    assert min(value["precision"], value["density"]) > 0.75
    assert min(value["recall"], value["coverage"]) > 0.6
    assert found["fd"].samples == 360
    assert found["fd"].reference == 1437
    assert found["fd"].space == "classifier"
    (fact,) = references.facts()
    assert fact.name == "classifier_accuracy"
    assert fact.samples == 360


def test_copies_blur_and_a_missing_class_fail_it(references, digits):
    training = digits.training
    copies = {name: each.value for name, each in measure(references, training.images, training.labels).items()}
    assert copies["fd_ratio"] < 0.01
    assert copies["nearest_neighbour"] < 0.01
    assert copies["precision"] == copies["recall"] == copies["coverage"] == 1.0
    blurred = torch.nn.functional.avg_pool2d(training.images, 3, stride=1, padding=1, count_include_pad=False)
    blur = measure(references, blurred, training.labels.roll(1))
    assert blur["fd_ratio"].value > 3
    assert blur["precision"].value < 0.8
    assert blur["conditional_accuracy"].value < 0.3
    most = training.labels != 3
    assert measure(references, training.images[most], training.labels[most])["fd_ratio"].value > 1.2


def test_results_are_tabled_with_their_sample_size_and_logged_with_their_margins(references, digits):
    estimates = list(measure(references, digits.held_out.images, digits.held_out.labels).values())
    values, rows = logged(estimates), {row[0]: row for row in table_rows(estimates)}
    assert values["val/fd"] == estimates[0].value
    assert values["val/fd_margin"] == estimates[0].margin
    _, value, interval, better, samples, reference, space = rows["fd"]
    low, high = (float(end) for end in interval.split(" to "))
    assert low < float(value) < high
    assert (better, samples, reference, space) == ("lower", "360", "1,437", "classifier")


def test_kept_references_are_used_again_and_anything_that_changes_them_makes_new_ones(digits, tmp_path, monkeypatch):
    pixels = {"metrics": ["fd"], "features": "pixel"}
    first = measure(references_of(digits, tmp_path, **pixels), digits.held_out.images)
    again = references_of(digits, tmp_path, **pixels)
    monkeypatch.setattr(References, "_extract", None)  # extracting again would fail
    assert measure(again, digits.held_out.images) == first
    for change in ({"fingerprint": "other data"}, {}):
        source = replace(digits, **change)
        settings = pixels if change else {**pixels, "reference_features": 500}
        with pytest.raises(TypeError):
            measure(references_of(source, tmp_path, **settings), digits.held_out.images)


def test_kept_moments_are_of_all_images_and_kept_rows_evenly_spread(digits, tmp_path):
    references = references_of(digits, tmp_path, features="pixel", reference_features=144)
    extractor = references.extractor(references.config.features)
    kept = references.features(extractor, "training")
    expected = moments(extractor(digits.training.images))
    torch.testing.assert_close(kept.mean, expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept.covariance, expected.covariance, rtol=1e-9, atol=1e-12)
    assert torch.equal(kept.rows, extractor(digits.training.images[torch.arange(144) * 1437 // 144]))


def test_a_cached_classifier_is_the_same_one_and_other_data_get_their_own(references, digits, cache, monkeypatch):
    first = references.classifier()
    monkeypatch.setattr(features_module, "train_classifier", None)  # training again would fail
    splits = digits.training, digits.held_out
    again = load_or_train_classifier(*splits, cache=cache, fingerprint="digits")
    assert torch.equal(again(digits.held_out.images), first(digits.held_out.images))
    assert again.accuracy == first.accuracy
    with pytest.raises(TypeError):
        load_or_train_classifier(*splits, cache=cache, fingerprint="other digits")


def test_training_is_a_function_of_data_and_seed_and_leaves_the_global_generator_alone(digits, monkeypatch):
    monkeypatch.setattr(features_module, "_STEPS", 5)
    state = torch.get_rng_state()
    first = train_classifier(digits.training).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    second = train_classifier(digits.training).state_dict()
    other = train_classifier(digits.training, seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_data_without_labels_are_scored_in_pixels_and_refused_a_classifier(digits, tmp_path):
    bare = Held(LabelledImages(images=digits.training.images), LabelledImages(images=digits.held_out.images))
    with pytest.raises(RecipeError, match="no labels"):
        measure(references_of(bare, tmp_path, metrics=["fd"]), digits.held_out.images)
    found = measure(references_of(bare, tmp_path, metrics=["loss", "fd"], features="pixel"), digits.held_out.images)
    assert set(found) == {"fd", "fd_ratio"}
    assert found["fd_ratio"].value < 2


def test_a_reference_smaller_than_the_features_is_refused(digits, tmp_path):
    few = replace(digits, training=LabelledImages(images=digits.training.images[:64]), fingerprint="few")
    with pytest.raises(DataError, match="64 reference images are too few for the covariance of 64 pixel features"):
        measure(references_of(few, tmp_path, metrics=["fd"], features="pixel"), digits.held_out.images)
    settings = {"metrics": ["precision_recall"], "features": "pixel", "reference_features": 3}
    with pytest.raises(DataError, match="3 reference images are too few for precision_recall"):
        measure(references_of(few, tmp_path, **settings), digits.held_out.images)


def mean_of_rows(images):
    """A feature extractor for the tests below."""
    return images.mean(2).flatten(1)


def not_a_number(images):
    """One that fails."""
    return images.flatten(1)[:, :4] / 0.0 * 0.0


def one_number(images):
    """One of the wrong shape."""
    return images.sum()


def callable_settings(name, **more):
    return {"metrics": ["fd"], "features": {"type": "callable", "target": f"extractor_examples:{name}", **more}}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "extractor_examples", sys.modules[__name__])


def test_any_callable_is_an_extractor_named_in_the_result(digits, tmp_path):
    found = measure(references_of(digits, tmp_path, **callable_settings("mean_of_rows")), digits.held_out.images)
    assert found["fd"].space == "mean_of_rows"
    assert found["fd_ratio"].value < 2


def test_unusable_extractors_say_what_is_wrong(digits, tmp_path):
    def refusal(error, **settings):
        with pytest.raises(error) as raised:
            measure(references_of(digits, tmp_path, **settings), digits.held_out.images)
        assert raised.value.faults[0].fix
        return str(raised.value)

    assert "has no attribute 'nothing'" in refusal(UserError, **callable_settings("nothing"))
    assert "is a list, not callable" in refusal(UserError, **callable_settings("METRICS"))
    assert "1437 features of training images" not in refusal(UserError, **callable_settings("one_number"))
    assert "features of training images, by not_a_number, are not finite" in refusal(
        DataError, **callable_settings("not_a_number")
    )
    torchscript = {"type": "torchscript", "path": str(tmp_path / "none.pt")}
    assert "does not exist" in refusal(UserError, metrics=["fd"], features=torchscript)
    (tmp_path / "none.pt").write_bytes(b"no archive")
    assert "is no TorchScript file" in refusal(UserError, metrics=["fd"], features=torchscript)
    transformers = {"type": "transformers", "path": str(tmp_path)}
    assert "transformers cannot load it" in refusal(UserError, metrics=["fd"], features=transformers)


def test_torchscript_and_transformers_extractors_load_from_local_files(digits, tmp_path):
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 8, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 10}, vision_config=vision, projection_dim=6)).eval()
    clip.save_pretrained(tmp_path / "clip")
    vit = ViTModel(ViTConfig(**vision, num_channels=3)).eval()
    vit.save_pretrained(tmp_path / "vit")
    scripted = torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, 8, 8))
    scripted.save(tmp_path / "flat.pt")
    images = digits.training.images[:5]
    colour = images.expand(-1, 3, -1, -1)
    plain = {"rounded": False}
    with torch.no_grad():
        embedded = clip.get_image_features(pixel_values=colour)
        embedded = embedded if isinstance(embedded, torch.Tensor) else embedded.pooler_output
        pooled = vit(pixel_values=colour).pooler_output
    for settings, expected in (
        ({"type": "torchscript", "path": str(tmp_path / "flat.pt")}, colour.flatten(1)),
        ({"type": "transformers", "path": str(tmp_path / "clip")}, embedded),
        (
            {"type": "transformers", "path": str(tmp_path / "clip"), "normalized": True},
            embedded / embedded.norm(dim=1, keepdim=True),
        ),
        ({"type": "transformers", "path": str(tmp_path / "vit")}, pooled),
    ):
        references = references_of(digits, tmp_path, features={**settings, "preprocessing": plain})
        torch.testing.assert_close(references.extractor(references.config.features)(images), expected)


def test_the_identity_of_an_extractor_follows_its_weights_and_its_preprocessing(digits, tmp_path):
    def identity(**preprocessing):
        features = {"type": "torchscript", "path": str(tmp_path / "net.pt"), "preprocessing": preprocessing}
        references = references_of(digits, tmp_path, features=features)
        return references.extractor(references.config.features).identity

    torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, 8, 8)).save(tmp_path / "net.pt")
    first = identity()
    assert identity() == first
    assert identity(image_size=16) != first
    torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, 4, 4)).save(tmp_path / "net.pt")
    assert identity() != first


def test_preprocessing_is_what_pillow_and_arithmetic_say(digits):
    image = (digits.training.images[:1] + 1) / 2
    config = PreprocessingConfig(image_size=5, rounded=False, mean=[0.5, 0.4, 0.3], std=[1.0, 0.5, 0.25])
    found = preprocess(digits.training.images[:1], config)[0]
    picture = Image.fromarray(image[0, 0].numpy(), mode="F").resize((5, 5), Image.Resampling.BICUBIC)
    resized = np.asarray(picture).clip(0, 1)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        np.testing.assert_allclose(found[channel], (resized - mean) / std, atol=2e-5)
    rounded = preprocess(torch.full((1, 1, 2, 2), 0.1), PreprocessingConfig(mean=[0.0], std=[1.0]))
    assert rounded.flatten()[0] == pytest.approx(round(0.55 * 255) / 255)


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
