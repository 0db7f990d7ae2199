"""Building data sets from files: what is in them, that two builds are the same bytes, and what is left on failure."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from sixfold.errors import DataError, EnvironmentFault
from sixfold_data.build import BuildOptions, KeyMaker, assign_splits
from sixfold_data.build_images import build_image_text, build_images
from sixfold_data.build_text import build_text
from sixfold_data.contact_sheet import draw_grid
from sixfold_data.demo import build_digits, build_stdlib
from sixfold_data.index import open_split, read_manifest
from sixfold_data.inspect import read_pictures, read_texts, summarise
from sixfold_data.store import open_store
from sixfold_data.tokenizers import STORAGE_DTYPES, make_tokenizer
from sixfold_data.verify import verify


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def samples(folder, split):
    """All members of a split, by key and extension, read at the offsets of the index."""
    store = open_store(str(folder))
    index = open_split(store, read_manifest(store), split)
    found = {}
    for number in range(len(index)):
        shard = index.shards[int(index.shard_of(np.asarray(number)))].path
        found[index.key(number)] = {
            extension: store.read(shard, int(member.offset[number]), int(member.length[number]))
            for extension, member in index.members.items()
            if member.length[number] >= 0
        }
    return found


def documents(folder, split):
    store = open_store(str(folder))
    tokenizer = make_tokenizer(read_manifest(store).tokenizer, store)
    found = {}
    for key, members in samples(folder, split).items():
        ((extension, data),) = members.items()
        tokens = np.frombuffer(data, dtype=STORAGE_DTYPES[extension])
        assert tokens[-1] == tokenizer.end_of_text
        assert not np.any(tokens[:-1] == tokenizer.end_of_text)
        found[key] = tokenizer.decode(tokens)
    return found


def save(path, seed, size=(6, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def photos(tmp_path):
    for number in range(30):
        save(tmp_path / "photos" / ("cat" if number % 3 else "dog") / f"p.{number}.png", number)
    return tmp_path / "photos"


# Text


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_a_single_text_is_cut_at_a_character(tmp_path, tokenizer):
    text = "To be, or nöt to be:\r\nthat is the question. " * 50
    (tmp_path / "play.txt").write_bytes(text.encode())
    report = build_text(tmp_path / "play.txt", BuildOptions(out=tmp_path / "out"), tokenizer)
    cut = int(0.9 * len(text))
    assert documents(tmp_path / "out", "train") == {"play-train": text[:cut]}
    assert documents(tmp_path / "out", "val") == {"play-val": text[cut:]}
    expected = len(text[:cut].encode() if tokenizer == "bytes" else text[:cut]) + 1
    assert report.tokens["train"] == expected
    assert verify(open_store(str(tmp_path / "out"))).faults == []


def test_a_folder_gives_a_document_a_file_and_names_what_is_no_text(tmp_path):
    source = tmp_path / "texts"
    for number in range(40):
        (source / f"{number % 4}").mkdir(parents=True, exist_ok=True)
        (source / f"{number % 4}" / f"{number}.md").write_text(f"document {number}\n")
    (source / "empty.txt").touch()
    (source / ".hidden").write_text("no")
    (source / "latin.txt").write_bytes("café".encode("latin-1"))
    (source / "picture.bin").write_bytes(b"\0\1\2")
    report = build_text(source, BuildOptions(out=tmp_path / "out"))
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted((train | val).values()) == sorted(f"document {number}\n" for number in range(40))
    assert len(val) == report.samples["val"] > 0
    assert {fault.where: fault.what for fault in report.unreadable} == {
        "latin.txt": "not UTF-8 at byte 3 (unexpected end of data)",
        "picture.bin": "a zero byte at 0: this is not text",
    }
    assert report.remarks == ("empty.txt: the file is empty and makes no document",)


def test_splits_depend_on_the_name_alone():
    names = [f"{number}.txt" for number in range(2000)]
    splits = dict(zip(names, assign_splits(names, 0.1), strict=True))
    assert 150 < list(splits.values()).count("val") < 250
    fewer = names[::3]
    assert assign_splits(fewer, 0.1) == [splits[name] for name in fewer]
    assert sorted(assign_splits(["a", "b"], 0.001)) == ["train", "val"]
    assert sorted(assign_splits(["a", "b"], 0.999)) == ["train", "val"]
    assert assign_splits(["a", "b"], 0.0) == ["train", "train"]


# Images


def test_class_folders_become_labels_and_bytes_are_kept(tmp_path, photos):
    report = build_images(photos, BuildOptions(out=tmp_path / "out"))
    built = samples(tmp_path / "out", "train") | samples(tmp_path / "out", "val")
    assert report.classes == ("cat", "dog")
    for file in photos.rglob("*.png"):
        key = f"{file.parent.name}/{file.stem.replace('.', '_')}"
        assert built[key] == {"png": file.read_bytes(), "cls": b"0" if file.parent.name == "cat" else b"1"}
    manifest = read_manifest(open_store(str(tmp_path / "out")))
    assert (manifest.image_size, manifest.channels, manifest.kind) == ((6, 5), 3, "images")
    summary = summarise(open_store(str(tmp_path / "out")), manifest)
    assert sum(split.labels["dog"] for split in summary.splits.values()) == 10


def test_two_builds_are_the_same_bytes(tmp_path, photos):
    for out in ("one", "two"):
        build_images(photos, BuildOptions(out=tmp_path / out, shard_bytes=9000))
        for file in photos.rglob("*.png"):
            os.utime(file, (1, 1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one" / "train").glob("*.tar"))) > 2


def test_images_are_cropped_resized_and_converted(tmp_path):
    save(tmp_path / "in" / "wide.bmp", 0, size=(8, 32))
    save(tmp_path / "in" / "grey.png", 1, size=(20, 10), mode="L")
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    Image.fromarray(deep).save(tmp_path / "in" / "deep.png")
    build_images(tmp_path / "in", BuildOptions(out=tmp_path / "out", val_fraction=0.0), image_size=4)
    built = {key: Image.open(io.BytesIO(members["png"])) for key, members in samples(tmp_path / "out", "train").items()}
    assert {key: (image.size, image.mode) for key, image in built.items()} == {
        "wide": ((4, 4), "RGB"),
        "grey": ((4, 4), "L"),
        "deep": ((4, 4), "L"),
    }
    assert np.array_equal(np.asarray(built["deep"]), (deep >> 8).astype(np.uint8))


def test_folders_called_train_and_val_are_the_splits(tmp_path):
    for number in range(6):
        save(tmp_path / "in" / ("val" if number == 4 else "train") / f"class{number % 2}" / f"{number}.jpg", number)
    report = build_images(tmp_path / "in", BuildOptions(out=tmp_path / "out"))
    assert report.samples == {"train": 5, "val": 1}
    assert report.classes == ("class0", "class1")
    assert set(samples(tmp_path / "out", "val")) == {"val/class0/4"}


def test_captions_stand_beside_images(tmp_path):
    for number in range(8):
        save(tmp_path / "in" / f"{number}.jpg", number)
        if number:
            (tmp_path / "in" / f"{number}.txt").write_text(f" a photo of {number}\n")
    report = build_image_text(tmp_path / "in", BuildOptions(out=tmp_path / "out"))
    built = samples(tmp_path / "out", "train") | samples(tmp_path / "out", "val")
    assert {key: members["txt"].decode() for key, members in built.items()} == {
        str(number): f"a photo of {number}" for number in range(1, 8)
    }
    assert [fault.what for fault in report.unreadable] == ["it has no caption (0.txt)"]
    store = open_store(str(tmp_path / "out"))
    titles = {picture.title for picture in read_pictures(store, read_manifest(store), "train", 20)}
    assert titles <= {f"a photo of {number}" for number in range(1, 8)}


def test_pictures_of_other_formats_are_read_or_named(tmp_path):
    for number in range(4):
        save(tmp_path / "in" / f"{number}.avif", number)
    (tmp_path / "in" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "in" / "notes.md").write_text("mine")
    report = build_images(tmp_path / "in", BuildOptions(out=tmp_path / "out", val_fraction=0.0, corrupt_budget=1))
    assert report.samples == {"train": 4}
    ((where, what),) = [(Path(fault.where).name, fault.what) for fault in report.unreadable]
    assert where == "phone.HEIC"
    assert "convert it" in what
    assert report.remarks == (f"{tmp_path}/in/notes.md: no image by its name, left out",)
    with pytest.raises(DataError, match=r"phone\.HEIC"):
        build_images(tmp_path / "in", BuildOptions(out=tmp_path / "strict", val_fraction=0.0, corrupt_budget=0))


def test_a_caption_without_an_image_is_named_and_counted(tmp_path):
    for number in range(6):
        save(tmp_path / "in" / f"{number}.png", number)
        (tmp_path / "in" / f"{number}.txt").write_text("a photo")
    (tmp_path / "in" / "lost.txt").write_text("of what?")
    report = build_image_text(tmp_path / "in", BuildOptions(out=tmp_path / "out"))
    assert [(Path(fault.where).name, fault.what) for fault in report.unreadable] == [
        ("lost.txt", "a caption without an image beside it")
    ]
    with pytest.raises(DataError, match=r"lost\.txt"):
        build_image_text(tmp_path / "in", BuildOptions(out=tmp_path / "strict", corrupt_budget=0))


def test_keys_have_no_dots_and_are_taken_once():
    keys = KeyMaker()
    assert [keys.key(name) for name in ("a.b/x.y.png", "a.b/x.y.jpg", "x", "x.txt")] == [
        "a.b/x_y",
        "a.b/x_y-2",
        "x",
        "x-2",
    ]


def test_unreadable_images_are_named_within_the_budget_and_end_the_build_beyond_it(tmp_path, photos):
    whole = (photos / "cat" / "p.1.png").read_bytes()
    (photos / "cat" / "cut.png").write_bytes(whole[:60])
    (photos / "dog" / "text.jpg").write_text("not an image")
    report = build_images(photos, BuildOptions(out=tmp_path / "out", corrupt_budget=2))
    assert sum(report.samples.values()) == 30
    assert {fault.where.rpartition("/")[2] for fault in report.unreadable} == {"cut.png", "text.jpg"}
    with pytest.raises(DataError, match=r"2 files could not be read.*budget of 1[\s\S]*cut\.png[\s\S]*text\.jpg"):
        build_images(photos, BuildOptions(out=tmp_path / "again", corrupt_budget=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_nothing_is_overwritten_and_an_empty_folder_is_welcome(tmp_path, photos):
    (tmp_path / "out").mkdir()
    build_images(photos, BuildOptions(out=tmp_path / "out"))
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="nothing is overwritten"):
        build_images(photos, BuildOptions(out=tmp_path / "out"))
    assert contents(tmp_path / "out") == before


def test_the_current_folder_is_refused_and_a_folder_in_it_is_not(tmp_path, photos, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="current folder"):
        build_images(photos, BuildOptions(out=Path()))
    build_images(photos, BuildOptions(out=Path("sub/../new")))
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["new"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_build_that_is_interrupted_leaves_nothing(tmp_path, photos, failure):
    def interrupt(done, total):
        if done == 20:
            raise failure

    with pytest.raises(failure):
        build_images(photos, BuildOptions(out=tmp_path / "out", progress=interrupt))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_place_that_cannot_be_written_is_the_environments_fault(photos):
    with pytest.raises(EnvironmentFault, match="could not be written"):
        build_images(photos, BuildOptions(out=Path("/proc/sixfold-data")))


# The tars themselves


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its shards to the collector
def test_shards_are_plain_webdataset(tmp_path, photos):
    build_images(photos, BuildOptions(out=tmp_path / "out"))
    shard = tmp_path / "out" / "train" / "shard-000000.tar"
    read = {s["__key__"]: s for s in webdataset.WebDataset(str(shard), shardshuffle=False)}
    ours = samples(tmp_path / "out", "train")
    assert {key: {"png": s["png"], "cls": s["cls"]} for key, s in read.items()} == ours
    with tarfile.open(shard) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_the_index_measures_members_whose_names_need_long_headers(tmp_path):
    for number in range(3):
        save(tmp_path / "in" / ("d" * 120) / f"{'n' * 90}é{number}.png", number)
    build_images(tmp_path / "in", BuildOptions(out=tmp_path / "out", val_fraction=0.0))
    built = samples(tmp_path / "out", "train")
    assert {members["png"] for members in built.values()} == {
        file.read_bytes() for file in (tmp_path / "in").rglob("*.png")
    }


# Demo data


def test_digits_give_back_their_sixteen_levels(tmp_path):
    from sklearn.datasets import load_digits

    report = build_digits(BuildOptions(out=tmp_path / "digits"))
    assert report.samples == {"train": 1437, "val": 360}
    original = load_digits()
    seen = set()
    for split in ("train", "val"):
        for key, members in samples(tmp_path / "digits", split).items():
            number = int(key.removeprefix("digit-"))
            stored = np.asarray(Image.open(io.BytesIO(members["png"])))
            assert np.array_equal(np.round(stored * (16 / 255)), original.images[number])
            assert int(members["cls"]) == original.target[number]
            seen.add(number)
    assert len(seen) == 1797
    store = open_store(str(tmp_path / "digits"))
    grid = draw_grid(read_pictures(store, read_manifest(store), "val", 10), columns=4)
    assert grid.width == 4 * 52


def test_the_standard_library_is_capped_and_has_no_tests(tmp_path):
    report = build_stdlib(BuildOptions(out=tmp_path / "one"), max_bytes=300_000)
    build_stdlib(BuildOptions(out=tmp_path / "two"), max_bytes=300_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert 150_000 < sum(report.tokens.values()) <= 300_100
    built = documents(tmp_path / "one", "train") | documents(tmp_path / "one", "val")
    assert not any("test/" in key or "site-packages" in key for key in built)
    store = open_store(str(tmp_path / "one"))
    excerpts = read_texts(store, read_manifest(store), "train", 4, 100)
    assert len({excerpt.key for excerpt in excerpts}) == 4
    assert all(built[excerpt.key].startswith(excerpt.text) for excerpt in excerpts)
    assert max(len(excerpt.text) for excerpt in excerpts) == 100


def test_a_stray_image_costs_the_labels_aloud_and_bad_files_are_named(tmp_path):
    for name in ("cat/0", "cat/1", "dog/0", "dog/1", "stray"):
        save(tmp_path / f"photos/{name}.png", 0)
    (tmp_path / "photos/cat/link.png").symlink_to("nowhere.png")
    (tmp_path / "photos/cat/none.png").touch()
    (tmp_path / "photos/dog/words.png").write_text("words")
    report = build_images(tmp_path / "photos", BuildOptions(out=tmp_path / "out"))
    assert report.classes == ()
    assert [remark.partition(": ")[0] for remark in report.remarks] == ["no labels"]
    assert str(tmp_path / "photos/stray.png") in report.remarks[0]
    reasons = {Path(fault.where).name: fault.what for fault in report.unreadable}
    assert reasons.keys() == {"link.png", "none.png", "words.png"}
    assert (reasons["none.png"], reasons["words.png"]) == ("the file is empty", "not an image")

    (tmp_path / "photos/stray.png").unlink()
    labelled = build_images(tmp_path / "photos", BuildOptions(out=tmp_path / "labelled"))
    assert (labelled.classes, labelled.remarks) == (("cat", "dog"), ())
