"""What the samples of foreign shards are: pictures, captioned pictures or tokenised text; sizes, channels, labels."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from sixfold.errors import DataError, Fault
from sixfold_data.index import Kind
from sixfold_data.tars import TarSample
from sixfold_data.tokenizers import STORAGE_DTYPES

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")  # as decode.py has them, which imports torch
GREY_MODES = frozenset({"1", "L", "LA"})
FAULTS_NAMED = 20
_FIX = "write the shard again without this sample, or restore it from its source"


class Noted(NamedTuple):
    """What the index keeps of a sample; each None where it has none. ``size`` is the image's (height, width)."""

    label: int | None = None
    tokens: int | None = None
    size: tuple[int, int] | None = None


@dataclass
class Traits:
    """Gathered sample by sample.

    Attributes:
        classes: class names by label number; empty until :meth:`finish` if labels are numbers.
    """

    classes: Sequence[str] = ()
    faults: list[Fault] = field(default_factory=list)
    captioned: int = 0
    pictures: int = 0
    texts: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)
    channels: set[int] = field(default_factory=set)
    highest_label: int = -1
    highest_token: int = -1

    def note(self, sample: TarSample, read: Callable[[str], bytes], where: str) -> Noted | None:
        """Take one sample into account; ``read(extension)`` gives a member's bytes.

        Returns None if this is no sample of any kind. What is wrong with it is added to ``faults``.
        """
        image = next((extension for extension in IMAGE_EXTENSIONS if extension in sample.members), None)
        stored = next((extension for extension in STORAGE_DTYPES if extension in sample.members), None)
        try:
            if image is not None:
                size = self._note_image(read(image), captioned="txt" in sample.members)
                return Noted(label=self._label(read("cls")) if "cls" in sample.members else None, size=size)
            if stored is not None:
                return Noted(tokens=self._note_tokens(read(stored), STORAGE_DTYPES[stored]))
        except ValueError as error:
            self.faults.append(Fault(what=str(error), where=f"{where}: {sample.key}", fix=_FIX))
            return Noted()
        return None

    def kind(self, where: str) -> Kind:
        """Return the one kind that all samples have.

        Raises:
            DataError: there is none, or there are several.
        """
        if self.texts and self.pictures:
            raise DataError.of(
                f"{self.texts} samples are tokenised text and {self.pictures} are images",
                where=where,
                fix="index them as two data sets, in folders of their own",
            )
        if not self.texts and not self.pictures:
            raise DataError.of(
                "no sample holds an image or tokenised text",
                where=where,
                allowed=", ".join([*IMAGE_EXTENSIONS, *STORAGE_DTYPES]),
                fix="plain text is tokenised by `sixfold data build text`",
            )
        if self.texts:
            return "text"
        return "image-text" if self.captioned == self.pictures else "images"

    def class_names(self) -> tuple[str, ...]:
        """Return class names by label number."""
        return tuple(self.classes) or tuple(str(number) for number in range(self.highest_label + 1))

    def _note_image(self, data: bytes, *, captioned: bool) -> tuple[int, int]:
        try:
            with Image.open(io.BytesIO(data)) as image:
                size = image.height, image.width
                self.sizes.add(size)
                self.channels.add(1 if image.mode in GREY_MODES else 3)
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"not a readable image ({error})") from error
        self.pictures += 1
        self.captioned += captioned
        return size

    def _label(self, data: bytes) -> int:
        text = data.decode("utf-8", errors="replace").strip()
        if text in self.classes:
            return self.classes.index(text)
        highest = len(self.classes) - 1 if self.classes else np.iinfo(np.int32).max
        if not text.isascii() or not text.isdigit() or int(text) > highest:
            allowed = f"0 to {highest}" if self.classes else "a number, or a name given with --classes"
            raise ValueError(f"the label {text[:40]!r} is out of range (allowed: {allowed})")
        self.highest_label = max(self.highest_label, int(text))
        return int(text)

    def _note_tokens(self, data: bytes, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]) -> int:
        if not data or len(data) % dtype.itemsize:
            raise ValueError(f"{len(data)} bytes are no whole number of tokens of {dtype.itemsize} bytes")
        self.texts += 1
        tokens = np.frombuffer(data, dtype=dtype)
        self.highest_token = max(self.highest_token, int(tokens.max()))
        return len(tokens)
