"""Retrying reads of a remote store: which failures are worth repeating, how long to wait, and when to give up."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from sixfold.errors import EnvironmentFault, SixfoldError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# Client libraries are optional extras: their exceptions are known by name, so that none of them is imported here.
_TRANSIENT_NAMES = frozenset(
    {"ClientConnectionError", "ClientPayloadError", "HTTPClientError", "IncompleteRead", "FSTimeoutError"}
)


class ShortReadError(OSError):
    """Fewer bytes arrived than were asked for; the connection may have been cut, so it is worth a second try."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Exponential back-off with full jitter (Brooker, "Exponential Backoff And Jitter", 2015).

    Before attempt ``k`` (from 1) the wait is uniform in ``[0, min(cap_s, base_s * 2**(k - 1))]``: many readers that
    failed together do not come back together.
    """

    attempts: int = 7
    base_s: float = 0.25
    cap_s: float = 20.0

    def wait_s(self, failures: int) -> float:
        """Return a random wait in seconds after ``failures`` failed attempts."""
        return random.uniform(0.0, min(self.cap_s, self.base_s * 2.0 ** (failures - 1)))

    def call(self, action: Callable[[], Result], *, where: str) -> Result:
        """Return ``action()``, repeated while it fails in a transient way.

        Raises:
            EnvironmentFault: the store still failed at the last attempt; names ``where`` and the last failure.
            OSError: any other failure of the action, unchanged.
        """
        for failures in range(1, self.attempts + 1):
            try:
                return action()
            except SixfoldError:
                raise
            except Exception as error:  # client libraries share no base class; what is not transient is raised again
                if not is_transient(error):
                    raise
                if failures == self.attempts:
                    raise _gave_up(where, failures, error) from error
                logger.info("%s: attempt %d failed (%s), trying again", where, failures, describe(error))
                time.sleep(self.wait_s(failures))
        raise AssertionError("a retry policy has at least one attempt")


def is_transient(error: BaseException) -> bool:
    """Whether repeating the request may help: a cut connection, a timeout, throttling, a server at fault.

    The status of a response decides when there is one, because libraries wrap a 503 in errors as unlike as
    ``FileNotFoundError`` (fsspec's HTTP) and ``OSError`` (s3fs).
    """
    statuses = http_statuses(error)
    if statuses:
        return not _TRANSIENT_STATUS.isdisjoint(statuses)
    return any(_is_connection_failure(link) for link in _chain(error))


def http_statuses(error: BaseException) -> list[int]:
    """Return the HTTP statuses that an error and what caused it carry."""
    return [status for status in map(_status, _chain(error)) if status is not None]


def describe(error: BaseException) -> str:
    """Return an error as one short line that keeps its type, for people who know the library."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an aiohttp or botocore error carries."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    return None


def _is_connection_failure(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError | ShortReadError):
        return True
    return any(base.__name__ in _TRANSIENT_NAMES for base in type(error).__mro__)


def _gave_up(where: str, attempts: int, error: BaseException) -> SixfoldError:
    return EnvironmentFault.of(
        f"the store did not answer properly in {attempts} attempts; the last failure was {describe(error)}",
        where=where,
        fix="check that the store is reachable from this node and that its limits on requests are not exceeded",
    )
