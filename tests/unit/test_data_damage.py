"""Damaged data sets: replaced within a budget, or refused with one clear error."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from data_sets import make_images, make_text, numbers_of, png
from sixfold.errors import DataError
from sixfold_data.build import BuildOptions, building
from sixfold_data.config import CorruptConfig, DataConfig
from sixfold_data.evaluation import EvaluationReader
from sixfold_data.index import open_split, read_manifest
from sixfold_data.store import open_store
from sixfold_data.stream import TrainStream
from sixfold_data.tokenizers import ByteTokenizer


def flip(
    root: Path, number: int, extension: str = "png", split: str = "train", *, mask: int = 0xFF, at: int | None = None
) -> None:
    """Flip the bits of ``mask`` in one byte of a member (its middle one), where it lies in its shard."""
    store = open_store(str(root))
    index = open_split(store, read_manifest(store), split)
    member = index.members[extension]
    shard = root / index.shard_path(number)
    content = bytearray(shard.read_bytes())
    content[int(member.offset[number]) + (int(member.length[number]) // 2 if at is None else at)] ^= mask
    shard.write_bytes(content)


def epoch(root: Path, log: Path | None = None, *, ranks: int = 1, workers: int = 0, **corrupt) -> tuple[list, int]:
    config = DataConfig.model_validate(
        {"path": str(root), "global_batch": 20, "lanes": 10, "workers": workers, "corrupt": corrupt}
    )
    parts, count = [], 0
    for rank in range(ranks):
        stream = TrainStream(config, seed=0, rank=rank, world_size=ranks, start_samples=0, quarantine_path=log)
        parts.append([numbers_of(batch["image"]) for batch in itertools.islice(stream, 5)])
        count += stream.corrupt_count
        stream.close()
    return [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)], count


def test_flipped_bytes_are_replaced_at_the_same_position_and_logged(tmp_path):
    root = make_images(tmp_path / "set")
    sound, _ = epoch(root)
    for number in (7, 42):
        flip(root, number)
    log = tmp_path / "run" / "quarantine.jsonl"
    damaged, count = epoch(root, log)
    assert count == 2
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["s000007", "s000042"]
    flat_sound, flat_damaged = (list(itertools.chain(*batches)) for batches in (sound, damaged))
    changed = [place for place, pair in enumerate(zip(flat_sound, flat_damaged, strict=True)) if len(set(pair)) > 1]
    assert sorted(flat_sound[place] for place in changed) == [7, 42]
    assert sorted(line["position"] for line in lines) == changed
    for line in lines:
        assert flat_damaged[line["position"]] == line["replaced_by"]
        assert "checksum of its .png" in line["reason"]
        assert line["shard"].startswith(f"{root}/train/shard-")
    assert epoch(root) == (damaged, 2), "replacements are a function of the position"
    assert epoch(root, ranks=2) == (damaged, 2), "on any number of ranks"
    assert epoch(root, workers=1) == (damaged, 2), "and of workers"


def test_a_sample_without_its_image_is_replaced(tmp_path):
    root = tmp_path / "set"
    with building(BuildOptions(out=root, val_fraction=0.0)) as work:
        for number in range(100):
            members = {"png": png(number)} if number != 3 else {"cls": b"0"}
            work.writers["train"].add(f"s{number:06d}", members)
        work.finish("images", image_size=(4, 4), channels=1)
    log = tmp_path / "quarantine.jsonl"
    batches, count = epoch(root, log)
    assert count == 1
    assert 3 not in itertools.chain(*batches)
    assert json.loads(log.read_text())["reason"].startswith("it has no member .png")


def test_the_budget_ends_the_run_with_one_clear_error(tmp_path):
    root = make_images(tmp_path / "set")
    for number in (7, 42, 77):
        flip(root, number)
    assert epoch(root, max_samples=3)[1] == 3
    assert epoch(root, max_samples=0, max_fraction=0.03)[1] == 3
    with pytest.raises(DataError) as raised:
        epoch(root, tmp_path / "quarantine.jsonl", max_samples=2)
    message = str(raised.value)
    for part in (
        "s0000",
        "shard-",
        "3 unreadable samples of 100 in split train",
        "allowed: 2",
        "data verify",
        "quarantine.jsonl",
    ):
        assert part in message
    assert raised.value.exit_code == 2


def open_numbered(root: Path, log: Path | None, *, start=0, rank=0, world_size=1, **corrupt) -> TrainStream:
    config = DataConfig.model_validate({"path": str(root), "global_batch": 20, "lanes": 10, "corrupt": corrupt})
    return TrainStream(config, seed=0, rank=rank, world_size=world_size, start_samples=start, quarantine_path=log)


def test_a_restart_goes_on_with_the_budget_and_the_log(tmp_path):
    root, log = make_images(tmp_path / "set"), tmp_path / "quarantine.jsonl"
    for number in (7, 42):
        flip(root, number)
    list(itertools.islice(open_numbered(root, log, max_samples=2), 5))
    written = log.read_text()
    again = open_numbered(root, log, max_samples=2)
    assert again.corrupt_count == 2, "before anything is read"
    list(itertools.islice(again, 5))
    assert again.corrupt_count == 2
    assert log.read_text() == written, "nothing is written down twice"
    flip(root, 77)
    for _ in range(2):  # nor does a restart let the sample pass that ended the attempt before
        with pytest.raises(DataError, match="3 unreadable samples"):
            list(itertools.islice(open_numbered(root, log, max_samples=2), 5))
    assert len(log.read_text().splitlines()) == 3


def test_the_budget_is_that_of_all_ranks_together(tmp_path):
    root, log = make_images(tmp_path / "set"), tmp_path / "quarantine.jsonl"
    halves = [
        {number for batch in itertools.islice(stream, 5) for number in numbers_of(batch["image"])}
        for stream in (open_numbered(root, None, rank=rank, world_size=2) for rank in range(2))
    ]
    for half in halves:
        flip(root, min(half))
    ranks = [open_numbered(root, log, rank=rank, world_size=2, max_samples=2) for rank in range(2)]
    for _ in range(5):
        for rank in ranks:
            next(rank)
    assert [rank.corrupt_count for rank in ranks] == [2, 2]
    log.unlink()
    strict = [open_numbered(root, log, rank=rank, world_size=2, max_samples=1) for rank in range(2)]
    list(itertools.islice(strict[0], 5))
    with pytest.raises(DataError, match="2 unreadable samples of 100"):
        list(itertools.islice(strict[1], 5))


def test_a_line_that_was_cut_short_does_not_hide_the_others(tmp_path):
    root, log = make_images(tmp_path / "set"), tmp_path / "quarantine.jsonl"
    flip(root, 7)
    list(itertools.islice(open_numbered(root, log), 5))
    whole = log.read_text()
    log.write_text(whole[:40] + "\n" + whole + whole[:40])
    assert open_numbered(root, log).corrupt_count == 1


def test_held_out_damage_is_logged_and_counted_apart_from_the_training_split(tmp_path):
    root, log = make_images(tmp_path / "set"), tmp_path / "quarantine.jsonl"
    flip(root, 7)
    flip(root, 3, split="val")
    stream = open_numbered(root, log)
    list(itertools.islice(stream, 5))
    config = DataConfig(path=str(root), global_batch=20)
    for _ in range(2):
        list(EvaluationReader(config, batch=5, quarantine_path=log))
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(entry["split"], entry["key"], entry["position"]) for entry in entries][1:] == [("val", "s000103", 3)]
    assert entries[0]["split"] == "train"
    assert {entry["fingerprint"] for entry in entries} == {stream.state()["fingerprint"]}
    assert stream.corrupt_count == 1
    unbending = config.model_copy(update={"corrupt": CorruptConfig(max_samples=0)})
    with pytest.raises(DataError, match="1 unreadable samples of 10 in split val"):
        list(EvaluationReader(unbending, batch=5, quarantine_path=log))


def test_a_hopeless_data_set_does_not_draw_forever(tmp_path):
    root = make_images(tmp_path / "set")
    for number in range(100):
        flip(root, number)
    with pytest.raises(DataError, match="nor 16 others"):
        epoch(root, max_samples=1000)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_shard_is_named(tmp_path, workers):
    root = make_images(tmp_path / "set")
    shard = root / "train" / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-000002\.tar: the object is not the one that was indexed"):
        epoch(root, workers=workers)


def test_a_missing_shard_is_named(tmp_path):
    root = make_images(tmp_path / "set")
    (root / "train" / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar"):
        epoch(root)


def text_epoch(root: Path, log: Path | None = None) -> tuple[np.ndarray, int]:
    """All sequences of one epoch of single-byte documents, in order, and how many documents could not be read."""
    config = DataConfig(path=str(root), global_batch=4, sequence_length=20)
    stream = TrainStream(config, seed=0, rank=0, world_size=1, start_samples=0, quarantine_path=log)
    rows = np.concatenate([batch["tokens"].numpy() for batch in itertools.islice(stream, 62)])
    return rows, stream.corrupt_count


def test_a_flipped_bit_of_text_is_found_although_it_stays_in_the_vocabulary(tmp_path):
    root = make_text(tmp_path / "text", [bytes([2 * number]) * 100 for number in range(50)])
    sound, _ = text_epoch(root)
    flip(root, 5, "u16", mask=0x01, at=60)  # its 31st token: 10 becomes 11, which no document holds
    log = tmp_path / "quarantine.jsonl"
    damaged, count = text_epoch(root, log)
    assert count == 1
    (line,) = (json.loads(line) for line in log.read_text().splitlines())
    assert line["key"] == "d000005"
    assert line["reason"] == "the checksum of its .u16 does not match the index"
    touched = (sound == 10).any(1)
    assert (damaged != sound).any(1)[touched].all(), "every sequence that needs the document is replaced"
    assert np.array_equal(damaged[~touched], sound[~touched]), "and no other"
    assert not np.isin(damaged, [10, 11]).any()


def test_a_long_document_is_checked_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("sixfold_data.members.CHECKED_AT_ONCE_BYTES", 64)
    root = make_text(tmp_path / "text", [bytes([2 * number]) * 100 for number in range(50)])
    assert text_epoch(root)[1] == 0
    flip(root, 5, "u16", mask=0x01, at=150)
    assert text_epoch(root)[1] == 1


def test_tokens_beyond_the_vocabulary_are_corrupt(tmp_path):
    root = tmp_path / "text"
    with building(BuildOptions(out=root, val_fraction=0.0)) as work:
        for number in range(50):
            tokens = np.append(np.full(100, 300 if number == 5 else number), 256).astype("<u2")
            work.writers["train"].add(f"d{number:06d}", {"u16": tokens.tobytes()}, tokens=len(tokens))
        work.finish("text", tokenizer=ByteTokenizer().description())
    rows, count = text_epoch(root)
    assert rows.max() <= 256
    assert count == 1


def edit_manifest(root: Path, edit) -> None:
    content = json.loads((root / "dataset.json").read_text())
    edit(content)
    (root / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "dataset.json").unlink(), "there is no indexed data set here"),
        (lambda root: (root / "dataset.json").write_text("{"), "malformed"),
        (lambda root: edit_manifest(root, lambda m: m.update(format="sixfold-data/9")), "format"),
        (lambda root: edit_manifest(root, lambda m: m.update(surprise=1)), "surprise"),
        (lambda root: edit_manifest(root, lambda m: m.update(channels=3)), "does not match its own fingerprint"),
        (lambda root: (root / "train/index/offset.png.npy").unlink(), r"train/index/offset\.png\.npy"),
        (lambda root: (root / "train/index/offset.png.npy").write_bytes(b"\x93NUMPY"), "cannot be read"),
        (
            lambda root: (root / "train/index/label.npy").write_bytes((root / "val/index/label.npy").read_bytes()),
            r"has shape \(10,\)",
        ),
    ],
)
def test_a_malformed_index_is_refused_with_place_and_fix(tmp_path, damage, message):
    root = make_images(tmp_path / "set")
    damage(root)
    with pytest.raises(DataError, match=message) as raised:
        epoch(root)
    (fault,) = raised.value.faults
    assert fault.where is not None
    assert str(root) in fault.where
    assert fault.fix is not None


def test_an_unknown_split_lists_those_there_are(tmp_path):
    root = make_images(tmp_path / "set")
    config = DataConfig.model_validate({"path": str(root), "global_batch": 4, "splits": {"train": "training"}})
    with pytest.raises(DataError, match="allowed: train, val"):
        TrainStream(config, seed=0, rank=0, world_size=1, start_samples=0, quarantine_path=None)
