"""Connecting to any protocol that fsspec knows, and what its stores call the version of an object."""

from __future__ import annotations

from typing import Any

import fsspec

from sixfold.errors import DataError, EnvironmentFault


def connect(url: str) -> Any:
    """Return an fsspec file system of this process's own for a URL.

    Raises:
        EnvironmentFault: the library for this protocol is not installed; says which.
        DataError: there is no such protocol.
    """
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise EnvironmentFault.of(
            f"reading {protocol}:// needs a package that is not installed ({error})",
            where=url,
            fix='pip install "sixfold[remote]", or the fsspec package that the message names',
        ) from error
    except ValueError as error:
        raise DataError.of(
            f"{protocol!r} is not a protocol that fsspec knows",
            where=url,
            allowed="a folder, or a URL such as s3://, gs://, az://, https://, memory://",
        ) from error
    return fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)[0]


def version_mark(info: dict[str, Any]) -> str | None:
    """Return the etag in an object's information, ``modified:<time>`` where there is none, or None."""
    for name in ("ETag", "etag"):
        if info.get(name):
            return str(info[name]).removeprefix("W/").strip('"')
    for name in ("LastModified", "Last-Modified", "last_modified", "mtime"):
        if info.get(name):
            return f"modified:{info[name]}"
    return None
