"""The manifest: what a checkpoint consists of and belongs to, and how it proves its own integrity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from pydantic import Field, JsonValue, ValidationError

from sixfold.config.base import Config
from sixfold.errors import CheckpointError, Fault

MANIFEST = "MANIFEST.json"
METADATA = ".metadata"
"""The file in which DCP keeps which tensor lies where; a pickle, read only after its hash has matched."""

FORMAT_VERSION = 1
"""Raised whenever a reader of the previous version could misread a checkpoint."""

_CHUNK_BYTES = 4 << 20


class FileRecord(Config):
    """One file's size and content."""

    size_bytes: int = Field(ge=0, description="Length of the file.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Hash of its content.")


class Identity(Config):
    """What a checkpoint belongs to."""

    recipe_hash: str = Field(
        description="Hash of the resolved recipe, for the record: parts of it may change on resume."
    )
    fingerprint: str = Field(description="Fingerprint of the data set; sample positions mean nothing on another.")
    rng_version: str = Field(description="Version of the position-keyed random draws.")
    settings: dict[str, JsonValue] = Field(
        description="Recipe settings (nested or dotted) that a resumed run must share."
    )


class Manifest(Config):
    """Everything about a checkpoint but its tensors."""

    format: int = Field(description="Version of this format.")
    step: int = Field(ge=0, description="Optimizer steps done.")
    attempt: str = Field(description="Which attempt of the run wrote it.")
    written_at: str = Field(description="When, UTC, ISO 8601.")
    world_size: int = Field(ge=1, description="How many ranks wrote it; any number may read it.")
    versions: dict[str, str] = Field(description="Versions of the software that wrote it.")
    identity: Identity = Field(description="What it belongs to.")
    extra: dict[str, JsonValue] = Field(
        description="The caller's state that is not tensors: progress, data, objective."
    )
    files: dict[str, FileRecord] = Field(description="Every file of the checkpoint but this one.")

    @property
    def size_bytes(self) -> int:
        """Total size of the files."""
        return sum(record.size_bytes for record in self.files.values())


class Rejected(Exception):
    """A checkpoint does not verify; the message says why."""


def hash_stream(stream: BinaryIO) -> FileRecord:
    """Return the record of a stream's remaining content."""
    digest, size_bytes = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
        size_bytes += len(chunk)
    return FileRecord(size_bytes=size_bytes, sha256=digest.hexdigest())


def encode(manifest: Manifest) -> bytes:
    """Serialise a manifest together with its own hash, since nothing else vouches for it."""
    body = manifest.model_dump(mode="json")
    return json.dumps({"manifest": body, "sha256": _hash(body)}, indent=1).encode() + b"\n"


def decode(content: bytes) -> Manifest:
    """Parse a manifest; raises :class:`Rejected` when it is damaged or of another format version."""
    try:
        document = json.loads(content)
        body, recorded = document["manifest"], document["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise Rejected(f"{MANIFEST} is not a manifest ({type(error).__name__}: {error})") from error
    if _hash(body) != recorded:
        raise Rejected(f"{MANIFEST} does not match its own hash")
    version = body.get("format") if isinstance(body, dict) else None
    if version != FORMAT_VERSION:
        raise Rejected(f"format version {version}, this version of Sixfold reads {FORMAT_VERSION}")
    try:
        manifest = Manifest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise Rejected(f"{MANIFEST} is incomplete: {error.errors()[0]['loc']} {error.errors()[0]['msg']}") from error
    if METADATA not in manifest.files or any("/" in name or name.startswith("..") for name in manifest.files):
        raise Rejected(f"{MANIFEST} lists files that no checkpoint of this format has")
    return manifest


def require_same_identity(saved: Identity, present: Identity, *, where: str) -> None:
    """Refuse to resume a checkpoint of another run.

    Raises:
        CheckpointError: naming every setting, the data set or the random draws that differ.
    """
    before, now = dict(_leaves(saved.settings)), dict(_leaves(present.settings))
    faults = [
        Fault(what=f"{name} is {now.get(name, 'unset')}, the checkpoint has {before.get(name, 'unset')}")
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if saved.fingerprint != present.fingerprint:
        faults.append(Fault(what=f"the data set is {present.fingerprint}, the checkpoint saw {saved.fingerprint}"))
    if saved.rng_version != present.rng_version:
        faults.append(Fault(what=f"random draws are {present.rng_version}, the checkpoint's were {saved.rng_version}"))
    if faults:
        head = Fault(
            what="this checkpoint belongs to another recipe; resuming would not continue its run",
            where=where,
            allowed="to change on resume: train.steps, engine, checkpoint, tracking, sampling, evaluation, world size",
            fix="undo the changes below, or start a new run with another --run-dir",
        )
        raise CheckpointError(head, *faults)


def _hash(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _leaves(settings: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and JSON values of nested settings."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value)
