"""Settings of the ``data`` section: where samples lie, how batches are made of them, how much damage is tolerated."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from sixfold.config.base import Config
from sixfold.errors import RecipeError

MAX_DEFAULT_LANES = 64
MAX_MIXTURE_PARTS = 1_000_000


class CacheConfig(Config):
    """The node's cache of remote shards, shared by all its processes."""

    directory: str = Field(default="~/.cache/sixfold/shards", description="Folder on a local disk of each node.")
    quota_bytes: int = Field(
        default=64 << 30, ge=1 << 20, description="Most bytes kept; the shards least recently used are dropped first."
    )


class CorruptConfig(Config):
    """How many unreadable samples are replaced before the run ends with an error: the larger of both bounds."""

    max_samples: int = Field(default=8, ge=0, description="Distinct unreadable samples tolerated in any data set.")
    max_fraction: float = Field(
        default=1e-4, ge=0.0, le=1.0, description="Tolerated share of the training split's samples."
    )


class SplitsConfig(Config):
    """Names of the splits in the data set."""

    train: str = Field(default="train", min_length=1, description="Split that is trained on.")
    evaluation: str = Field(default="val", min_length=1, description="Held-out split that is evaluated on.")


class MixtureSource(Config):
    """One data set of a mixture."""

    path: str = Field(min_length=1, description="Folder or URL of an indexed data set.")
    weight: float = Field(gt=0.0, description="Its share of all samples, relative to the other weights.")


class FilterConfig(Config):
    """Which samples are used, by what the index knows of them; bounds that are null hold for all.

    Widths and heights are pixels of images as they are stored, or cells of latents.
    """

    min_width: int | None = Field(default=None, ge=1, description="Least width.")
    min_height: int | None = Field(default=None, ge=1, description="Least height.")
    max_aspect_ratio: float | None = Field(
        default=None, ge=1.0, description="Most of the longer side over the shorter."
    )
    min_caption_bytes: int | None = Field(default=None, ge=0, description="Fewest bytes of a caption.")
    max_caption_bytes: int | None = Field(default=None, ge=0, description="Most bytes of a caption.")

    @property
    def by_size(self) -> bool:
        """Whether widths and heights matter."""
        return (self.min_width, self.min_height, self.max_aspect_ratio) != (None, None, None)

    @property
    def by_caption(self) -> bool:
        """Whether lengths of captions matter."""
        return (self.min_caption_bytes, self.max_caption_bytes) != (None, None)

    @property
    def text(self) -> str:
        """The bounds that are set, in one line; empty where none is."""
        return ", ".join(f"{name}={value}" for name, value in self.model_dump(exclude_none=True).items())


class BucketsConfig(Config):
    """Sizes that pictures are brought to, each to the one of nearest aspect ratio; a batch is of one size.

    Images are resized to cover the size and cropped at the centre. Latents must have one of the sizes already; they are
    encoded so, and their sizes are counted in cells.
    """

    sizes: Annotated[
        tuple[Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)], ...], Field(strict=False)
    ] = Field(default=(), description="The sizes as [width, height] each (exclusive with area).")
    area: int | None = Field(default=None, ge=1, description="Most pixels (cells) of a size; the sizes follow from it.")
    step: int | None = Field(default=None, ge=1, description="With area: what all sides are multiples of.")
    max_aspect_ratio: float = Field(
        default=2.0, ge=1.0, description="With area: most of a size's longer side over its shorter."
    )

    @model_validator(mode="after")
    def _one_way_to_name_the_sizes(self) -> BucketsConfig:
        if bool(self.sizes) == (self.area is not None) or (self.area is None) != (self.step is None):
            raise ValueError("expected either sizes, or area and step; name the sizes by exactly one of them")
        if self.area is not None and self.step is not None and self.step**2 > self.area:
            raise ValueError(f"expected an area that holds a square of one step, got {self.area} and {self.step}")
        ratios = [Fraction(width, height) for width, height in self.sizes]
        if len(set(ratios)) < len(ratios):
            raise ValueError("expected sizes of different aspect ratios, for which of two equal ones is a picture's?")
        return self

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each bucket: the given ones, or, from the tallest to the widest, what ``area`` holds.

        To each length of the longer side belongs the longest shorter side.
        """
        if self.area is None or self.step is None:
            return tuple((height, width) for width, height in self.sizes)
        longest, square = math.isqrt(int(self.area * self.max_aspect_ratio)), math.isqrt(self.area)
        lengths = range(square // self.step * self.step, longest + 1, self.step)
        wide = [(min(length, self.area // length // self.step * self.step), length) for length in lengths]
        wide = [(height, width) for height, width in wide if width <= self.max_aspect_ratio * height]
        return (*((width, height) for height, width in reversed(wide) if height < width), *wide)

    @property
    def text(self) -> str:
        """The sizes in one line."""
        return ", ".join(f"{width}x{height}" for height, width in self.shapes)


class DataConfig(Config):
    """What is trained on, and in which order.

    The order of samples follows from the seed, the data, ``global_batch``, ``lanes``, ``mixture``, ``filter``,
    ``buckets`` and the ``shuffle_*`` fields; it never follows from the number of ranks or workers.
    """

    path: str | None = Field(
        default=None, min_length=1, description="Folder or URL of an indexed data set (exclusive with mixture)."
    )
    mixture: Annotated[tuple[MixtureSource, ...], Field(strict=False)] = Field(
        default=(), description="Several data sets of one kind, mixed in exact proportions (exclusive with path)."
    )
    splits: SplitsConfig = Field(default=SplitsConfig(), description="Names of the splits.")
    global_batch: int = Field(ge=1, description="Samples (images or sequences) in one optimizer step, over all ranks.")
    lanes: int | None = Field(
        default=None,
        ge=1,
        description="Independent streams the order is cut into; ranks must divide them, they must divide global_batch. "
        f"Default: the largest divisor of global_batch up to {MAX_DEFAULT_LANES}.",
    )
    shuffle_block_shards: int = Field(
        default=8,
        ge=1,
        description="Shards whose samples are shuffled together.",
    )
    sequence_length: int | None = Field(
        default=None, ge=1, description="Tokens predicted in one sequence (text only, and required there)."
    )
    shuffle_window_sequences: int = Field(
        default=4096,
        ge=1,
        description="Neighbouring sequences of packed text shuffled together; 1 keeps order.",
    )
    caption_length: int = Field(default=64, ge=1, description="Tokens a caption is cut or padded to (image-text only).")
    image_size: int | None = Field(
        default=None, ge=1, description="Resize the shorter side to this many pixels and crop the centre square."
    )
    filter: FilterConfig | None = Field(
        default=None, description="Which samples of images and latents are used, of all splits; null: all."
    )
    buckets: BucketsConfig | None = Field(
        default=None, description="Several sizes of pictures, for their aspect ratios; each batch is of one."
    )
    horizontal_flip: bool = Field(default=False, description="Mirror each training image with probability one half.")
    workers: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Loader processes of each rank; default 4 where a rank has 8 cores, else 0: a thread "
        "then reads one batch ahead.",
    )
    prefetch: int = Field(default=4, ge=1, le=64, description="Batches each loader process reads ahead.")
    keep_decoded_bytes: int = Field(
        default=256 << 20,
        ge=0,
        description="Keep decoded images in memory if the whole split fits in this many bytes.",
    )
    cache: CacheConfig = Field(default=CacheConfig(), description="Cache of remote shards.")
    corrupt: CorruptConfig = Field(default=CorruptConfig(), description="Budget of unreadable samples.")

    @model_validator(mode="after")
    def _one_way_to_name_the_data(self) -> DataConfig:
        if (self.path is None) == (not self.mixture):
            given = "both" if self.mixture else "neither"
            raise ValueError(f"expected either path or mixture, got {given}; name the data by exactly one of them")
        return self

    @model_validator(mode="after")
    def _lanes_divide_the_batch(self) -> DataConfig:
        if self.lanes is not None and self.global_batch % self.lanes:
            raise ValueError(
                f"expected lanes to divide global_batch, got {self.lanes} lanes and a global batch of "
                f"{self.global_batch}; choose lanes among {_divisors(self.global_batch)}"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_exact(self) -> DataConfig:
        if self.mixture and sum(self.mixture_parts) > MAX_MIXTURE_PARTS:
            raise ValueError(
                f"expected weights whose exact proportions need at most {MAX_MIXTURE_PARTS} parts, got "
                f"{sum(self.mixture_parts)}; round the weights to fewer digits"
            )
        return self

    @model_validator(mode="after")
    def _pictures_are_chosen_and_sized_once(self) -> DataConfig:
        for name in ("filter", "buckets"):
            if getattr(self, name) is not None and self.sequence_length is not None:
                raise ValueError(f"expected no {name} with sequence_length: text has none; remove data.{name}")
        if self.buckets is not None and self.image_size is not None:
            raise ValueError("expected either image_size or buckets, got both; remove data.image_size")
        if self.buckets is not None and self.mixture:
            raise ValueError("expected one data set with buckets, got a mixture; join them in one, and name its path")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """The data sets, in order."""
        return (self.path,) if self.path is not None else tuple(source.path for source in self.mixture)

    @property
    def lane_count(self) -> int:
        """``lanes``, or its default."""
        return self.lanes or max(d for d in _divisors(self.global_batch) if d <= MAX_DEFAULT_LANES)

    @property
    def mixture_parts(self) -> tuple[int, ...]:
        """The weights as the smallest integers in exactly their proportion (weights are read as decimals)."""
        if not self.mixture:
            return (1,)
        shares = [Fraction(str(source.weight)) for source in self.mixture]
        scale = math.lcm(*(share.denominator for share in shares))
        parts = [int(share * scale) for share in shares]
        common = math.gcd(*parts)
        return tuple(part // common for part in parts)

    def check_world_size(self, world_size: int) -> None:
        """Raise RecipeError unless ``world_size`` ranks can share the lanes evenly."""
        if self.lane_count % world_size:
            possible = [d for d in _divisors(self.global_batch) if d % world_size == 0]
            raise RecipeError.of(
                f"{world_size} ranks cannot share {self.lane_count} lanes evenly",
                where="data.lanes",
                allowed=f"ranks that divide lanes: {_divisors(self.lane_count)}",
                fix=f"set data.lanes={possible[0]} (this changes the order of samples)"
                if possible
                else f"choose data.global_batch as a multiple of {world_size}",
            )


@functools.cache
def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
