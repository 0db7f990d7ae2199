"""Code snapshots: exactly what git tracks, with uncommitted changes if asked for, fixed by the hash of the tree.

The hash is git's own tree id, so equal code has one copy however often it is submitted. The tree is built in an index
and an object folder of its own: the user's checkout is only read. Where Sixfold does not run from a checkout, jobs use
the installed package.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sixfold.errors import EnvironmentFault, Fault, UserError
from sixfold.tracking.environment import SNAPSHOT_RECORD

Policy = Literal["tracked", "changes", "installed"]
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Which code a job runs.

    Attributes:
        policy: what was asked for; ``installed`` where there is no checkout.
        checkout: the checkout that was looked at, if any.
        commit: HEAD of it.
        tree: git's hash of the shipped tree; None for the installed package.
        difference: uncommitted changes that are shipped, as a diff against HEAD.
        not_shipped: files that lie in the checkout and do not travel.
    """

    policy: Policy
    checkout: Path | None = None
    commit: str | None = None
    tree: str | None = None
    difference: str = ""
    not_shipped: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A folder name that equal code shares."""
        return f"{(self.commit or '')[:12]}-{(self.tree or '')[:12]}"

    def record(self) -> dict[str, object]:
        """What a run keeps of it, besides the diff."""
        plain = {key: value for key, value in asdict(self).items() if key not in ("checkout", "difference")}
        digest = hashlib.sha256(self.difference.encode()).hexdigest() if self.difference else None
        return {**plain, "dirty": bool(self.difference), "difference_sha256": digest}

    def summary(self) -> list[str]:
        """Say in a few lines what is shipped and what is not."""
        if self.tree is None:
            why = "as asked" if self.checkout is not None else "Sixfold runs from no git checkout here"
            return [f"code: the package installed on the nodes ({why}); nothing is shipped"]
        changes = " with uncommitted changes" if self.difference else ""
        lines = [f"code: commit {(self.commit or '')[:12]}{changes}, tree {self.tree[:12]}"]
        if self.not_shipped:
            more = f" and {len(self.not_shipped) - _SHOWN} more" if len(self.not_shipped) > _SHOWN else ""
            lines.append(f"not shipped (git does not track it): {', '.join(self.not_shipped[:_SHOWN])}{more}")
        return lines


def plan_snapshot(policy: Policy, near: Path = Path(__file__)) -> Snapshot:
    """Say what would be shipped of the checkout around ``near``; writes nothing into it.

    Raises:
        UserError: the policy is ``tracked`` and tracked files differ from HEAD.
    """
    checkout = _checkout_around(near)
    if checkout is None or policy == "installed":
        return Snapshot(policy="installed", checkout=checkout)
    changed = _lines(_git(checkout, "diff", "--name-only", "HEAD"))
    if policy == "tracked" and changed:
        raise UserError(_dirty(checkout, changed))
    with _tree_of(checkout) as (tree, _):
        return Snapshot(
            policy=policy,
            checkout=checkout,
            commit=_git(checkout, "rev-parse", "HEAD").decode().strip(),
            tree=tree,
            difference=_git(checkout, "diff", "HEAD").decode(errors="replace"),
            not_shipped=_untracked(checkout),
        )


def ship(snapshot: Snapshot, target: Path) -> None:
    """Write the snapshot to ``target``, unless it lies there already; its name says which code it is.

    Raises:
        UserError: the checkout has changed since the snapshot was planned.
    """
    if target.is_dir() or snapshot.checkout is None:
        return
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".shipping-", dir=folder))
    try:
        with _tree_of(snapshot.checkout) as (tree, environment):
            if tree != snapshot.tree:
                raise UserError.of(
                    "the code changed while it was being submitted", where=str(snapshot.checkout), fix="submit again"
                )
            archive = _git(snapshot.checkout, "archive", "--format=tar", tree, environment=environment)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(temporary, filter="data")
        (temporary / SNAPSHOT_RECORD).write_text(json.dumps(snapshot.record(), indent=2) + "\n")
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # else another submission of the same code was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def record_code(snapshot: Snapshot, run_folder: Path) -> None:
    """Keep in a run which code it runs: ``code.json``, and ``code.diff`` if there are uncommitted changes."""
    (run_folder / "code.json").write_text(json.dumps(snapshot.record(), indent=2) + "\n")
    difference = run_folder / "code.diff"
    if snapshot.difference:
        difference.write_text(snapshot.difference)
    else:
        difference.unlink(missing_ok=True)


def _dirty(checkout: Path, changed: Sequence[str]) -> Fault:
    shown = ", ".join(changed[:_SHOWN]) + (f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")
    return Fault(
        what=f"{len(changed)} tracked files differ from HEAD, and the job would not run them: {shown}",
        where=str(checkout),
        fix="commit them, or ship them as they are with --with snapshot.policy=changes (the diff is kept in the run)",
    )


def _checkout_around(near: Path) -> Path | None:
    folder = near if near.is_dir() else near.parent
    try:
        _git(folder, "ls-files", "--error-unmatch", ".")
        root = _git(folder, "rev-parse", "--show-toplevel").decode().strip()
        _git(folder, "rev-parse", "--verify", "HEAD")
    except EnvironmentFault:
        return None
    return Path(root)


@contextmanager
def _tree_of(checkout: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield git's hash of the tracked files as they lie in the checkout, and the environment that can read it."""
    git_folder = Path(_git(checkout, "rev-parse", "--absolute-git-dir").decode().strip())
    objects = _git(checkout, "rev-parse", "--path-format=absolute", "--git-path", "objects").decode().strip()
    with tempfile.TemporaryDirectory(prefix="sixfold-tree-") as scratch:
        environment = {
            "GIT_INDEX_FILE": f"{scratch}/index",
            "GIT_OBJECT_DIRECTORY": f"{scratch}/objects",
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects,
        }
        Path(scratch, "objects").mkdir()
        shutil.copy(git_folder / "index", environment["GIT_INDEX_FILE"])
        _git(checkout, "add", "--update", ":/", environment=environment)
        yield _git(checkout, "write-tree", environment=environment).decode().strip(), environment


def _untracked(checkout: Path) -> tuple[str, ...]:
    listed = _git(checkout, "ls-files", "--others", "--exclude-standard", "--directory", "--full-name", ":/")
    return tuple(_lines(listed))


def _lines(output: bytes) -> list[str]:
    return output.decode(errors="replace").splitlines()


def _git(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> bytes:
    """Run git and return its output.

    Raises:
        EnvironmentFault: git is missing or refuses.
    """
    try:
        return subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        raise EnvironmentFault.of(
            f"git {arguments[0]} failed: {said.decode(errors='replace').strip() or error}",
            where=str(folder),
            fix="mend the checkout, or run the installed package with --with snapshot.policy=installed",
        ) from error
