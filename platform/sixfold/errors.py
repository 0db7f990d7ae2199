"""The exceptions a user can act on, and the exit codes of the command.

Every error says what is wrong, where, what is allowed and how to mend it; the command prints that as one screen and
never a traceback. Invariants of the code itself are plain ``assert`` statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong: what, where, what is allowed, how to mend it."""

    what: str
    where: str | None = None  # "recipes/lm/moe-smoke.yaml:12", "shard-000003.tar", "networks.denoiser.heads"
    allowed: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        lines = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.allowed is not None:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix is not None:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class SixfoldError(Exception):
    """Base of all errors the platform raises on purpose. Exit code 1."""

    exit_code = 1

    def __init__(self, *faults: Fault) -> None:
        self.faults: Sequence[Fault] = faults
        super().__init__("\n".join(str(fault) for fault in faults))

    @classmethod
    def of(
        cls, what: str, *, where: str | None = None, allowed: str | None = None, fix: str | None = None
    ) -> SixfoldError:
        """Build the error from a single fault (``raise DataError.of("...", where=...)``)."""
        return cls(Fault(what=what, where=where, allowed=allowed, fix=fix))


class UserError(SixfoldError):
    """The user's input is at fault. Exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe (or an override of it) is malformed or inconsistent."""


class DataError(UserError):
    """A data set is malformed, has changed, or exceeded its budget of unreadable samples."""


class CheckpointError(UserError):
    """A checkpoint does not verify or does not belong to this run."""


class EnvironmentFault(SixfoldError):
    """The machine is at fault: a missing package, a full disk, an unreachable store. Exit code 3."""

    exit_code = 3


class TrainingError(SixfoldError):
    """Training itself failed, for example too many consecutive non-finite steps. Exit code 1."""


def user_facing(error: Exception) -> SixfoldError | None:
    """Return the error to show instead of a traceback: itself, or what the operating system refused; None for others.

    The second is for refusals (a folder that cannot be made or written) that no closer place had better words for. An
    ``OSError`` without a number was raised by a library in its own words, and is no refusal of the system's.
    """
    if isinstance(error, SixfoldError):
        return error
    if not isinstance(error, OSError) or error.errno is None:
        return None
    return EnvironmentFault(
        Fault(
            what=f"the system refused: {error.strerror}",
            where=None if error.filename is None else str(error.filename),
            fix="check that the path exists, may be used like this, and has room on its disk; then try again",
        )
    )
