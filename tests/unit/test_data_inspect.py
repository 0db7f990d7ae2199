"""What `sixfold data inspect` shows: captions whole and in any script, several documents, a grid that can be read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont
from typer.testing import CliRunner

from data_sets import make_text, png
from sixfold.cli.main import build_app
from sixfold_data.build import BuildOptions, building
from sixfold_data.contact_sheet import draw_grid, spelled, wrap
from sixfold_data.inspect import Picture
from sixfold_data.tokenizers import ByteTokenizer

CAPTIONS = [
    "a large red circle above two small blue squares on a yellow background, drawn with a soft brush",
    "Ein Übermaß an Text",
    "красный круг над синим квадратом",
    "",
]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("captioned") / "set"
    with building(BuildOptions(out=root, val_fraction=0.0)) as work:
        for number, caption in enumerate(CAPTIONS):
            work.writers["train"].add(f"shapes/s{number}", {"png": png(number), "txt": caption.encode()})
        work.finish("image-text", tokenizer=ByteTokenizer().description(), image_size=(4, 4), channels=1)
    return root


def inspect(*arguments: object) -> str:
    result = CliRunner().invoke(build_app(), ["data", "inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_caption_is_listed_whole_below_the_table(captioned, tmp_path):
    output = inspect(captioned, "--out", tmp_path / "grid.png")
    lines = [line.rstrip() for line in output.splitlines()]
    table = next(number for number, line in enumerate(lines) if line.startswith("train"))
    for number, caption in enumerate(CAPTIONS):
        row = next(line for line in lines[table:] if line.startswith(f"shapes/s{number}"))
        assert row.removeprefix(f"shapes/s{number}").strip() == caption
    assert (tmp_path / "grid.png").exists()


def test_captions_are_in_the_json(captioned):
    shown = json.loads(inspect(captioned, "--json", "--count", 2))["shown"]
    assert shown == {
        "split": "train",
        "samples": [{"key": "shapes/s0", "caption": CAPTIONS[0]}, {"key": "shapes/s3", "caption": CAPTIONS[3]}],
    }


def test_several_documents_are_shown(tmp_path):
    documents = [f"document {number} begins here and goes on".encode() for number in range(9)]
    root = make_text(tmp_path / "text", documents)
    output = inspect(root, "--characters", 10)
    assert [line for line in output.splitlines() if line.startswith("document")] == [
        "document 0",
        "document 4",
        "document 8",
    ]
    shown = json.loads(inspect(root, "--json", "--count", 9, "--characters", 10))["shown"]["samples"]
    assert [sample["text"] for sample in shown] == [f"document {number}" for number in range(9)]


def test_a_long_caption_is_wrapped_within_its_cell():
    font = ImageFont.load_default()
    lines = wrap(CAPTIONS[0], 112, font)
    assert " ".join(lines) == CAPTIONS[0]
    assert max(font.getlength(line) for line in lines) <= 112
    (*_, last) = cut = wrap(CAPTIONS[0] * 9, 60, font)
    assert len(cut) == 8
    assert last.endswith("...")
    assert "".join(wrap("unbreakable" * 5, 60, font)) == "unbreakable" * 5
    assert max(font.getlength(line) for line in cut + wrap("unbreakable" * 5, 60, font)) <= 60


def test_what_the_font_lacks_is_spelled_otherwise_and_never_as_question_marks():
    ascii_only = ImageFont.load_default()
    assert spelled("Ein Übermaß – „café", ascii_only) == 'Ein Ubermass - "cafe'
    assert spelled(CAPTIONS[2], ascii_only) == "", "the key stands there instead"


def test_the_grid_gives_each_caption_its_own_room():
    """Only a picture's cell changes with its caption, and the whole caption is drawn there."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    long = [Picture(pixels, f"s{number}", CAPTIONS[0]) for number in range(4)]
    shorter = [*long[:2], Picture(pixels, "s2", CAPTIONS[0].removesuffix(" brush")), long[3]]
    one, other = (np.asarray(draw_grid(pictures, columns=2)).astype(int) for pictures in (long, shorter))
    rows, columns = np.nonzero((one != other).any(2))
    assert len(rows)
    assert rows.min() >= one.shape[0] // 2 + 112, "below the third picture"
    assert columns.max() < one.shape[1] // 2
    named = draw_grid([Picture(pixels, "s0", "7")] * 4, columns=4)
    assert named.width == 4 * 52, "short titles need no room"
