"""``sixfold ui`` opens MLflow on this machine's runs; ``sixfold tracking replay`` sends what a run could not."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sixfold.tracking.mlflow import TrackedRun

FIRST_PORT = 5000
SHOWN_RUNS = 5


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(epilog="Example: sixfold ui --port 5001 --no-browser")(ui)
    tracking = typer.Typer(help="Work on what trackers hold.", no_args_is_help=True)
    tracking.command(epilog="Example: sixfold tracking replay runs/flow/dit-smoke/20250101-120000")(replay)
    app.add_typer(tracking, name="tracking")


def ui(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port on loopback.", show_default=f"{FIRST_PORT} or the next")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs, whose newest names the store.")] = Path("runs"),
    uri: Annotated[str | None, typer.Option(help="MLflow store to show instead.", show_default=False)] = None,
    browser: Annotated[bool, typer.Option(help="Open the newest run in a browser.")] = True,
) -> None:
    """Show this machine's runs in MLflow, until Ctrl-C."""
    import webbrowser

    from sixfold.tracking.mlflow import newest_runs
    from sixfold.tracking.server import MLflowServer

    stopped = _stop_event()
    store = _find_store(uri, runs)
    if store.startswith("http"):  # it has a server of its own
        _print_runs(_require_runs(newest_runs(store, SHOWN_RUNS), store), store)
        return
    with MLflowServer(store, port or _free_port()) as server:
        newest = _require_runs(newest_runs(store, SHOWN_RUNS), store)
        while not stopped.is_set() and not server.is_ready():
            stopped.wait(0.2)
        if stopped.is_set():
            return
        _print_runs(newest, server.address)
        typer.echo(f"MLflow is at {server.address}; Ctrl-C stops it")
        if browser:
            webbrowser.open(newest[0].link(server.address))
        while server.is_running and not stopped.wait(0.5):
            continue


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or a run id.")],
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to try for.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send what MLflow has not received of a run, for example because its server was away."""
    from sixfold.tracking.runs import find_run
    from sixfold.tracking.tracker import replay as replay_run

    folder = find_run(run)
    sent = replay_run(folder, timeout_s=timeout)
    typer.echo(json.dumps({"run": str(folder), "events_sent": sent}) if as_json else f"{folder}: {sent} events sent")


def _stop_event() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    return stopped


def _find_store(uri: str | None, runs: Path) -> str:
    """The store asked for, or the one of the run that was written to last, or the default one."""
    from sixfold.errors import UserError
    from sixfold.tracking.config import MLflowConfig
    from sixfold.tracking.runs import list_runs
    from sixfold.tracking.settings import MirrorSettings, absolute_uri, sqlite_path

    settings = (MirrorSettings.read(run) for run in list_runs(runs))
    kept = next((entry.uri for entry in settings if entry is not None), None)
    store = absolute_uri(uri or kept or MLflowConfig().uri)
    database = sqlite_path(store)
    if database is not None and not database.is_file():
        raise UserError.of(
            "there is no MLflow store yet",
            where=str(database),
            fix="train something first (`sixfold run flow/dit-smoke`), or name another store with --uri",
        )
    return store


def _require_runs(found: list[TrackedRun], store: str) -> list[TrackedRun]:
    from sixfold.errors import UserError

    if not found:
        raise UserError.of(
            "the MLflow store holds no runs",
            where=store,
            fix="train something first (`sixfold run flow/dit-smoke`), or name another store with --uri",
        )
    return found


def _print_runs(runs: list[TrackedRun], server: str) -> None:
    """Print links unbroken, so that a terminal makes them clickable."""
    for run in runs:
        link = run.link(server)
        typer.echo(f"{run.experiment}  {run.name}  {run.status.lower()}")
        typer.echo(f"  charts   {link}")
        typer.echo(f"  samples  {link.removesuffix('/model-metrics')}")


def _free_port() -> int:
    from sixfold.errors import EnvironmentFault
    from sixfold.tracking.server import is_free

    for port in range(FIRST_PORT, FIRST_PORT + 100):
        if is_free(port):
            return port
    raise EnvironmentFault.of(
        f"ports {FIRST_PORT} to {FIRST_PORT + 99} are all taken", fix="name a free one with --port"
    )
