"""Sizes and captions in the index, and what is made of them: subsets, batches of one aspect ratio each."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_sets import make_mixed_images, shades_of
from sixfold.errors import DataError
from sixfold.recipe.load import load_recipe
from sixfold_data.buckets import nearest_buckets
from sixfold_data.build import BuildOptions
from sixfold_data.build_images import build_image_text
from sixfold_data.config import BucketsConfig, DataConfig, FilterConfig
from sixfold_data.describe import describe
from sixfold_data.evaluation import EvaluationReader
from sixfold_data.index import MANIFEST_NAME, Manifest, open_split, read_manifest
from sixfold_data.indexing import index_shards
from sixfold_data.store import open_store
from sixfold_data.stream import TrainStream
from sixfold_data.verify import verify

CAPTIONS = ["", "a cat", "ein Übermaß an Text"]


def index_of(root: Path, split: str = "train"):
    store = open_store(str(root))
    return open_split(store, read_manifest(store), split)


@pytest.fixture
def built(tmp_path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (10 + number, 20 - number)).save(pictures / f"p{number}.png")
        (pictures / f"p{number}.txt").write_text(caption)
    build_image_text(pictures, BuildOptions(out=tmp_path / "built", val_fraction=0.0))
    return tmp_path / "built"


def test_the_index_has_sizes_and_lengths_of_captions(built):
    index = index_of(built)
    assert index.height.tolist() == [20, 19, 18]
    assert index.width.tolist() == [10, 11, 12]
    assert index.caption_bytes.tolist() == [len(caption.encode()) for caption in CAPTIONS]
    fingerprint = read_manifest(open_store(str(built))).fingerprint
    assert index_shards(open_store(str(built))).fingerprint == fingerprint
    column = built / "train" / "index" / "height.npy"
    np.save(column, np.load(column) + 1)
    assert any(
        "the image is 20x10, the index says 21x10" in fault.what for fault in verify(open_store(str(built))).faults
    )
    manifest = json.loads((built / MANIFEST_NAME).read_text())
    manifest["splits"]["train"]["columns"]["height"]["sha256"] = "0" * 64
    assert Manifest.model_validate_json(json.dumps(manifest)).computed_fingerprint() != fingerprint


def as_version_1(root: Path) -> None:
    """Turn an index into one of the former version, which knows no sizes."""
    manifest = json.loads((root / MANIFEST_NAME).read_text()) | {"format": "sixfold-data/1"}
    for split in manifest["splits"].values():
        del split["columns"]["height"], split["columns"]["width"]
    (root / MANIFEST_NAME).write_bytes(Manifest.model_validate_json(json.dumps(manifest)).sealed().to_bytes())


def test_an_index_of_the_former_version_is_read(built):
    as_version_1(built)
    assert index_of(built).height is None
    assert len(index_of(built)) == 3


def open_stream(config: DataConfig, *, rank=0, world_size=1, start=0) -> TrainStream:
    return TrainStream(config, seed=3, rank=rank, world_size=world_size, start_samples=start, quarantine_path=None)


def take(config: DataConfig, steps: int, **share) -> list:
    stream = open_stream(config, **share)
    batches = list(itertools.islice(stream, steps))
    stream.close()
    return batches


def shades(batches) -> list[list[int]]:
    return [shades_of(batch["image"]) for batch in batches]


SIZES = [((8, 16), (16, 8), (12, 12), (9, 16), (40, 10), (16, 30))[number % 6] for number in range(124)]
"""Heights and widths: half are nearest to a height of 8 and a width of 16, a third to 16 and 8, a sixth to squares."""
BUCKETS = BucketsConfig(sizes=((8, 8), (16, 8), (8, 16)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    captions = ["x" * (number % 7) for number in range(len(SIZES))]
    return make_mixed_images(tmp_path_factory.mktemp("mixed") / "set", SIZES, captions=captions)


def bucketed(root: Path, **changes) -> DataConfig:
    settings = {"path": str(root), "global_batch": 4, "lanes": 4, "buckets": BUCKETS, "shuffle_block_shards": 2}
    return DataConfig(**settings | changes)


def expected_shape(number: int) -> tuple[int, int]:
    height, width = SIZES[number]
    number = nearest_buckets(np.asarray([height]), np.asarray([width]), BUCKETS.shapes)[0]
    return BUCKETS.shapes[int(number)]


def test_every_batch_is_of_one_bucket_and_buckets_share_batches_by_their_samples(mixed):
    batches = take(bucketed(mixed), 120)
    for batch in batches:
        assert {expected_shape(number) for number in shades_of(batch["image"])} == {tuple(batch["image"].shape[2:])}
    counts = Counter(tuple(batch["image"].shape[2:]) for batch in batches)
    assert counts == {(8, 8): 20, (8, 16): 60, (16, 8): 40}
    # 120 batches of 4 are 480 of 120 samples: each exactly four times, whatever its bucket.
    assert set(Counter(itertools.chain.from_iterable(shades(batches))).values()) == {4}
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(480))


def test_buckets_resume_anywhere_and_are_shared_by_ranks(mixed):
    config = bucketed(mixed)
    whole = shades(take(config, 30))
    for steps in (1, 13):
        assert shades(take(config, 30 - steps, start=4 * steps)) == whole[steps:]
    for world_size in (2, 4):
        parts = [shades(take(config, 30, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == whole


def test_what_lanes_cannot_share_is_left_out_and_counted(mixed, caplog):
    config = bucketed(mixed, global_batch=28, lanes=28)
    batches = take(config, 88)
    assert "20 of 120 samples are never read" in caplog.text
    counts = Counter(itertools.chain.from_iterable(shades(batches)))
    assert {expected_shape(number) for number in counts} == {(8, 16), (16, 8)}
    with pytest.raises(DataError, match="60 samples in its largest bucket, fewer than 64 lanes"):
        open_stream(bucketed(mixed, global_batch=64, lanes=64))


def test_a_filter_chooses_a_subset_for_training_and_evaluation(mixed):
    chosen = FilterConfig(max_aspect_ratio=2.0, min_height=9, min_caption_bytes=2)
    config = bucketed(mixed, buckets=None, image_size=8, filter=chosen, lanes=1, global_batch=1)
    kept = [n for n, (height, width) in enumerate(SIZES) if (height, width) != (40, 10) and height >= 9 and n % 7 >= 2]
    train = [number for number in kept if number < 120]
    assert describe(config).samples == {"train": len(train), "val": len(kept) - len(train)}
    epochs = [list(itertools.chain(*shades(take(config, len(train), start=start)))) for start in (0, len(train))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == train
    assert epochs[0] != epochs[1]
    held_out = [number for batch in EvaluationReader(config, batch=3) for number in shades_of(batch["image"])]
    assert held_out == [number for number in kept if number >= 120]
    other = open_stream(config.model_copy(update={"filter": None}))
    with pytest.raises(DataError, match=r"was min_height=9, max_aspect_ratio=2\.0, min_caption_bytes=2, is none"):
        other.check_state(open_stream(config).state())
    with pytest.raises(DataError, match="filter was none, is min_height=9"):
        open_stream(config).check_state(other.state())
    with pytest.raises(DataError, match="leaves none of the 120 samples"):
        open_stream(config.model_copy(update={"filter": FilterConfig(min_width=500)}))


def test_damage_is_replaced_within_the_bucket(mixed, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(mixed, root)
    offsets = index_of(root).members["png"].offset
    shard = bytearray((root / "train" / "shard-000000.tar").read_bytes())
    shard[int(offsets[0]) + 30] ^= 0xFF
    (root / "train" / "shard-000000.tar").write_bytes(shard)
    stream = open_stream(bucketed(root))
    batches = list(itertools.islice(stream, 120))
    assert stream.corrupt_count == 1
    for batch in batches:
        assert {expected_shape(number) for number in shades_of(batch["image"])} == {tuple(batch["image"].shape[2:])}


@pytest.mark.parametrize(("world_size", "limit"), [(1, None), (2, None), (2, 60)])
def test_evaluation_reads_bucket_by_bucket_and_shares_each(mixed, world_size, limit):
    config = bucketed(mixed)
    readers = [
        EvaluationReader(config, split="train", batch=7, rank=rank, world_size=world_size, limit=limit)
        for rank in range(world_size)
    ]
    ranks = [list(reader) for reader in readers]
    assert {len(batches) for batches in ranks} == {len(readers[0])}
    for batches in zip(*ranks, strict=True):
        assert len({batch["image"].shape[2:] for batch in batches}) == 1
    together = [batch for batches in ranks for batch in batches]
    positions = torch.cat([batch.positions for batch in together])
    assert sorted(positions.tolist()) == list(range(limit or 120))
    seen = [number for batch in together for number in shades_of(batch["image"])]
    assert len(set(seen)) == len(seen)
    share = Counter(expected_shape(number) for number in seen)
    assert share == {(8, 8): len(seen) // 6, (8, 16): len(seen) // 2, (16, 8): len(seen) // 3}
    assert len(readers[0].first()) == 1


def test_checkpoints_of_other_buckets_are_refused(mixed):
    stream = open_stream(bucketed(mixed))
    for change in ({"global_batch": 8}, {"buckets": BucketsConfig(sizes=((8, 8), (16, 8)))}):
        with pytest.raises(DataError, match=next(iter(change))):
            open_stream(bucketed(mixed, **change)).check_state(stream.state())
    with pytest.raises(DataError, match="not whole batches of 8"):
        open_stream(bucketed(mixed, global_batch=8), start=4)


def test_an_old_index_or_one_without_captions_is_told_what_to_do(built, tmp_path):
    as_version_1(built)
    for settings in ({"buckets": BUCKETS}, {"filter": FilterConfig(min_width=3)}):
        with pytest.raises(DataError, match="index the shards again with `sixfold data index`"):
            open_stream(DataConfig(path=str(built), global_batch=1, **settings))
    plain = make_mixed_images(tmp_path / "plain", [(4, 4)] * 6)
    with pytest.raises(DataError, match="have no captions"):
        open_stream(DataConfig(path=str(plain), global_batch=1, filter=FilterConfig(max_caption_bytes=3)))


def test_sizes_follow_from_an_area():
    """Those of SDXL (2307.01952, appendix I) between 1:2 and 2:1 are among them."""
    shapes = BucketsConfig(area=1024**2, step=64).shapes
    assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (704, 1408)} <= set(shapes)
    assert {(width, height) for height, width in shapes} == set(shapes)
    assert all(h * w <= 1024**2 and max(h, w) <= 2 * min(h, w) and h % 64 == w % 64 == 0 for h, w in shapes)
    with pytest.raises(ValueError, match="different aspect ratios"):
        BucketsConfig(sizes=((8, 8), (16, 16)))


def test_the_full_size_recipes_buckets_fit_its_network_and_are_what_the_command_makes():
    recipe = load_recipe("flow/mmdit-2b").recipe
    cells, network = recipe.data.buckets.shapes, recipe.networks["denoiser"]
    assert len(cells) == 13
    assert all(side % network.patch_size == 0 and side <= network.largest_side for shape in cells for side in shape)
    pixels = BucketsConfig(area=65536, step=16).shapes
    assert cells == tuple((height // 8, width // 8) for height, width in pixels)
