"""What drawn samples leave in a folder."""

import numpy as np
import torch

from sixfold.train.samples import Samples
from sixfold.train.sampling import write_shards
from sixfold_data.config import DataConfig
from sixfold_data.describe import DataInfo, describe
from sixfold_data.evaluation import EvaluationReader
from sixfold_data.images import encode_caption
from sixfold_data.tokenizers import ByteTokenizer


def test_a_second_draw_leaves_nothing_of_the_first(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for count in (5, 2):
        written = Samples(fields={"image": torch.zeros(count, 1, 4, 4)}, conditions={}, info=None).write(tmp_path)
        assert {path.name for path in written} | {"notes.txt"} == {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("sample-*.png"))) == 2


def test_a_grid_alone_leaves_nothing_of_the_draw_before(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    samples = Samples(fields={"image": torch.zeros(3, 1, 4, 4)}, conditions={}, info=None)
    samples.write(tmp_path)
    assert samples.write(tmp_path, overview_only=True) == [tmp_path / "grid.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "grid.png"}


def test_shards_keep_the_captions_their_images_were_drawn_for(tmp_path):
    tokenizer, length = ByteTokenizer(), 24
    info = DataInfo(
        kind="image-text",
        samples={},
        tokens={},
        sequences={},
        classes=(),
        image_size=(4, 4),
        channels=3,
        vocabulary_size=257,
        tokenizer=tokenizer,
        fingerprint="",
    )
    texts = ["a red circle", "ein Übermaß", "", "a blue square", "a dot"]
    captions = torch.from_numpy(np.stack([encode_caption(tokenizer, text.encode(), length) for text in texts]))
    images = torch.randint(0, 256, (5, 3, 4, 4)) / 127.5 - 1.0
    parts = [
        Samples(fields={"image": images[part]}, conditions={"caption": captions[part]}, info=info)
        for part in (slice(0, 3), slice(3, 5))
    ]
    write_shards(tmp_path / "drawn", iter(parts), info)
    config = DataConfig(path=str(tmp_path / "drawn"), global_batch=1, caption_length=length)
    assert describe(config).kind == "image-text"
    (batch,) = EvaluationReader(config, split="train", batch=5)
    assert torch.equal(batch["caption"], captions)
    torch.testing.assert_close(batch["image"], images, rtol=0.0, atol=1e-6)
