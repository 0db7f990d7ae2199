"""Promise 6 for codecs: faithful with few values, using their codes, and sharper for their adversary."""

import pytest
import torch

from commands import last_values, output_of, train
from sixfold.evaluation.features import LabelledImages, train_classifier
from sixfold.evaluation.frechet import frechet_distance, moments
from sixfold.models.codec.config import CodecConfig
from sixfold.recipe.load import load_recipe
from sixfold.train.inference import load_trained
from sixfold_data.evaluation import read_split_arrays

FEWEST_TIMES_FEWER = 4
LEAST_PSNR_DB = 25.0
LEAST_CODEBOOK_USE = 0.8
SEEDS = (0, 1, 2)

SMALL = (
    "networks.codec.image_size=16",
    "networks.codec.multipliers=[1,2]",
    "train.steps=200",
)


def require_faithful(run):
    """Hold a trained codec to the gates."""
    codec, values = load_recipe(run / "recipe.yaml").recipe.networks["codec"], last_values(run)
    assert isinstance(codec, CodecConfig)
    print(run.name, {name: round(value, 3) for name, value in values.items() if name.startswith("val/")})
    assert FEWEST_TIMES_FEWER * codec.values <= codec.channels * codec.image_size**2
    assert values["val/psnr"] > LEAST_PSNR_DB
    if codec.codebook_size is not None:
        assert values["val/codebook_use"] > LEAST_CODEBOOK_USE


@pytest.mark.quality
@pytest.mark.timeout(600)
def test_a_small_codec_of_scenes_is_faithful(demo_data, tmp_path):
    """On small pictures; the recipes themselves are below."""
    data = f"data.path={demo_data / 'scenes'}"
    require_faithful(train("codec/vq-scenes-smoke", data, *SMALL, run=tmp_path / "vq"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    output_of("data", "demo", "scenes", "--out", str(folder / "scenes"), folder=folder)
    return folder / "scenes"


@pytest.mark.quality
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bottleneck", ["kl", "vq", "fsq"])
def test_codecs_of_scenes_are_faithful(bottleneck, scenes, tmp_path):
    words = (f"codec/{bottleneck}-scenes-smoke", f"data.path={scenes}")
    require_faithful(train(*words, run=tmp_path / bottleneck, timeout_s=1700))


def features_fd(run, classifier):
    """The Frechet distance between held-out images and what a codec makes of them, in features of another network."""
    trained = load_trained(run)
    images = torch.from_numpy(read_split_arrays(trained.recipe.data, "val")["image"])
    with torch.no_grad():
        made = trained.networks["codec"](images)["image"].clamp(-1.0, 1.0)
        return frechet_distance(moments(classifier.features(images)), moments(classifier.features(made)))


@pytest.mark.quality
@pytest.mark.timeout(3600)
def test_an_adversary_sharpens_reconstructions(demo_data, tmp_path):
    """Features are those of a classifier that no loss has seen; pixels alone would prefer the blur."""
    data = f"data.path={demo_data / 'digits'}"
    arrays = read_split_arrays(load_recipe("codec/kl-smoke", [data]).recipe.data, "train")
    images, labels = (torch.from_numpy(arrays[name]) for name in ("image", "label"))
    classifier = train_classifier(LabelledImages(images=images, labels=labels), seed=7)
    found = {}
    for seed in SEEDS:
        for name, overrides in {
            "with": (),
            "without": ("objective.adversarial=null", "networks.discriminator=null"),
        }.items():
            run = tmp_path / f"{name}-{seed}"
            train("codec/kl-smoke", data, f"seed={seed}", *overrides, run=run, timeout_s=800)
            found[name, seed] = features_fd(run, classifier)
    print(found)
    ratios = [found["with", seed] / found["without", seed] for seed in SEEDS]
    assert max(ratios) < 1.0, "each time, not on average alone"
    assert sum(ratios) / len(ratios) < 0.97
