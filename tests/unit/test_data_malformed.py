"""Malformed data sets: the command answers each with one screen that names fault, place and fix, and exit code 2."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from sixfold.cli.main import main
from sixfold_data.build import BuildOptions
from sixfold_data.build_images import build_images
from sixfold_data.build_text import build_text
from sixfold_data.index import Manifest

LINES_OF_A_SCREEN = 45


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a sound image data set, a sound text data set, and a folder of photos."""
    root = tmp_path_factory.mktemp("whole")
    for number in range(24):
        folder = root / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    build_images(root / "photos", BuildOptions(out=root / "images"))
    (root / "text.txt").write_text("some words " * 300)
    build_text(root / "text.txt", BuildOptions(out=root / "text"))
    return root


@pytest.fixture
def data(whole, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def command(capfd, monkeypatch):
    """Run the command and return (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sixfold", *map(str, arguments)])
        code = main()
        return code, *capfd.readouterr()

    return run


def assert_one_screen(result, *parts):
    """Exit code 2, no traceback, and a screen with all the parts and a fix."""
    code, _, screen = result
    assert code == 2, screen
    assert "Traceback" not in screen
    assert len(screen.splitlines()) <= LINES_OF_A_SCREEN
    for part in (*parts, "fix:"):
        assert part in screen, screen


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(bytes(content))


def edit_manifest(folder, edit):
    """Change the manifest and seal it again, as somebody with a script would."""
    record = json.loads((folder / "dataset.json").read_text())
    edit(record)
    (folder / "dataset.json").write_bytes(Manifest.model_validate_json(json.dumps(record)).sealed().to_bytes())


def member_place(shard, suffix):
    """(name, offset of its data) of the first member with a suffix."""
    with tarfile.open(shard) as tar:
        member = next(member for member in tar if member.name.endswith(suffix))
        return member.name.removesuffix(suffix), member.offset_data


def test_the_sound_ones_pass(data, command):
    for name in ("images", "text"):
        code, out, _ = command("data", "verify", data / name)
        assert code == 0
        assert out.startswith("whole: ")


def test_no_index(data, command):
    (data / "images" / "dataset.json").unlink()
    for verb in ("verify", "inspect"):
        assert_one_screen(
            command("data", verb, data / "images"), "no indexed data set", "dataset.json", "sixfold data index"
        )


def test_an_index_of_an_unknown_version(data, command):
    manifest = data / "images" / "dataset.json"
    manifest.write_text(manifest.read_text().replace("sixfold-data/2", "sixfold-data/9"))
    assert_one_screen(
        command("data", "inspect", data / "images"), "dataset.json", "format", "allowed: format sixfold-data/2"
    )


def test_an_index_that_is_no_json(data, command):
    (data / "images" / "dataset.json").write_text('{"format": "sixfold-da')
    assert_one_screen(command("data", "verify", data / "images"), "dataset.json", "malformed")


def test_a_flipped_byte_in_the_manifest(data, command):
    manifest = data / "images" / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"cat"', '"cot"'))
    assert_one_screen(command("data", "verify", data / "images"), "dataset.json", "does not match its own fingerprint")


def test_a_flipped_byte_in_a_column(data, command):
    column = data / "images" / "train" / "index" / "offset.png.npy"
    flip(column, column.stat().st_size - 20)
    assert_one_screen(command("data", "verify", data / "images"), "train/index/offset.png.npy", "sha256 differs")


def test_a_column_that_is_missing_or_cut(data, command):
    column = data / "images" / "val" / "index" / "key_start.npy"
    column.write_bytes(column.read_bytes()[:-9])
    assert_one_screen(command("data", "inspect", data / "images"), "val/index/key_start.npy")
    column.unlink()
    assert_one_screen(command("data", "inspect", data / "images"), "val/index/key_start.npy", "no such file")


def test_a_truncated_shard(data, command):
    shard = data / "images" / "train" / "shard-000000.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2])
    assert_one_screen(
        command("data", "verify", data / "images"),
        f"train/shard-000000.tar: the shard has {size // 2} bytes",
        "truncated",
    )
    assert_one_screen(command("data", "index", data / "images"), "train/shard-000000.tar: the shard is truncated")


def test_a_shard_of_another_size(data, command):
    shard = data / "text" / "val" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert_one_screen(command("data", "verify", data / "text"), "val/shard-000000.tar", "the index says")


def test_a_flipped_byte_in_a_shard_names_the_sample(data, command):
    shard = data / "images" / "train" / "shard-000000.tar"
    key, offset = member_place(shard, ".png")
    flip(shard, offset + 40)
    screen = command("data", "verify", data / "images")
    assert_one_screen(screen, "sha256", f"train/shard-000000.tar: {key}: the checksum of its .png does not match")
    code, out, _ = command("data", "verify", data / "images", "--json")
    assert code == 2
    assert [fault["where"].rpartition(": ")[2] for fault in json.loads(out)["faults"]][1:] == [key]


def test_a_shard_that_is_missing(data, command):
    (data / "images" / "train" / "shard-000000.tar").unlink()
    assert_one_screen(command("data", "verify", data / "images"), "train/shard-000000.tar: there is no such file")
    assert_one_screen(
        command("data", "inspect", data / "text", "--split", "tset"), "no split 'tset'", "allowed: train, val"
    )


def test_no_val_split(data, command):
    edit_manifest(data / "images", lambda record: record["splits"].pop("val"))
    assert_one_screen(
        command("data", "verify", data / "images"), "dataset.json: there is no split 'val'", "--val-fraction"
    )


def test_a_label_out_of_range(data, command):
    edit_manifest(data / "images", lambda record: record.update(classes=["cat"]))
    assert_one_screen(
        command("data", "verify", data / "images"), "dog/", "the label 1 is out of range: there are 1 classes"
    )


def test_a_token_beyond_the_vocabulary(data, command):
    edit_manifest(data / "text", lambda record: record.update(tokenizer={"type": "characters", "characters": "abc"}))
    assert_one_screen(command("data", "verify", data / "text"), "text-train", "the vocabulary has 4")


def test_an_unknown_tokenizer(data, command):
    edit_manifest(data / "text", lambda record: record.update(tokenizer={"type": "klingon"}))
    for verb in ("inspect", "verify"):
        assert_one_screen(command("data", verb, data / "text"), "unknown tokenizer", "klingon")


def test_folders_with_nothing_in_them(data, command):
    (data / "empty").mkdir()
    assert_one_screen(command("data", "verify", data / "empty"), "no indexed data set")
    assert_one_screen(command("data", "index", data / "empty"), "no tar files here", "empty")
    assert_one_screen(command("data", "index", data / "absent"), "no such folder", "absent")
    for kind in ("text", "images", "image-text"):
        assert_one_screen(command("data", "build", kind, data / "empty", "--out", data / "out"), str(data / "empty"))
        assert_one_screen(command("data", "build", kind, data / "absent", "--out", data / "out"), str(data / "absent"))
    assert not (data / "out").exists()


def test_shards_that_are_no_tars(data, command):
    (data / "odd").mkdir()
    (data / "odd" / "a.tar").write_bytes(b"this is not a tar" * 100)
    (data / "odd" / "b.tar").write_bytes(gzip.compress(b"x" * 5000))
    (data / "odd" / "c.tar").touch()
    assert_one_screen(
        command("data", "index", data / "odd"), "a.tar: this is not a tar file", "b.tar", "gunzip", "c.tar"
    )


def test_too_many_unreadable_images(data, command):
    for number in range(5):
        (data / "photos" / "cat" / f"broken-{number}.png").write_bytes(b"\x89PNG no")
    assert_one_screen(
        command("data", "build", "images", data / "photos", "--out", data / "out", "--corrupt-budget", 4),
        "5 files could not be read",
        "budget of 4",
        "--corrupt-budget",
        "photos/cat/broken-4.png",
    )
    assert not list(data.glob("out*"))


def test_unreadable_foreign_images(data, command):
    (data / "odd").mkdir()
    with tarfile.open(data / "odd" / "train.tar", "w") as tar:
        info = tarfile.TarInfo("bad.png")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"nope"))
    assert_one_screen(command("data", "index", data / "odd"), "train.tar: bad: not a readable image")


def test_the_output_is_in_use(data, command):
    assert_one_screen(
        command("data", "build", "images", data / "photos", "--out", data / "images"),
        "not empty",
        "nothing is overwritten",
    )


def test_the_installed_command_prints_the_same_screen(data):
    (data / "images" / "dataset.json").unlink()
    ended = subprocess.run(
        [sys.executable, "-m", "sixfold.cli.main", "data", "verify", str(data / "images")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert_one_screen((ended.returncode, ended.stdout, ended.stderr), "no indexed data set")
