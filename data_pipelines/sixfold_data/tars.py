"""Reading what lies where in a tar that somebody made, without trusting it."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sixfold.errors import DataError, SixfoldError
from sixfold_data.index import MemberPlace

_NAME = re.compile(
    r"^((?:.*/|)[^.]+)[.]([^/]*)$"
)  # WebDataset's rule: the extension begins at the base name's first dot
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "zstd -d", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"}


@dataclass
class TarSample:
    """The members of one key: where each lies, by extension (lower case)."""

    key: str
    members: dict[str, MemberPlace] = field(default_factory=dict)


@dataclass
class TarContents:
    """What a tar holds: samples in order of first appearance, and names that were passed over."""

    samples: list[TarSample]
    duplicates: list[str]
    without_key: list[str]


def scan_tar(file: Path, where: str) -> TarContents:
    """Read all headers of a tar and the CRC-32 of all members.

    Members of one key need not stand together. Where a name occurs twice, the first one counts and the name is among
    ``duplicates``. Names without an extension (or that begin with a dot) are in ``without_key``.

    Raises:
        DataError: it is compressed, not a tar, or ends too soon.
    """
    _refuse_compressed(file, where)
    contents = TarContents([], [], [])
    samples: dict[str, TarSample] = {}
    for name, place in _members(file, where):
        match = _NAME.match(name)
        if match is None:
            contents.without_key.append(name)
            continue
        key, extension = match[1], match[2].lower()
        sample = samples.setdefault(key, TarSample(key))
        if extension in sample.members:
            contents.duplicates.append(name)
        else:
            sample.members[extension] = place
    contents.samples.extend(samples.values())
    return contents


def _members(file: Path, where: str) -> Iterator[tuple[str, MemberPlace]]:
    """Yield name and place of every regular file in the tar."""
    end = 0
    size = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as tar, file.open("rb") as raw:
            for member in tar:
                length = member.size if member.isreg() else 0
                end = member.offset_data + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if end > size:
                    raise _truncated(where, f"member {member.name!r} ends at byte {end}, the file at byte {size}")
                if member.isreg():
                    yield member.name, MemberPlace(member.offset_data, member.size, _crc32(raw, member))
            raw.seek(end)
            closing = raw.read(2 * tarfile.BLOCKSIZE)
    except tarfile.ReadError as error:
        if "unexpected end" in str(error):
            raise _truncated(where, f"the file ends inside a member, at byte {size}") from error
        raise DataError.of(
            f"this is not a tar file ({error})", where=where, fix="remove it, or restore the shard from its source"
        ) from error
    if len(closing) < 2 * tarfile.BLOCKSIZE or closing.strip(b"\0"):
        raise _truncated(where, f"the tar's closing blocks are missing or damaged after byte {end}")


def _crc32(raw: BinaryIO, member: tarfile.TarInfo) -> int:
    raw.seek(member.offset_data)
    crc, left = 0, member.size
    while left:
        piece = raw.read(min(left, 1 << 20))
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    return crc


def _refuse_compressed(file: Path, where: str) -> None:
    with file.open("rb") as raw:
        head = raw.read(8)
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError.of(
                "the shard is compressed; samples cannot be read by offset from it",
                where=where,
                fix=f"decompress it first: {command} {Path(where).name} (images gain nothing from it anyway)",
            )


def _truncated(where: str, what: str) -> SixfoldError:
    return DataError.of(f"the shard is truncated: {what}", where=where, fix="copy it again from its source")
