"""The training stream and the evaluation reader over real shards: order, resume, ranks, workers, mixtures, text."""

from __future__ import annotations

import itertools
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data_sets import make_images, make_synthetic_index, make_text, numbers_of, png
from sixfold.errors import DataError, RecipeError
from sixfold_data import stream as stream_module
from sixfold_data.background import ReadAhead
from sixfold_data.batches import Fetched
from sixfold_data.build import BuildOptions, building
from sixfold_data.config import DataConfig
from sixfold_data.decode import to_unit_range
from sixfold_data.describe import describe
from sixfold_data.evaluation import EvaluationReader, read_split_arrays
from sixfold_data.stream import TrainStream
from sixfold_data.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


def open_stream(config: DataConfig, *, seed=0, rank=0, world_size=1, start=0, log=None) -> TrainStream:
    return TrainStream(config, seed=seed, rank=rank, world_size=world_size, start_samples=start, quarantine_path=log)


def take(stream: TrainStream, steps: int) -> list:
    batches = list(itertools.islice(stream, steps))
    stream.close()
    return batches


def numbers(batches) -> list[list[int]]:
    return [numbers_of(batch["image"]) for batch in batches]


def test_an_epoch_gives_every_sample_once_with_its_own_label(images):
    config = DataConfig(path=str(images), global_batch=20, lanes=10, shuffle_block_shards=3)
    batches = take(open_stream(config), 15)
    for first in range(0, 15, 5):
        epoch = [number for batch in numbers(batches[first : first + 5]) for number in batch]
        assert sorted(epoch) == list(range(100))
    assert numbers(batches[:5]) != numbers(batches[5:10])
    for batch in batches:
        assert batch["label"].tolist() == [number % 10 for number in numbers_of(batch["image"])]
        assert batch["image"].dtype == torch.float32
        assert batch["image"].shape == (20, 1, 4, 4)
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(300))


def test_resuming_continues_mid_epoch(images):
    config = DataConfig(path=str(images), global_batch=8, lanes=4)
    whole = take(open_stream(config), 40)
    for steps in (1, 13, 30):
        resumed = take(open_stream(config, start=8 * steps), 40 - steps)
        assert numbers(resumed) == numbers(whole[steps:])
        assert resumed[0].positions.tolist() == whole[steps].positions.tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_same_batches_and_each_its_own_shards(images, world_size):
    config = DataConfig(path=str(images), global_batch=8, lanes=4, shuffle_block_shards=1)
    whole = numbers(take(open_stream(config), 12))
    ranks = [numbers(take(open_stream(config, rank=rank, world_size=world_size), 12)) for rank in range(world_size)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


def test_the_batch_size_may_change_at_a_resume(images):
    def config(batch: int) -> DataConfig:
        return DataConfig(path=str(images), global_batch=batch, lanes=4)

    small = take(open_stream(config(8)), 5)
    large = take(open_stream(config(20), start=40), 3)
    seen = [number for batch in numbers([*small, *large]) for number in batch]
    assert sorted(seen) == list(range(100))


def test_worker_processes_do_not_change_the_order(images):
    def config(workers: int) -> DataConfig:
        return DataConfig(path=str(images), global_batch=8, lanes=4, workers=workers, horizontal_flip=True)

    alone, shared = (take(open_stream(config(workers), start=16), 9) for workers in (0, 2))
    for ours, theirs in zip(alone, shared, strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["label"], theirs["label"])
        assert torch.equal(ours.positions, theirs.positions)


def test_flips_follow_the_position_and_happen_half_the_time(images):
    def config(flip: bool) -> DataConfig:
        return DataConfig(path=str(images), global_batch=100, lanes=10, horizontal_flip=flip)

    plain, flipped = (take(open_stream(config(flip)), 1)[0]["image"] for flip in (False, True))
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 30 <= sum(mirrored) <= 70


def test_mixture_keeps_exact_proportions_and_resumes(tmp_path):
    paths = [make_images(tmp_path / name, first=first) for name, first in (("a", 0), ("b", 1000))]
    mixture = ({"path": str(paths[0]), "weight": 0.7}, {"path": str(paths[1]), "weight": 0.3})
    config = DataConfig.model_validate({"mixture": mixture, "global_batch": 20, "lanes": 10})
    whole = numbers(take(open_stream(config), 20))
    assert [sum(number < 1000 for number in batch) for batch in whole] == [14] * 20
    from_first = [number for batch in whole for number in batch if number < 1000]
    counts = np.bincount(from_first, minlength=100)  # each lane took 28 samples from it: two epochs of 10, and 8
    assert set(counts.tolist()) == {2, 3}
    assert numbers(take(open_stream(config, start=140), 13)) == whole[7:]
    halves = [numbers(take(open_stream(config, rank=rank, world_size=2), 20)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_mixtures_of_different_kinds_are_refused(tmp_path, images):
    text = make_text(tmp_path / "text", [b"hello"])
    mixture = ({"path": str(images), "weight": 1.0}, {"path": str(text), "weight": 1.0})
    with pytest.raises(DataError, match="kind is 'text', but 'images'"):
        describe(DataConfig.model_validate({"mixture": mixture, "global_batch": 4}))


DOCUMENTS = [bytes((number + place) % 256 for place in range(7 * number % 300 + 1)) for number in range(60)]


def test_text_sequences_hold_whole_documents_in_order(tmp_path):
    root = make_text(tmp_path / "text", DOCUMENTS)
    config = DataConfig(path=str(root), global_batch=4, sequence_length=50, shuffle_window_sequences=8)
    info = describe(config)
    assert info.vocabulary_size == 257
    assert info.tokens["train"] == sum(map(len, DOCUMENTS)) + len(DOCUMENTS)
    batches = take(open_stream(config), info.sequences["train"] // 4)
    for batch in batches:
        assert batch["tokens"].shape == batch["documents"].shape == batch["token_bytes"].shape == (4, 51)
        np.testing.assert_array_equal(batch["token_bytes"], batch["tokens"] < 256)
        ended = (batch["tokens"] == 256).long()
        np.testing.assert_array_equal(batch["documents"], ended.cumsum(1) - ended)
        for row in batch["tokens"].tolist():
            for part in "".join(chr(token) for token in row).split(chr(256)):
                assert any(part in document.decode("latin1") for document in DOCUMENTS)
    resumed = take(open_stream(config, start=12), 5)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(resumed, batches[3:8], strict=True))


def test_evaluating_text_predicts_every_token_once(tmp_path):
    config = DataConfig(path=str(make_text(tmp_path / "text", DOCUMENTS)), global_batch=4, sequence_length=50)
    rows = np.concatenate([batch["tokens"].numpy() for batch in EvaluationReader(config, batch=7)])
    stream = np.concatenate([np.append(np.frombuffer(document, np.uint8), 256) for document in DOCUMENTS])
    expected = np.lib.stride_tricks.sliding_window_view(stream, 51)[::50]
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(("batch", "world_size", "limit"), [(3, 1, None), (3, 2, None), (4, 4, None), (2, 2, 7)])
def test_evaluation_shares_the_split_in_batches_of_equal_number(images, batch, world_size, limit):
    config = DataConfig(path=str(images), global_batch=4)
    readers = [
        EvaluationReader(config, split="val", batch=batch, rank=rank, world_size=world_size, limit=limit)
        for rank in range(world_size)
    ]
    ranks = [list(reader) for reader in readers]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(readers[0])
    together = [batch for batches in ranks for batch in batches]
    found = {
        position: number
        for part in together
        for position, number in zip(part.positions.tolist(), numbers_of(part["image"]), strict=True)
    }
    assert found == {position: 100 + position for position in range(limit or 10)}
    assert sum(map(len, together)) == len(found)


def test_a_whole_split_as_arrays(images):
    arrays = read_split_arrays(DataConfig(path=str(images), global_batch=4), "val")
    assert numbers_of(torch.from_numpy(arrays["image"])) == list(range(100, 110))
    assert arrays["label"].tolist() == [number % 10 for number in range(100, 110)]


def test_a_checkpoint_of_other_data_or_order_is_refused(images, tmp_path):
    config = DataConfig(path=str(images), global_batch=8, lanes=4)
    stream = open_stream(config)
    stream.check_state(stream.state())
    stream.check_state(open_stream(config.model_copy(update={"global_batch": 16})).state())
    moved = make_images(tmp_path / "copy")
    stream.check_state(open_stream(config.model_copy(update={"path": str(moved)})).state())
    with pytest.raises(DataError, match="seed was 1, is 0"):
        stream.check_state(open_stream(config, seed=1).state())
    with pytest.raises(DataError, match="lanes was 8, is 4"):
        stream.check_state(open_stream(config.model_copy(update={"lanes": 8})).state())
    other = make_images(tmp_path / "other", first=5)
    with pytest.raises(DataError, match="fingerprint"):
        stream.check_state(open_stream(config.model_copy(update={"path": str(other)})).state())


def test_ranks_that_cannot_share_the_lanes_are_told_what_to_change(images):
    with pytest.raises(RecipeError, match=r"set data.lanes=6"):
        open_stream(DataConfig(path=str(images), global_batch=12, lanes=4), world_size=6)


def test_without_workers_the_next_batch_is_read_during_the_step(images):
    stream = open_stream(DataConfig(path=str(images), global_batch=8, lanes=4, workers=0))
    read: queue.SimpleQueue[int] = queue.SimpleQueue()

    class Told(type(stream._batches)):
        def __getitem__(self, start_samples):
            fetched = super().__getitem__(start_samples)
            read.put(start_samples)
            return fetched

    stream._batches.__class__ = Told
    next(stream)
    assert [read.get(timeout=60), read.get(timeout=60)] == [0, 8], "the second, though it was not asked for"
    stream.close()


def test_reading_ahead_keeps_order_hands_errors_over_and_ends():
    def items():
        yield from range(3)
        raise DataError.of("the end")

    ahead = ReadAhead(items())
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(DataError, match="the end"):
            next(ahead)
    before = set(threading.enumerate())
    endless = ReadAhead(itertools.count())
    next(endless)
    (thread,) = set(threading.enumerate()) - before
    del endless
    thread.join(60)
    assert not thread.is_alive()


def test_waiting_is_measured_and_reset(images):
    stream = open_stream(DataConfig(path=str(images), global_batch=8))
    next(stream)
    assert stream.wait_s > 0
    assert stream.wait_s == 0


def test_resume_at_sample_ten_million_does_not_read_what_went_before(tmp_path):
    """Work is counted, not timed: the blocks of one batch are all that is permuted."""
    root = make_synthetic_index(tmp_path / "big", samples=10_240_000, shards=1024, content=png(77))
    config = DataConfig(path=str(root), global_batch=64, lanes=64, shuffle_block_shards=1)
    started_s = time.process_time()
    stream = open_stream(config, start=10_000_000 // 64 * 64)
    batch = next(stream)
    print(f"resumed at sample ten million in {time.process_time() - started_s:.3f} s of CPU time")
    assert numbers_of(batch["image"]) == [77] * 64
    assert batch.positions[0] == 10_000_000 // 64 * 64
    (source,) = stream._batches.sources
    assert len(source.order._blocks._values) <= 64


def test_captions_come_as_padded_tokens_and_a_cut_one_is_told_of(tmp_path, caplog):
    root, texts = tmp_path / "captioned", ["a cat", "ein Übermaß an Text", ""]
    with building(BuildOptions(out=root, val_fraction=0.0)) as work:
        for number, text in enumerate(texts):
            work.writers["train"].add(f"s{number}", {"png": png(number), "txt": text.encode()})
        work.finish("image-text", tokenizer=ByteTokenizer().description(), image_size=(4, 4), channels=1)
    config = DataConfig(path=str(root), global_batch=3, lanes=1, caption_length=12)
    batch = next(open_stream(config))
    for number, caption in zip(numbers_of(batch["image"]), batch["caption"], strict=True):
        kept = texts[number].encode()[:11]
        assert caption.tolist() == [*kept, *[256] * (12 - len(kept))]
    (warning,) = (record.getMessage() for record in caplog.records if "captions" in record.getMessage())
    assert "data.caption_length" in warning
    assert repr(texts[1]) in warning


@pytest.mark.parametrize(("size", "sent_as"), [(8, np.ndarray), (600, torch.Tensor)])
def test_pixels_arrive_as_the_same_numbers_whether_they_travel_in_the_message_or_beside_it(size, sent_as):
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    fields = {"image": torch.from_numpy(pixels).permute(0, 3, 1, 2), "scale": torch.ones(2, dtype=torch.bfloat16)}
    sent = stream_module._packed(Fetched(fields, np.arange(2), [], None)).fields
    assert isinstance(sent["image"], sent_as)
    arrived = stream_module._unpacked(sent)
    assert torch.equal(arrived["image"], to_unit_range(pixels))
    assert torch.equal(arrived["scale"], fields["scale"])


RANK = """
import sys, time
from sixfold_data.config import DataConfig
from sixfold_data.stream import TrainStream
if __name__ == "__main__":
    config = DataConfig(path=sys.argv[1], global_batch=10, lanes=10, workers=2)
    stream = TrainStream(config, seed=0, rank=0, world_size=1, start_samples=0, quarantine_path=None)
    next(stream)
    print("reading", flush=True)
    time.sleep(600)
"""


def test_loader_processes_end_with_a_rank_that_is_killed(images, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    rank = subprocess.Popen([sys.executable, str(script), str(images)], stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout.readline() == "reading\n"
        below = psutil.Process(rank.pid).children(recursive=True)
        assert len(below) >= 3, "the fork server and two loaders"
    finally:
        rank.kill()
        rank.stdout.close()  # which a loader that is left would hold open
        rank.wait()
    _, left = psutil.wait_procs(below, timeout=10)
    for process in left:
        process.kill()
    assert left == []
