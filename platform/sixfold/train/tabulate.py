"""One table of several runs, each sampled in several ways: what quality costs, in evaluations and in time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from sixfold.distributed.process_group import World
from sixfold.errors import UserError
from sixfold.evaluation.contract import Estimate
from sixfold.evaluation.grid import sample_grid
from sixfold.evaluation.report import spelled
from sixfold.objectives.contract import Networks
from sixfold.recipe.recipe import Recipe
from sixfold.recipe.trained import RUN
from sixfold.train.evaluator import Evaluator
from sixfold.train.inference import Trained, load_trained
from sixfold.train.sampling import SampleOptions, adjusted

_COLUMNS = 10


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of sampling a run; None leaves the recipe's own."""

    run: Path
    steps: int | None = None
    sampler: str | None = None
    guidance: str | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one way gave.

    Attributes:
        name: the run's recipe.
        sampler: type of the sampler.
        steps: its steps.
        guidance: type and scale.
        evaluations: network evaluations for one sample; two where guidance asks twice.
        seconds_per_sample: of drawing, batched as in evaluation; without what the metrics cost.
        estimates: the metrics.
        images: a few samples.
    """

    name: str
    sampler: str
    steps: int | None
    guidance: str
    evaluations: float
    seconds_per_sample: float
    estimates: Sequence[Estimate]
    images: Tensor | None

    def label(self) -> str:
        """A short name for pictures."""
        return f"{self.name.rpartition('/')[2]}, {self.evaluations:g} evaluations"


def tabulate(ways: Sequence[Way], *, cache: Path, samples: int | None, say: Callable[[str], None]) -> list[Line]:
    """Sample and measure every way in turn; runs are loaded once, reference features are shared through ``cache``.

    Raises:
        UserError: a run has no sampling or evaluation section, or a way does not fit it.
    """
    loaded: dict[Path, Trained] = {}
    lines = []
    for number, way in enumerate(ways, start=1):
        if way.run not in loaded:
            loaded = {way.run: load_trained(way.run)}
        trained = loaded[way.run]
        recipe = recipe_of(trained.recipe, way, samples)
        lines.append(_line(trained, recipe, cache))
        say(f"{number} of {len(ways)}: {_spelled(lines[-1])}")
    return lines


def recipe_of(recipe: Recipe, way: Way, samples: int | None) -> Recipe:
    """Return a run's recipe with the way's sampling, and as many samples as are asked for."""
    if recipe.sampling is None or recipe.evaluation is None:
        raise UserError.of("the run's recipe has no sampling or no evaluation section", where=str(way.run))
    changed = adjusted(recipe, SampleOptions(count=1, sampler=way.sampler, guidance=way.guidance))
    if way.steps is not None and changed.sampling is not None:
        if "steps" not in type(changed.sampling).model_fields:
            raise UserError.of(f"sampler {changed.sampling.type} has no steps", where=str(way.run))
        changed = changed.model_copy(update={"sampling": changed.sampling.model_copy(update={"steps": way.steps})})
    if samples is not None:
        evaluation = recipe.evaluation.model_copy(update={"samples": samples})
        changed = changed.model_copy(update={"evaluation": evaluation})
    return changed


def write_table(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write ``table.md``, ``table.json`` and, of images, ``samples.png`` with one row a line."""
    folder.mkdir(parents=True, exist_ok=True)
    headings, rows = table(lines)
    markdown = [" | ".join(row) for row in (headings, ["---"] * len(headings), *rows)]
    written = [folder / "table.md", folder / "table.json"]
    written[0].write_text("".join(f"| {row} |\n" for row in markdown))
    written[1].write_text(json.dumps([as_record(line) for line in lines], indent=2) + "\n")
    shown = [line for line in lines if line.images is not None]
    if shown:
        images = [image for line in shown if line.images is not None for image in line.images[:_COLUMNS]]
        captions = [text for line in shown for text in [line.label(), *[""] * (_COLUMNS - 1)]]
        written.append(folder / "samples.png")
        sample_grid(images, captions if len(captions) == len(images) else None, columns=_COLUMNS).save(written[-1])
    return written


def table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: how it was sampled, what that cost, every metric that some line has."""
    metrics = list(dict.fromkeys(estimate.name for line in lines for estimate in line.estimates))
    headings = ["run", "sampler", "steps", "guidance", "evaluations", "ms / sample", *metrics]
    rows = []
    for line in lines:
        values = {estimate.name: spelled(estimate) for estimate in line.estimates}
        how = [line.name, line.sampler, "" if line.steps is None else str(line.steps), line.guidance]
        cost = [f"{line.evaluations:g}", f"{1e3 * line.seconds_per_sample:.2f}"]
        rows.append([*how, *cost, *(values.get(name, "") for name in metrics)])
    return headings, rows


def as_record(line: Line) -> dict[str, object]:
    """Return a line as plain data."""
    known = ("name", "sampler", "steps", "guidance", "evaluations", "seconds_per_sample")
    record = {name: getattr(line, name) for name in known}
    return record | {estimate.name: estimate.value for estimate in line.estimates}


def _line(trained: Trained, recipe: Recipe, cache: Path) -> Line:
    counting = _Counting(trained.networks)
    evaluator = Evaluator(recipe, World(device=trained.device), cache)
    shown = evaluator.samples_to_show(trained.networks)  # first, since whatever is drawn first takes longer
    before = evaluator.drawing_s
    estimates = evaluator.sample_estimates(counting.networks)
    count = max((estimate.samples for estimate in estimates), default=evaluator.config.show_samples)
    if not estimates:  # no metric draws samples; what one costs is to be known all the same
        evaluator.samples_to_show(counting.networks)
    seconds = evaluator.drawing_s - before
    sampling, guidance = recipe.sampling, getattr(recipe.sampling, "guidance", None)
    assert sampling is not None
    return Line(
        name=recipe.name,
        sampler=sampling.type,
        steps=getattr(sampling, "steps", None),
        guidance="" if guidance is None else f"{guidance.type} {getattr(guidance, 'scale', '')}".strip(),
        evaluations=counting.rows / count,
        seconds_per_sample=seconds / count,
        estimates=estimates,
        images=None if shown is None or not shown.are_images else shown.fields["image"].cpu(),
    )


class _Counting:
    """Networks that count the rows their denoiser is asked about."""

    def __init__(self, networks: Networks) -> None:
        self.rows = 0
        self.networks: Networks = {
            role: _Counted(network, self) if role == "denoiser" else network for role, network in networks.items()
        }


class _Counted(nn.Module):
    def __init__(self, network: nn.Module, counting: _Counting) -> None:
        super().__init__()
        self.network, self.counting = network, counting

    def forward(self, x: Tensor, *inputs: object, **named: object) -> Tensor:
        self.counting.rows += len(x)
        value: Tensor = self.network(x, *inputs, **named)
        return value


def _spelled(line: Line) -> str:
    values = ", ".join(f"{estimate.name} {spelled(estimate)}" for estimate in line.estimates[:4])
    return f"{line.name} by {line.sampler}, {line.evaluations:g} evaluations: {values}"


def ways_of(reference: str, find: Callable[[str], Path], *, sampler: str | None, guidances: Sequence[str]) -> list[Way]:
    """Read ``RUN`` or ``RUN@1,2,4`` (numbers of steps), once for each guidance.

    Raises:
        UserError: there is no such run, or what follows its @ are no numbers of steps.
    """
    name, _, numbers = reference.rpartition("@")
    told = bool(name) and all(part.isdecimal() and int(part) > 0 for part in numbers.split(","))
    if name and not told and not name.startswith(RUN) and Path(name).exists():
        raise UserError.of(
            f"{numbers!r} are no numbers of steps",
            where=reference,
            allowed="positive numbers, with commas between them",
        )
    steps: list[int | None] = [int(part) for part in numbers.split(",")] if told else [None]
    base = Way(run=find(name if told else reference), sampler=sampler)
    return [replace(base, steps=count, guidance=scale) for count in steps for scale in (guidances or (None,))]
