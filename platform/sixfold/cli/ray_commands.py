"""``sixfold ray``: a Ray cluster of several nodes on this machine, to try what runs on a real one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    commands = typer.Typer(help="A Ray cluster of several nodes on this machine.", no_args_is_help=True)
    commands.command("up")(up)
    commands.command("down")(down)
    commands.command("status")(status)
    app.add_typer(commands, name="ray")


def up(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Nodes, the head among them.")] = 2,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="CPUs each node offers; Ray only counts them.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Start the cluster, or bring a running one up to so many nodes.

    Example: sixfold ray up --nodes 2, then sixfold submit lm/moe-smoke --to ray
    """
    from sixfold_launchers.ray_cluster import default_folder
    from sixfold_launchers.ray_cluster import up as bring_up

    bring_up(default_folder(), nodes=nodes, cpus_per_node=cpus_per_node)
    status(as_json)


def down() -> None:
    """Stop the cluster: what `sixfold ray up` started and what runs on it, no other Ray of this machine.

    Example: sixfold ray down
    """
    from sixfold_launchers.ray_cluster import default_folder
    from sixfold_launchers.ray_cluster import down as take_down

    ended = take_down(default_folder())
    typer.echo(f"{ended} processes ended" if ended else "no cluster was up")


def status(as_json: JsonOption = False) -> None:
    """Say which nodes run, and where jobs are submitted.

    Example: sixfold ray status --json
    """
    from sixfold_launchers.ray_cluster import default_folder, describe, find

    cluster = find(default_folder())
    if cluster is None:
        typer.echo(json.dumps({"nodes": 0}) if as_json else "no cluster is up; `sixfold ray up` starts one")
        return
    facts = describe(cluster)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):14} {value}")
