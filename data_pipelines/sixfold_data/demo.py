"""Real data that comes with the dependencies: scikit-learn's digits, and this interpreter's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sixfold.errors import DataError, EnvironmentFault
from sixfold_data.build import TRAIN, VAL, BuildOptions, BuildReport, assign_splits, building
from sixfold_data.build_images import encode_png
from sixfold_data.build_text import Document, build_documents, decode_text

DIGITS_VAL_SAMPLES = 360
STDLIB_MAX_BYTES = 4_000_000
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
)


def build_digits(options: BuildOptions) -> BuildReport:
    """Build scikit-learn's 1797 handwritten digits of 8x8 pixels: 1437 train, 360 val, in an order drawn once.

    A pixel ``p`` of 0..16 is stored as ``round(p * 255 / 16)``; ``round(stored * 16 / 255)`` gives it back.

    Raises:
        EnvironmentFault: scikit-learn is not installed.
    """
    images, labels = _load_digits()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(images))
    pixels = np.round(images * (255.0 / 16.0)).astype(np.uint8)
    with building(options) as work:
        for done, number in enumerate(order.tolist()):
            split = TRAIN if done < len(order) - DIGITS_VAL_SAMPLES else VAL
            label = int(labels[number])
            members = {"png": encode_png(Image.fromarray(pixels[number])), "cls": str(label).encode()}
            work.writers[split].add(f"digit-{number:04d}", members, label=label, size=(8, 8))
            options.progress(done + 1, len(order))
        return work.finish("images", classes=[str(digit) for digit in range(10)], image_size=(8, 8), channels=1)


def build_stdlib(options: BuildOptions, max_bytes: int = STDLIB_MAX_BYTES) -> BuildReport:
    """Build a text data set of the running interpreter's standard-library sources, tests left out.

    Modules are taken in the order of their names' hashes, so that a cap keeps a cross-section and not the letter A.

    Raises:
        DataError: ``max_bytes`` admits fewer than two modules.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {file.relative_to(root).as_posix(): file for file in _library_sources(root)}
    chosen, total = [], 0
    for name in _by_hash(files):
        size = files[name].stat().st_size
        if total + size > max_bytes:
            break
        chosen.append(name)
        total += size
    if len(chosen) < 2:
        raise DataError.of(
            f"{max_bytes} bytes hold fewer than two modules", where="--max-bytes", allowed="100000 or more"
        )
    chosen.sort()
    splits = assign_splits(chosen, options.val_fraction)
    documents = [
        Document(name, split, lambda file=files[name]: decode_text(file.read_bytes()))  # type: ignore[misc]  # bound now
        for name, split in zip(chosen, splits, strict=True)
    ]
    return build_documents(documents, options, "bytes")


def _by_hash(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.blake2b(f"order/{name}".encode(), digest_size=8).digest())


def _library_sources(root: Path) -> Iterator[Path]:
    for file in root.rglob("*.py"):
        if not _SKIPPED_FOLDERS.intersection(file.relative_to(root).parts) and file.stat().st_size > 0:
            yield file


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[1797, 8, 8]`` of 0..16 and labels ``[1797]``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise EnvironmentFault.of(
            "the digits come with scikit-learn, which is not installed", fix='pip install "sixfold[demo]"'
        ) from error
    bunch = load_digits()
    return bunch.images, bunch.target
