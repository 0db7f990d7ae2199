"""DCP over a store: files are hashed as they are written, and DCP's metadata is read only as the manifest says.

DCP's planners and file layout are used as they are; its collectives are not (see ``staging`` and ``transaction``):
loading needs none, and saving needs fewer.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from sixfold.checkpoint.manifest import METADATA, FileRecord, Manifest, Rejected
from sixfold.checkpoint.staging import FlatState, WritePlan
from sixfold.checkpoint.store import Store

_BUFFER_BYTES = 1 << 20
"""Torch writes a tensor in forty pieces. Each hashed by itself would take the interpreter's lock from training forty
times a tensor."""


class _HashingStream(io.RawIOBase):
    """An append-only stream that hashes what passes, and remembers the first failure of the medium."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._raw.write(view)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._digest.update(view)
        self._size_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size_bytes

    def record(self) -> FileRecord:
        return FileRecord(size_bytes=self._size_bytes, sha256=self._digest.hexdigest())


class StoreFiles(FileSystemBase):
    """DCP's view of a store; ``records`` has the size and hash of every file written through it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file; written ones are durable afterwards.

        Raises:
            OSError: the medium failed (torch's own writer would report a full disk as an unrelated ``RuntimeError``).
        """
        if mode == "rb":
            with self._store.reader(str(path)) as stream:
                yield cast(io.IOBase, stream)
            return
        assert mode == "wb", mode
        with self._store.writer(str(path)) as raw:
            hashing = _HashingStream(raw)
            buffered = io.BufferedWriter(hashing, _BUFFER_BYTES)
            try:
                yield cast(io.IOBase, buffered)
                buffered.close()  # which torch may have done
            except Exception as error:  # whatever torch's writer makes of a failed write
                if hashing.failure is None or hashing.failure is error:
                    raise
                raise hashing.failure from error
        self.records[_base(path)] = hashing.record()

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """Join with a slash."""
        return f"{path}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Never needed: folders are fresh for every attempt."""
        raise AssertionError(f"nothing in a fresh checkpoint folder is ever renamed, yet {path} is")

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """Paths are plain strings."""
        return str(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Make a folder."""
        self._store.make_folder(str(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path within a store will do."""
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file was written here; folders are fresh for every attempt."""
        return _base(path) in self.records

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Never needed: folders are fresh for every attempt."""
        raise AssertionError(f"nothing in a fresh checkpoint folder is ever replaced, yet {path} is")


class StoreWriter(FileSystemWriter):
    """DCP's writer into one folder of a store."""

    def __init__(self, store: Store, folder: str, rank: int) -> None:
        # Durability is the store's business; copying ahead on a CUDA stream has no use for data that is on the CPU.
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)
        self.files = StoreFiles(store)
        self.fs = self.files  # type: ignore[assignment]  # DCP's own fsspec writer replaces it likewise
        self.path = folder
        self.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)

    def write(self, plan: WritePlan, staged: FlatState) -> list[WriteResult]:
        """Write this rank's share of the plan from staged CPU tensors."""
        return self.write_data(self.prepare_local_plan(plan.as_save_plan()), _StagedPlanner(staged)).wait()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata of all ranks' files, in place: the folder counts for nothing until it is committed.

        Its storage meta stays empty: DCP would record paths, but a checkpoint may be moved.
        """
        places = {result.index: result.storage_data for part in results for result in part}
        complete = replace(metadata, storage_data=places, storage_meta=StorageMeta())
        with self.files.create_stream(f"{self.path}/{METADATA}", "wb") as stream:
            pickle.dump(complete, cast(BinaryIO, stream))


class _StagedPlanner(DefaultSavePlanner):
    """Hands the writer the staged shard of a name."""

    def __init__(self, staged: FlatState) -> None:
        super().__init__(flatten_state_dict=False)
        self._staged = staged

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._staged[index.fqn]


def read_metadata_bytes(store: Store, folder: str, manifest: Manifest) -> bytes:
    """Return DCP's pickled metadata, having checked that it is what the manifest says.

    Raises:
        Rejected: it changed since the manifest was written.
    """
    content = store.read(f"{folder}/{METADATA}")
    if hashlib.sha256(content).hexdigest() != manifest.files[METADATA].sha256:
        raise Rejected(f"{METADATA} does not match its hash in the manifest")
    return content


class StoreReader(FileSystemReader):
    """DCP's reader from one committed folder, given its verified metadata (:func:`read_metadata_bytes`).

    Raises:
        Rejected: the metadata holds what no checkpoint of this format has.
    """

    def __init__(self, store: Store, folder: str, metadata: bytes) -> None:
        super().__init__(folder)
        self._metadata = cast(Metadata, _MetadataUnpickler(io.BytesIO(metadata)).load())
        self.fs = StoreFiles(store)  # type: ignore[assignment]  # DCP's own fsspec reader replaces it likewise
        self.path = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the verified metadata."""
        return self._metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return shape, type and chunks of every tensor by name."""
        everything = self._metadata.state_dict_metadata
        return {name: value for name, value in everything.items() if isinstance(value, TensorStorageMetadata)}

    def fill(self, state: FlatState) -> None:
        """Read into the tensors of ``state``, in place, whatever their sharding; uses no collectives.

        Raises:
            KeyError: a name that the checkpoint does not have.
            ValueError: a shape that it has otherwise.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(cast(dict[str, Any], state), self._metadata, is_coordinator=False)
        self.set_up_storage_reader(self._metadata, is_coordinator=False)
        self.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


class _MetadataUnpickler(pickle.Unpickler):
    """Builds DCP's metadata records and nothing else: a hash proves a file unchanged, not harmless."""

    _allowed: ClassVar[dict[str, set[str]]] = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in self._allowed.get(module, ()):
            raise Rejected(f"{METADATA} names {module}.{name}, which no checkpoint of this format has")
        return super().find_class(module, name)


def _base(path: str | os.PathLike[str]) -> str:
    return str(path).rsplit("/", 1)[-1]
