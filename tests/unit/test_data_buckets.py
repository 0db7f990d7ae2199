"""Sizes and captions in the index, and what is made of them: subsets, batches of one aspect ratio each."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sixfold_data.build import BuildOptions
from sixfold_data.build_images import build_image_text
from sixfold_data.index import MANIFEST_NAME, Manifest, open_split, read_manifest
from sixfold_data.indexing import index_shards
from sixfold_data.store import open_store
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
