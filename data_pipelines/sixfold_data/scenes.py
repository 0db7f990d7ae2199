"""Captioned scenes of two shapes, "a red circle above a small blue square": text to image whose truth can be read back.

A scene is rendered by the area that a shape covers in each pixel. The background is mid-grey and the colours are
corners of the RGB cube, so that a pixel that is covered in part lies on the ray from grey to its shape's colour and
never looks like another colour; :mod:`sixfold_data.scene_reading` builds on that.

Whole *combinations* of attributes are held out: no training picture, whatever its caption's wording, shows a scene of
the split val.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sixfold.errors import DataError
from sixfold_data.build import TRAIN, VAL, BuildOptions, BuildReport, building
from sixfold_data.build_images import encode_png
from sixfold_data.tokenizers import ByteTokenizer

Colour = Literal["red", "green", "blue", "yellow"]
Shape = Literal["circle", "square", "cross"]
Size = Literal["regular", "small"]
Relation = Literal["above", "below", "left of", "right of"]

COLOURS: dict[Colour, tuple[float, float, float]] = {
    "red": (1.0, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
    "yellow": (1.0, 1.0, -1.0),
}
"""RGB in [-1, 1]; the background is (0, 0, 0)."""

SHAPES: tuple[Shape, ...] = ("circle", "square", "cross")
EXTENTS: dict[Size, float] = {"regular": 0.375, "small": 0.25}
"""Height and width of a shape as a share of the picture's."""
OPPOSITES: dict[Relation, Relation] = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
IMAGE_SIZES = (16, 32)

_GREY = 127.5
_CROSS_BAR = 1.0 / 3.0
"""Width of a cross's bars over its extent."""
_SUBPIXELS = 4
_NAMES = (f"({'|'.join(COLOURS)})", f"({'|'.join(SHAPES)})", f"({'|'.join(OPPOSITES)})")
_OBJECT = rf"a (small )?{_NAMES[0]} {_NAMES[1]}"
_CAPTION = re.compile(rf"^{_OBJECT} {_NAMES[2]} {_OBJECT}$")


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    colour: Colour
    shape: Shape
    size: Size = "regular"

    def __str__(self) -> str:
        return f"a {'small ' if self.size == 'small' else ''}{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two objects and where the first stands: ``first`` is ``relation`` ``second``."""

    first: Thing
    relation: Relation
    second: Thing

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}"

    def reworded(self) -> Scene:
        """The same picture told from the other object."""
        return Scene(self.second, OPPOSITES[self.relation], self.first)

    def canonical(self) -> Scene:
        """The one wording, of two, that stands for the picture."""
        return self if self.relation in ("above", "left of") else self.reworded()


def parse_caption(caption: str) -> Scene | None:
    """Return the scene that a caption tells of; None for a caption of another form."""
    match = _CAPTION.match(" ".join(caption.lower().split()))
    if match is None:
        return None
    small, colour, shape, relation, other_small, other_colour, other_shape = match.groups()
    return Scene(_thing(small, colour, shape), cast(Relation, relation), _thing(other_small, other_colour, other_shape))


def _thing(small: str | None, colour: str, shape: str) -> Thing:
    return Thing(cast(Colour, colour), cast(Shape, shape), "small" if small else "regular")


def all_scenes() -> Iterator[Scene]:
    """Every scene in its canonical wording, in a fixed order."""
    things = [Thing(*parts) for parts in itertools.product(COLOURS, SHAPES, EXTENTS)]
    relations: tuple[Relation, ...] = ("above", "left of")
    for first, relation, second in itertools.product(things, relations, things):
        yield Scene(first, relation, second)


def coverage(
    shape: Shape, extent_pixels: float, centre: tuple[float, float], image_size: int
) -> Float[np.ndarray, "h w"]:
    """Return the share of each pixel that a shape covers; ``centre`` is (y, x) in pixels from the top left corner."""
    fine = (np.arange(image_size * _SUBPIXELS) + 0.5) / _SUBPIXELS
    y, x = (fine - centre[0])[:, None], (fine - centre[1])[None, :]
    half = extent_pixels / 2.0
    square = (np.abs(y) < half) & (np.abs(x) < half)
    bar = half * _CROSS_BAR
    inside = {
        "circle": y * y + x * x < half * half,
        "square": square,
        "cross": square & ((np.abs(y) < bar) | (np.abs(x) < bar)),
    }[shape]
    covered: np.ndarray = inside.reshape(image_size, _SUBPIXELS, image_size, _SUBPIXELS).mean(axis=(1, 3))
    return covered


def render(scene: Scene, image_size: int, random: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """Draw a scene, its objects a little off their places: each keeps to its half with a margin around it.

    Along the relation the centres are at least a third of the picture apart, across it at most a quarter.
    """
    canvas = np.zeros((image_size, image_size, 3))
    told = scene.canonical()
    for thing, half in ((told.first, 0), (told.second, 1)):
        extent = EXTENTS[thing.size] * image_size
        along = _jitter((half + 0.5) * image_size / 2.0, image_size / 4.0 - extent / 2.0 - 1.0, extent, random)
        across = _jitter(image_size / 2.0, image_size / 8.0, extent, random)
        centre = (along, across) if told.relation == "above" else (across, along)
        covered = coverage(thing.shape, extent, centre, image_size)[..., None]
        canvas += covered * np.asarray(COLOURS[thing.colour])
    return np.round(_GREY + _GREY * canvas).astype(np.uint8)


def _jitter(middle: float, reach: float, extent: float, random: np.random.Generator) -> float:
    """Draw a centre within ``reach`` of the middle, such that the shape's edges fall between pixels."""
    lowest = np.ceil(middle - reach - extent / 2.0 - 1e-9)
    highest = np.floor(middle + reach - extent / 2.0 + 1e-9)
    return float(random.integers(int(lowest), int(max(lowest, highest)), endpoint=True)) + extent / 2.0


def held_out(scene: Scene, val_fraction: float) -> bool:
    """Tell whether a combination of attributes belongs to the split val: both wordings of a picture do, or neither."""
    digest = hashlib.blake2b(str(scene.canonical()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64 < val_fraction


def build_scenes(options: BuildOptions, samples: int, image_size: int) -> BuildReport:
    """Build an image-text data set of scenes; whole combinations of attributes are held out as ``val``.

    Args:
        options: see :class:`BuildOptions`; ``val_fraction`` is the share of combinations held out, and of samples.
        samples: samples of all splits together, one of each at least.
        image_size: 16 or 32 pixels a side.

    Raises:
        DataError: the picture size is another, or the samples do not fill each split.
    """
    if image_size not in IMAGE_SIZES:
        raise DataError.of(
            f"scenes of {image_size} pixels are not drawn",
            where="--image-size",
            allowed=", ".join(map(str, IMAGE_SIZES)),
        )
    scenes = {False: list[Scene](), True: list[Scene]()}
    for scene in all_scenes():
        scenes[held_out(scene, options.val_fraction)].append(scene)
    least = 1 if options.val_fraction else 0
    val_samples = max(least, round(options.val_fraction * samples))
    random = np.random.Generator(np.random.PCG64(0))
    with building(options) as work:
        for number in range(samples):
            split = VAL if number < val_samples else TRAIN
            scene = _worded(scenes[split == VAL], random)
            picture = Image.fromarray(render(scene, image_size, random))
            members = {"png": encode_png(picture), "txt": str(scene).encode()}
            work.writers[split].add(f"scene-{number:06d}", members, size=(image_size, image_size))
            options.progress(number + 1, samples)
        return work.finish(
            "image-text",
            tokenizer=ByteTokenizer().description(),
            image_size=(image_size, image_size),
            channels=3,
            remarks=[f"{len(scenes[True])} of {len(scenes[True]) + len(scenes[False])} combinations are held out"],
        )


def _worded(scenes: Sequence[Scene], random: np.random.Generator) -> Scene:
    """Draw a scene and one of its two wordings."""
    scene = scenes[int(random.integers(len(scenes)))]
    return scene.reworded() if random.integers(2) else scene


@dataclass(frozen=True)
class Agreement:
    """Which attributes of a picture are those of its caption, both objects together."""

    colour: bool
    shape: bool
    size: bool
    relation: bool

    @property
    def aligned(self) -> bool:
        """Whether colours, shapes and the relation are all right (sizes are told apart in pixels, so count alone)."""
        return self.colour and self.shape and self.relation


NOTHING_RIGHT = Agreement(colour=False, shape=False, size=False, relation=False)


def agreement(wanted: Scene, found: Scene | None) -> Agreement:
    """Compare a picture's scene with the caption's, in the wording that agrees best; None agrees in nothing."""
    if found is None:
        return NOTHING_RIGHT
    told = (_compare(wanted, found), _compare(wanted, found.reworded()))
    return max(told, key=lambda one: (one.aligned, one.colour + one.shape + one.size + one.relation))


def _compare(wanted: Scene, found: Scene) -> Agreement:
    pairs = ((wanted.first, found.first), (wanted.second, found.second))
    return Agreement(
        colour=all(a.colour == b.colour for a, b in pairs),
        shape=all(a.shape == b.shape for a, b in pairs),
        size=all(a.size == b.size for a, b in pairs),
        relation=wanted.relation == found.relation,
    )
