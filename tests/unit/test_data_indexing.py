"""Indexing tars that others made: webdataset's own writer, odd names, odd orders, damage."""

import gzip
import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from sixfold.errors import DataError
from sixfold_data.build import BuildOptions
from sixfold_data.build_text import build_text
from sixfold_data.index import open_split, read_manifest
from sixfold_data.indexing import index_shards, split_of
from sixfold_data.store import open_store
from sixfold_data.verify import verify


def png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def index_of(folder, split="train"):
    store = open_store(str(folder))
    return store, open_split(store, read_manifest(store), split)


def member(folder, sample, extension, split="train"):
    store, index = index_of(folder, split)
    place = index.members[extension]
    shard = index.shards[int(index.shard_of(np.asarray(sample)))].path
    return store.read(shard, int(place.offset[sample]), int(place.length[sample]))


def test_shards_of_webdatasets_writer(tmp_path):
    for split, count in (("train", 25), ("val", 6)):
        (tmp_path / split).mkdir()
        with webdataset.ShardWriter(str(tmp_path / split / "%04d.tar"), maxcount=10, verbose=0) as sink:
            for number in range(count):
                sink.write({"__key__": f"s{number:03d}", "png": png(number), "cls": number % 3, "meta.json": b"{}"})
    report = index_shards(open_store(str(tmp_path)))
    assert report.samples == {"train": 25, "val": 6}
    assert report.shards == {"train": 3, "val": 1}
    assert (report.kind, report.classes, report.remarks) == ("images", ("0", "1", "2"), ())
    _, index = index_of(tmp_path)
    assert index.label.tolist() == [number % 3 for number in range(25)]
    assert [member(tmp_path, number, "png") for number in range(25)] == [png(number) for number in range(25)]
    assert member(tmp_path, 3, "meta.json") == b"{}"
    assert verify(open_store(str(tmp_path))).faults == []
    assert index_shards(open_store(str(tmp_path))).fingerprint == report.fingerprint


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_that_are_apart_long_or_twice(tmp_path, form):
    long = "d" * 80 + "/" + "k" * 90
    members = [
        ("./a/x.png", png(1)),
        (f"{long}.png", png(2)),
        ("./a/x.CLS", b"1"),
        (f"{long}.cls", b"0"),
        ("./a/x.png", png(3)),
    ]
    write_tar(tmp_path / "train-0.tar", [*members, ("README", b"hello"), ("other.json", b"{}")], format=form)
    write_tar(tmp_path / "val-0.tar", [("v.seg.png", png(5)), ("v.png", png(4)), ("v.cls", b"1")], format=form)
    report = index_shards(open_store(str(tmp_path)), classes=("zero", "one"))
    _, index = index_of(tmp_path)
    assert [index.key(sample) for sample in range(len(index))] == ["./a/x", long]
    assert index.label.tolist() == [1, 0]
    assert [member(tmp_path, sample, "png") for sample in (0, 1)] == [png(1), png(2)]
    assert member(tmp_path, 0, "png", "val") == png(4)
    assert member(tmp_path, 0, "seg.png", "val") == png(5)
    assert [fault.what.partition(" ")[0] for fault in report.remarks] == ["'./a/x.png'", "'README'", "'other'"]
    assert verify(open_store(str(tmp_path))).faults == []


def test_splits_by_name_and_by_pattern(tmp_path):
    names = ["imagenet/val/00.tar", "valid-3.tar", "train_01.tar", "cc3m-train-00.tar", "part-7.tar", "test/x.tar"]
    assert [split_of(name) for name in names] == ["val", "val", "train", "train", "train", "test"]
    for number in range(4):
        write_tar(tmp_path / f"part-{number}.tar", [(f"{number}.png", png(number))])
    report = index_shards(open_store(str(tmp_path)), splits={"val": "part-0.tar", "train": "part-[12].tar"})
    assert report.samples == {"val": 1, "train": 2}
    with pytest.raises(DataError, match="no tar matches 'none'"):
        index_shards(open_store(str(tmp_path)), splits={"val": "none"})


def test_a_text_set_is_indexed_again_with_its_tokenizer(tmp_path):
    (tmp_path / "in.txt").write_text("abcabc" * 100)
    built = build_text(tmp_path / "in.txt", BuildOptions(out=tmp_path / "out"), "characters")
    report = index_shards(open_store(str(tmp_path / "out")))
    assert report.fingerprint == built.fingerprint == report.replaced_fingerprint
    store, index = index_of(tmp_path / "out")
    assert read_manifest(store).tokenizer == {"type": "characters", "characters": "abc"}
    assert index.entry.tokens == built.tokens["train"]


def test_all_faults_of_all_shards_are_named_at_once(tmp_path):
    good = [("a.png", png()), ("a.cls", b"1")]
    write_tar(tmp_path / "train-0.tar", good)
    whole = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(whole[:700])
    (tmp_path / "train-2.tar").write_bytes(whole[:2048])
    (tmp_path / "train-3.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "train-4.tar.gz").write_bytes(gzip.compress(whole))
    write_tar(tmp_path / "train-5.tar", [("b.png", b"broken"), ("c.png", png()), ("c.cls", b"-3")])
    with pytest.raises(DataError) as caught:
        index_shards(open_store(str(tmp_path)))
    text = str(caught.value)
    assert len(caught.value.faults) == 6
    for place, what in (
        ("train-1.tar", "truncated"),
        ("train-2.tar", "truncated"),
        ("train-3.tar", "not a tar file"),
        ("train-4.tar.gz", "gunzip"),
        ("train-5.tar: b", "not a readable image"),
        ("train-5.tar: c", "label '-3'"),
    ):
        assert any(place in str(fault) and what in str(fault) for fault in caught.value.faults), text
    assert not (tmp_path / "dataset.json").exists()


def test_labels_by_name_and_out_of_range(tmp_path):
    write_tar(tmp_path / "train.tar", [("a.png", png()), ("a.cls", b"dog"), ("b.png", png()), ("b.cls", b"0")])
    index_shards(open_store(str(tmp_path)), classes=("cat", "dog"))
    assert index_of(tmp_path)[1].label.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"train\.tar: a: the label 'dog'.*--classes"):
        index_shards(open_store(str(tmp_path)))
    write_tar(tmp_path / "x" / "train.tar", [("a.txt", b"plain")])
    with pytest.raises(DataError, match="no sample holds an image"):
        index_shards(open_store(str(tmp_path / "x")))
