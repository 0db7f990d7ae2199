"""Commands that only read: ``recipes``, ``show``, ``help`` and ``schema``. None of them imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RECIPE_HELP = "A recipe file, or a name that `sixfold recipes` lists."
OVERRIDES_HELP = "Settings to change, as a.b.c=value."


def register(app: typer.Typer) -> None:
    """Add the reading commands to the app."""
    app.command(epilog="Example: sixfold recipes")(recipes)
    app.command(epilog="Example: sixfold show flow/dit-smoke optimizer.lr=3e-4 --nproc 2")(show)
    app.command("help", epilog="Example: sixfold help engine.fsdp")(help_)
    app.command(epilog="Example: sixfold schema --out recipe.schema.json")(schema)


def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the recipes that can be run by name."""
    from sixfold.cli.screen import print_table
    from sixfold.recipe.catalogue import catalogue, summarise

    rows = [summarise(entry) for entry in catalogue()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    headings = ("name", "objective", "networks", "engine", "description")
    print_table(None, headings, [[row[heading] for heading in headings] for row in rows])


def show(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP, show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDES_HELP, show_default=False)] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks to check and derive for.", show_default="1")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: recipe, provenance and derived facts.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print the resolved recipe as YAML and nothing else.")] = False,
) -> None:
    """Show a resolved recipe, where each setting was written, and what follows from it."""
    from sixfold.cli.screen import print_table
    from sixfold.config.schema import spell_plain
    from sixfold.recipe.checks import check_recipe
    from sixfold.recipe.facts import derived_facts
    from sixfold.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    check_recipe(loaded.recipe, nproc, provenance=loaded.provenance)
    if plain:
        typer.echo(loaded.recipe.dump_yaml(), nl=False)
        return
    facts = derived_facts(loaded.recipe, nproc or 1)
    places = {key: loaded.provenance.where(key) for key, _ in leaves(loaded.recipe.resolved())}
    if as_json:
        record = {
            "source": str(loaded.source),
            "recipe": loaded.recipe.resolved(),
            "provenance": places,
            "facts": facts,
        }
        typer.echo(json.dumps(record, indent=2))
        return
    rows = [(key, spell_plain(value), places[key]) for key, value in leaves(loaded.recipe.resolved())]
    print_table(None, ("setting", "value", "from"), rows)
    typer.echo()
    print_table(
        None, ("derived", "value"), [(name, f"{v:,}" if isinstance(v, int) else v) for name, v in facts.items()]
    )


def help_(
    section: Annotated[
        str | None, typer.Argument(help="A section such as engine, engine.fsdp or objective.path.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Describe the settings of a recipe section: type, default, what is allowed."""
    from sixfold.cli.screen import print_table
    from sixfold.recipe.reference import describe

    tables = describe(section)
    if as_json:
        typer.echo(json.dumps([table.as_record() for table in tables], indent=2))
        return
    for index, table in enumerate(tables):
        if index:
            typer.echo()
        print_table(table.title, table.headings, table.rows)


def schema(
    out: Annotated[Path | None, typer.Option(help="Write to this file.", show_default="standard output")] = None,
) -> None:
    """Print the JSON Schema of recipe files, for completion in editors."""
    from sixfold.recipe.json_schema import recipe_file_schema

    text = json.dumps(recipe_file_schema(), indent=2)
    if out is None:
        typer.echo(text)
    else:
        out.write_text(text + "\n")


def leaves(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested settings to dotted keys; lists of scalars and empty containers are leaves."""
    nested = isinstance(values, dict) or (isinstance(values, list) and any(isinstance(v, dict) for v in values))
    if not nested or not values:
        return [(prefix, values)]
    entries = values.items() if isinstance(values, dict) else enumerate(values)
    return [leaf for key, value in entries for leaf in leaves(value, f"{prefix}.{key}" if prefix else str(key))]
