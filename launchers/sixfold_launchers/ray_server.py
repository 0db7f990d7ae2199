"""The HTTP side of a Ray cluster: nodes, jobs and packages of code; needs no Ray on this machine.

Ray's job client speaks the same interface; it takes seconds to import, and packs what is not ignored by git where a
snapshot is to be shipped as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sixfold.errors import EnvironmentFault, UserError

MAX_PACKAGE_BYTES = 512 << 20  # Ray refuses larger ones
_TIMEOUT_S = 90.0  # a job server answers a submission once an agent has taken the job
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can name: equal trees make equal packages


@dataclass(frozen=True)
class RayServer:
    """A cluster's dashboard, which is its job server too.

    Attributes:
        address: such as ``http://127.0.0.1:8265``.
        token_file: file with the cluster's token; None where it asks for none.
    """

    address: str
    token_file: Path | None

    def nodes(self) -> list[dict[str, Any]]:
        """Living nodes with their ``resources_total``.

        Raises:
            EnvironmentFault: the cluster does not answer, or refuses the token.
        """
        reply = self._ask("GET", "/api/v0/nodes?limit=10000&detail=true", expects="data")
        return [node for node in reply["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def version(self) -> str:
        """The cluster's version of Ray.

        Raises:
            EnvironmentFault: the cluster does not answer, or refuses the token.
        """
        version: str = self._ask("GET", "/api/version", expects="ray_version")["ray_version"]
        return version

    def submit(self, job: Mapping[str, Any]) -> str:
        """Submit a job; return its submission id.

        Raises:
            EnvironmentFault: the cluster does not answer, or cannot take the job now.
        """
        body = json.dumps(job).encode()
        submitted: str = self._ask("POST", "/api/jobs/", body, expects="submission_id")["submission_id"]
        return submitted

    def jobs(self) -> list[dict[str, Any]]:
        """Every job that the cluster remembers.

        Raises:
            EnvironmentFault: the cluster does not answer, or refuses the token.
        """
        found: list[dict[str, Any]] = self._ask("GET", "/api/jobs/", expects=list)
        return found

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """What the cluster knows of a job; None if it knows none.

        Raises:
            EnvironmentFault: the cluster does not answer, or refuses the token.
        """
        try:
            found: dict[str, Any] = self._ask("GET", f"/api/jobs/{submission_id}")
        except NotThere:
            self.version()  # that no job is known is a dashboard's answer, or any other server's
            return None
        return found

    def stop(self, submission_id: str) -> None:
        """End a job's driver, and with it its ranks."""
        self._ask("POST", f"/api/jobs/{submission_id}/stop", b"")

    def upload(self, tree: Path) -> str:
        """Upload a folder as a package, once for equal folders; return the URI by which jobs name it.

        Raises:
            UserError: it is larger than Ray takes.
        """
        data = packed(tree)
        name = f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:32]}.zip"
        try:
            self._ask("GET", f"/api/packages/gcs/{name}")
        except NotThere:
            self._ask("PUT", f"/api/packages/gcs/{name}", data)
        return f"gcs://{name}"

    def _ask(
        self, method: str, path: str, body: bytes | None = None, *, expects: str | type[list[Any]] | None = None
    ) -> Any:
        """Ask, and read the answer: a list, or an object with the key named, where every dashboard's is."""
        if expects is None:
            return self._reply(method, path, body)
        try:
            reply = self._reply(method, path, body)
        except NotThere:
            reply = None
        is_dashboards = isinstance(reply, list) if expects is list else isinstance(reply, dict) and expects in reply
        if not is_dashboards:
            raise EnvironmentFault.of(
                "what answers there is no Ray dashboard",
                where=f"{self.address}{path}",
                fix="check the host and port in the profile's `address`",
            )
        return reply

    def _reply(self, method: str, path: str, body: bytes | None) -> Any:
        headers = {} if body is None else {"Content-Type": "application/json"}
        if self.token_file is not None:
            headers["Authorization"] = f"Bearer {_read_token(self.token_file)}"
        request = urllib.request.Request(f"{self.address}{path}", data=body, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error, path) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise EnvironmentFault.of(
                f"the Ray cluster does not answer: {reason}",
                where=self.address,
                fix="check the profile's `address`, and that the cluster is up (here: `sixfold ray up`)",
            ) from error
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text.decode(errors="replace")

    def _refusal(self, error: urllib.error.HTTPError, path: str) -> Exception:
        if error.code in (401, 403):
            return EnvironmentFault.of(
                "the Ray cluster refuses the token" if self.token_file else "the Ray cluster asks for a token",
                where=f"{self.address}, token in {self.token_file or 'no file'}",
                fix="name the cluster's own token file as the profile's `token_file`",
            )
        words = error.read().decode(errors="replace").strip().splitlines()
        if error.code == 404:
            return NotThere(path)
        return EnvironmentFault.of(
            f"the Ray cluster refused ({error.code}): {words[-1] if words else error.reason}",
            where=f"{self.address}{path}",
            fix="look at the cluster's dashboard; try again when its head has an agent that takes jobs",
        )


class NotThere(Exception):
    """The cluster knows no such thing."""


def packed(tree: Path) -> bytes:
    """A folder's files as a zip; equal trees give equal bytes.

    Raises:
        UserError: the files are larger than Ray takes.
    """
    files = sorted(path for path in tree.rglob("*") if path.is_file() or path.is_symlink())
    size = sum(path.lstat().st_size for path in files)
    if size > MAX_PACKAGE_BYTES:
        raise UserError.of(
            f"the code snapshot has {size / 2**20:,.0f} MiB",
            where=str(tree),
            allowed=f"{MAX_PACKAGE_BYTES >> 20} MiB for a job on Ray",
            fix="keep large files out of git, or set the profile's snapshot.policy to installed",
        )
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as package:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(tree).as_posix(), _EPOCH)
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            package.writestr(entry, path.read_bytes())
    return output.getvalue()


def _read_token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise EnvironmentFault.of(
            f"the cluster's token cannot be read: {error.strerror}",
            where=str(path),
            fix="name the cluster's own token file as the profile's `token_file`",
        ) from error
