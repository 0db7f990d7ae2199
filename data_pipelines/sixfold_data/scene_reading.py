"""Reading a scene back from a picture: colours, shapes, sizes and the relation, without any learnt part.

Each pixel takes the nearest of the palette's colours and grey; connected pixels of a colour make an object; its shape
and size are those of the template, rendered at its own centre of mass, that its coverage fits best. Templates are
compared at several blurs, since a codec's decoder blurs, which shrinks no shape but rounds each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int64

from sixfold_data.scenes import (
    COLOURS,
    EXTENTS,
    SHAPES,
    Agreement,
    Relation,
    Scene,
    Shape,
    Size,
    Thing,
    agreement,
    parse_caption,
)
from sixfold_data.scenes import coverage as rendered_coverage

_BLURS_PIXELS = (0.0, 0.5, 0.8, 1.1)
_SMALLEST_SHARE = 0.35
"""Of the smallest template's area: what is smaller is a speck, not an object."""
_MARGIN = 3


def read_scene(image: Float[np.ndarray, "3 h w"]) -> Scene | None:
    """Return the scene, canonically worded, that a picture in [-1, 1] shows; None unless of exactly two objects."""
    coverage = _coverage_by_colour(image)
    image_size = image.shape[-1]
    smallest = min(_template(shape, "small", image_size, 0.0, 0.0, 0.0).sum() for shape in SHAPES)
    found = [
        (colour, component)
        for colour, covered in coverage.items()
        for component in components(covered > 0.5)
        if component.sum() >= _SMALLEST_SHARE * smallest
    ]
    if len(found) != 2:
        return None
    (first, first_centre), (second, second_centre) = (
        _thing(colour, np.where(_grown(component), coverage[colour], 0.0)) for colour, component in found
    )
    return Scene(first, _relation(second_centre - first_centre), second).canonical()


def read_agreement(images: Float[np.ndarray, "n 3 h w"], captions: Sequence[str]) -> dict[str, list[bool]]:
    """Return what is right in each picture, by attribute; ``aligned`` is colours, shapes and the relation together.

    Raises:
        ValueError: a caption is of another form than a scene's; says which.
    """
    found = captions_agree(images, captions)
    names = ("aligned", "colour", "shape", "size", "relation")
    return {name: [getattr(one, name) for one in found] for name in names}


def captions_agree(images: Float[np.ndarray, "n 3 h w"], captions: Sequence[str]) -> list[Agreement]:
    """Compare pictures with their captions, one by one.

    Raises:
        ValueError: a caption is of another form than a scene's; says which.
    """
    wanted = []
    for caption in captions:
        scene = parse_caption(caption)
        if scene is None:
            raise ValueError(
                f"the caption {caption[:60]!r} tells of no scene such as 'a red circle above a blue square'"
            )
        wanted.append(scene)
    return [agreement(scene, read_scene(image)) for scene, image in zip(wanted, images, strict=True)]


def components(mask: Bool[np.ndarray, "h w"]) -> list[Bool[np.ndarray, "h w"]]:
    """Return the 4-connected parts of a mask, in the order of their last pixels."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # the largest number of a component spreads by a pixel a turn
        spread = np.where(mask, _neighbours_max(label), 0)
        if np.array_equal(spread, label):
            return [label == number for number in np.unique(label) if number]
        label = spread


def _neighbours_max(label: Int64[np.ndarray, "h w"]) -> Int64[np.ndarray, "h w"]:
    padded = np.pad(label, 1)
    shifted = (padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    spread: np.ndarray = np.maximum.reduce(shifted)
    return spread


def _grown(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    return _neighbours_max(mask.astype(np.int64)) > 0


def _coverage_by_colour(image: Float[np.ndarray, "3 h w"]) -> dict[str, Float[np.ndarray, "h w"]]:
    """Return, by colour, how far each pixel lies from grey towards it; 0 where another colour is nearer."""
    palette = np.asarray(list(COLOURS.values()))
    along = np.einsum("kc,chw->khw", palette, image) / 3.0  # a pixel's projection on a colour, whose square is 3
    nearest = along.argmax(axis=0)
    return {name: np.where(nearest == number, along[number].clip(0.0, 1.2), 0.0) for number, name in enumerate(COLOURS)}


def _thing(colour: str, covered: Float[np.ndarray, "h w"]) -> tuple[Thing, Float[np.ndarray, "2"]]:
    """Return the object whose template fits best, and its centre (y, x) in pixels."""
    image_size = covered.shape[0]
    axis = np.arange(image_size) + 0.5
    mass = covered.sum()
    centre = np.array([(covered.sum(axis=1) * axis).sum(), (covered.sum(axis=0) * axis).sum()]) / mass
    # Templates stand near the middle of the picture: whole pixels are shifted away, fractions are rendered.
    shift = np.floor(centre).astype(int) - image_size // 2
    # The nearest quarter of a pixel will do, and few templates serve all pictures.
    nearest = np.round(4.0 * (centre - np.floor(centre))) / 4.0
    centred = np.roll(covered, (-shift[0], -shift[1]), axis=(0, 1))
    misfit = {
        (shape, size): min(
            float(np.square(centred - _template(shape, size, image_size, blur, *nearest)).sum())
            for blur in _BLURS_PIXELS
        )
        for shape in SHAPES
        for size in EXTENTS
    }
    shape, size = min(misfit, key=lambda kind: misfit[kind])
    return Thing(colour, shape, size), centre  # type: ignore[arg-type]  # the names are the palette's own


@cache
def _template(shape: Shape, size: Size, image_size: int, blur: float, y: float, x: float) -> Float[np.ndarray, "h w"]:
    """Render a shape at (y, x) from the picture's middle pixel, blurred by a Gaussian."""
    middle = image_size // 2
    drawn = rendered_coverage(shape, EXTENTS[size] * image_size, (middle + y, middle + x), image_size)
    if not blur:
        return drawn
    reach = np.arange(-_MARGIN, _MARGIN + 1)
    kernel = np.exp(-0.5 * np.square(reach / blur))
    kernel /= kernel.sum()
    for axis in (0, 1):
        drawn = np.apply_along_axis(np.convolve, axis, drawn, kernel, mode="same")
    return drawn


def _relation(offset: Float[np.ndarray, "2"]) -> Relation:
    """Return where the first object stands, from the second's offset (y, x) to it."""
    down, right = offset
    if abs(down) > abs(right):
        return "above" if down > 0 else "below"
    return "left of" if right > 0 else "right of"
