"""``sixfold plan``: what a recipe needs on a cluster, before anything is rented."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sixfold.cli.run_commands import JsonOption, OverridesArgument
from sixfold.cli.screen import print_table

if TYPE_CHECKING:
    from sixfold.planning.plan import Cluster, Plan
    from sixfold.recipe.recipe import Recipe

_GIB = 1 << 30


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("plan")(plan)


def plan(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe file, or a name.")] = None,
    overrides: OverridesArgument = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Devices (or CPU ranks) a machine.")] = 8,
    device: Annotated[str, typer.Option(help="h200, h100, a100, or cpu for this very machine.")] = "h200",
    every: Annotated[bool, typer.Option("--all", help="A line for each recipe that is too big for a laptop.")] = False,
    cheapest: Annotated[bool, typer.Option(help="Also look for the cheapest setting that fits.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe needs on a cluster: memory, arithmetic, communication, time and cost, without any of it.

    Example: sixfold plan lm/moe-16b-a3b --nodes 64 --device h200
    """
    from sixfold.errors import UserError
    from sixfold.planning.devices import DEVICE_NAMES, device_of
    from sixfold.planning.plan import Cluster

    if device not in DEVICE_NAMES:
        raise UserError.of(f"--device is {device!r}", allowed=", ".join(DEVICE_NAMES))
    cluster = Cluster(nodes=nodes, ranks_per_node=gpus_per_node, device=device_of(device, ranks_per_node=gpus_per_node))
    if every:
        if recipe is not None:
            raise UserError.of(f"--all plans every recipe as it is, not {recipe}", fix="leave one of the two out")
        _plan_all(cluster, as_json=as_json)
        return
    if recipe is None:
        raise UserError.of("no recipe is named", allowed="a recipe, or --all", fix="see `sixfold recipes`")
    _plan_one(_load(recipe, overrides or [], cluster), cluster, cheapest=cheapest, as_json=as_json)


def _load(name: str, overrides: list[str], cluster: Cluster) -> Recipe:
    from sixfold.recipe.checks import check_recipe
    from sixfold.recipe.load import load_recipe

    loaded = load_recipe(name, overrides)
    check_recipe(loaded.recipe, cluster.ranks, provenance=loaded.provenance)
    return loaded.recipe


def _plan_one(recipe: Recipe, cluster: Cluster, *, cheapest: bool, as_json: bool) -> None:
    from sixfold.planning.plan import Planner, describe_engine

    planner = Planner(recipe, cluster)
    found = planner.plan()
    best = planner.cheapest() if cheapest else None
    if as_json:
        record: dict[str, Any] = {"recipe": recipe.name, "ranks": cluster.ranks, "device": cluster.device.name}
        record |= found.as_record() | {"assumptions": vars(planner.assumptions)}
        typer.echo(json.dumps(record | {"cheapest": None if best is None else best.as_record()}))
        return
    columns = {"as it is": found} | ({} if best is None else {"cheapest that fits": best})
    title = f"{recipe.name} on {cluster.nodes} x {cluster.ranks_per_node} {cluster.device.name}"
    print_table(title, ("", *columns), _rows(list(columns.values()), cluster))
    for name, column in columns.items():
        typer.echo(f"{name}: {describe_engine(column.engine)}")
    if not found.fits:
        short = found.peak_bytes - cluster.device.usable_bytes
        typer.echo(f"as it is, it lacks {short / _GIB:.1f} GiB a rank; {_culprit(found)}")
    if cheapest and best is None:
        typer.echo("no setting fits: take more devices, or a smaller network")
    typer.echo(f"assumed: {_spell(vars(planner.assumptions))}; compiled kernels are not modelled")


def _rows(plans: list[Plan], cluster: Cluster) -> list[tuple[str, ...]]:
    from sixfold.planning.meter import bytes_by_kind

    device = cluster.device
    rows = [("parameters", *(f"{sum(plan.trace.parameters.values()):,}" for plan in plans))]
    rows.append(("samples at once, a rank", *(f"{plan.trace.micro_batch:,}" for plan in plans)))
    for use in plans[0].memory:
        if any(plan.memory[use] for plan in plans):
            rows.append((f"{use}, GiB a rank", *(f"{plan.memory[use] / _GIB:,.2f}" for plan in plans)))
    usable = f"of {device.usable_bytes / _GIB:,.1f}"
    rows.append(("in all, GiB a rank", *(f"{plan.peak_bytes / _GIB:,.2f} {usable}" for plan in plans)))
    rows.append(("fits", *("yes" if plan.fits else "no" for plan in plans)))
    rows.append(("TFLOP a rank and step", *(f"{plan.trace.flops / 1e12:,.1f}" for plan in plans)))
    sent = [bytes_by_kind(plan.trace.collectives) for plan in plans]
    for kind in sorted({kind for kinds in sent for kind in kinds}):
        rows.append((f"{kind}, GiB a step", *(f"{kinds.get(kind, 0) / _GIB:,.2f}" for kinds in sent)))
    for name, field in (("computing", "compute_s"), ("sending", "communication_s"), ("updating", "update_s")):
        rows.append((f"{name}, s", *(f"{getattr(plan.estimate, field):.3f}" for plan in plans)))
    rows.append(("step, s", *(f"{plan.estimate.step_s:.3f}" for plan in plans)))
    rows.append(("MFU", *(f"{plan.estimate.mfu:.1%}" for plan in plans)))
    rows.append(("days", *(f"{plan.estimate.days:,.2f}" for plan in plans)))
    if device.price_per_hour:
        costs = (f"{plan.estimate.cost:,.0f}" for plan in plans)
        rows.append((f"cost, USD at {device.price_per_hour} an hour", *costs))
    return rows


def _culprit(plan: Plan) -> str:
    use, size = max(plan.memory.items(), key=lambda entry: entry[1])
    return f"most is {use}, {size / _GIB:.1f} GiB"


def _spell(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _plan_all(cluster: Cluster, *, as_json: bool) -> None:
    """One line a recipe that is not of smoke size; one that cannot be planned there says why in its line."""
    from sixfold.errors import SixfoldError
    from sixfold.pipeline.load import is_pipeline
    from sixfold.planning.plan import Planner
    from sixfold.recipe.catalogue import catalogue

    records: list[dict[str, Any]] = []
    full_size = [
        entry for entry in catalogue() if not is_pipeline(entry.path) and not entry.name.endswith(("-smoke", "-cpu"))
    ]
    for number, entry in enumerate(full_size, start=1):
        typer.echo(f"planning {number} of {len(full_size)}: {entry.name}", err=True)
        try:
            found = Planner(_load(entry.name, [], cluster), cluster).plan()
        except SixfoldError as error:
            records.append({"recipe": entry.name, "fault": error.faults[0].what})
        else:
            records.append({"recipe": entry.name, **found.as_record()})
    if as_json:
        typer.echo(json.dumps(records))
        return
    title = f"{cluster.nodes} x {cluster.ranks_per_node} {cluster.device.name}"
    headings = ("recipe", "parameters", "GiB a rank", "fits", "step, s", "MFU", "days")
    print_table(title, headings, [_line(record) for record in records if "fault" not in record])
    for record in records:
        if "fault" in record:
            typer.echo(f"{record['recipe']}: no plan: {record['fault']}")


def _line(record: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(record["recipe"]),
        f"{sum(record['parameters'].values()) / 1e6:,.0f}M",
        f"{record['peak_bytes'] / _GIB:.1f}",
        "yes" if record["fits"] else "no",
        f"{record['step_s']:.3f}",
        f"{record['mfu']:.0%}",
        f"{record['days']:.1f}",
    )
