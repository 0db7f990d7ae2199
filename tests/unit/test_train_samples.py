"""What drawn samples leave in a folder."""

import torch

from sixfold.train.samples import Samples


def test_a_second_draw_leaves_nothing_of_the_first(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for count in (5, 2):
        written = Samples(fields={"image": torch.zeros(count, 1, 4, 4)}, conditions={}, info=None).write_all(tmp_path)
        assert {path.name for path in written} | {"notes.txt"} == {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("sample-*.png"))) == 2
