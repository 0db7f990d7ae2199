"""Scenes are read back from their pictures exactly, also through noise and the blur of a codec."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sixfold.errors import DataError
from sixfold_data.build import BuildOptions
from sixfold_data.config import DataConfig
from sixfold_data.decode import with_unit_range
from sixfold_data.scene_reading import captions_agree, components, read_scene
from sixfold_data.scenes import (
    IMAGE_SIZES,
    OPPOSITES,
    Agreement,
    Scene,
    Thing,
    agreement,
    all_scenes,
    build_scenes,
    held_out,
    parse_caption,
    render,
)
from sixfold_data.sources import open_sources

RED, SMALL_BLUE = Thing("red", "circle"), Thing("blue", "square", "small")


def noisy(pixels, random):
    return unit(pixels) + 0.1 * random.standard_normal((3, *pixels.shape[:2]))


def blurred(pixels, random):
    return unit(np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.8))))


def halved(pixels, random):
    """Through half the resolution and back, which blurs and rings as decoders do."""
    size = pixels.shape[0]
    small = Image.fromarray(pixels).resize((size // 2, size // 2), Image.Resampling.BOX)
    return unit(np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)))


def unit(pixels):
    return pixels.transpose(2, 0, 1) / 127.5 - 1.0


def clean(pixels, random):
    return unit(pixels)


@pytest.mark.parametrize(
    ("size", "through"),
    [(16, clean), (32, clean), (16, noisy), (32, noisy), (16, blurred), (32, blurred), (32, halved)],
)
def test_every_attribute_is_read_back(size, through):
    random = np.random.default_rng(size)
    scenes = list(all_scenes())
    chosen = [scenes[number] for number in random.choice(len(scenes), 60, replace=False)]
    wrong = [str(scene) for scene in chosen if read_scene(through(render(scene, size, random), random)) != scene]
    assert wrong == []


def test_captions_survive_a_round_trip_in_both_wordings():
    for scene in itertools.islice(all_scenes(), 0, None, 17):
        for told in (scene, scene.reworded()):
            assert parse_caption(str(told)) == told
            assert told.canonical() == scene


@pytest.mark.parametrize(
    "caption", ["", "a red circle", "a red circle above a purple square", "a red circle over a red square"]
)
def test_other_captions_are_no_scenes(caption):
    assert parse_caption(caption) is None


def test_agreement_counts_each_attribute():
    wanted = Scene(RED, "above", SMALL_BLUE)
    assert agreement(wanted, Scene(SMALL_BLUE, "below", RED)).aligned
    below = agreement(wanted, Scene(RED, "below", SMALL_BLUE))
    assert below == Agreement(colour=True, shape=True, size=True, relation=False)
    other_size = agreement(wanted, Scene(RED, "above", Thing("blue", "square")))
    assert other_size.aligned
    assert not other_size.size
    assert not agreement(wanted, Scene(Thing("blue", "circle"), "above", Thing("red", "square", "small"))).colour
    assert not agreement(wanted, None).relation


def test_a_picture_of_other_than_two_objects_shows_no_scene():
    random = np.random.default_rng(0)
    one = render(Scene(RED, "above", SMALL_BLUE), 32, random)
    one[16:] = 128
    assert read_scene(unit(one)) is None
    assert read_scene(np.zeros((3, 32, 32))) is None
    assert read_scene(random.standard_normal((3, 32, 32))) is None


def test_objects_stay_in_the_picture_and_apart():
    random = np.random.default_rng(0)
    for scene, size in itertools.product(itertools.islice(all_scenes(), 0, None, 29), IMAGE_SIZES):
        mask = np.abs(unit(render(scene, size, random))).max(axis=0) > 0.01
        assert len(components(mask)) == 2
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert not edge.any()


def test_held_out_combinations_are_in_no_training_picture(tmp_path):
    report = build_scenes(BuildOptions(out=tmp_path / "scenes"), 300, 32)
    assert report.samples == {"train": 270, "val": 30}
    config = DataConfig(path=str(tmp_path / "scenes"), global_batch=1)
    pictures = {}
    for split in ("train", "val"):
        (source,) = open_sources(config, str(tmp_path / "scenes"), split, seed=None)
        places = type("Places", (), {"epoch": None, "sample": np.arange(len(source.order))})
        fields = with_unit_range(source.fields(source.rows(places), places))
        texts = [bytes(row[row < 256].astype(np.uint8)).decode() for row in fields["caption"].numpy()]
        assert all(one.aligned and one.size for one in captions_agree(fields["image"].numpy(), texts))
        pictures[split] = {parse_caption(text).canonical() for text in texts}
    assert all(held_out(scene, 0.1) for scene in pictures["val"])
    assert not pictures["train"] & pictures["val"]
    assert {held_out(scene, 0.1) == held_out(scene.reworded(), 0.1) for scene in all_scenes()} == {True}
    assert all(OPPOSITES[OPPOSITES[relation]] == relation for relation in OPPOSITES)


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="scenes of 20 pixels"):
        build_scenes(BuildOptions(out=tmp_path / "scenes"), 100, 20)
    with pytest.raises(ValueError, match="'a tall tree'"):
        captions_agree(np.zeros((1, 3, 16, 16)), ["a tall tree"])
