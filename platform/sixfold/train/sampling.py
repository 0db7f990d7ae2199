"""Samples by command: a run's own way of sampling, with changes, written as pictures, texts or shards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sixfold.config.schema import Slot, nearest
from sixfold.errors import UserError
from sixfold.evaluation.grid import to_picture
from sixfold.models.text_encoder.config import CAPTION
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.samplers.config import EulerConfig, SamplingConfig
from sixfold.samplers.contract import Sampler, SampleRequest
from sixfold.train.inference import Trained, load_trained
from sixfold.train.run_folder import RunFolder
from sixfold.train.samples import Samples, conditions_of, draw, no_such_class
from sixfold_data.build import TRAIN, BuildOptions, building
from sixfold_data.build_images import encode_png
from sixfold_data.describe import DataInfo, describe

_BATCH = 256
_PREVIEW_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What a draw by command may change or choose; None leaves the recipe's own.

    Attributes:
        count: how many samples.
        seed: of the draw.
        steps: solver steps, or new tokens.
        sampler: a sampler's type; what it shares with the recipe's (steps, grid, guidance) is kept.
        guidance: ``none``, a scale, a type, or ``type:scale``.
        guide: a run, or ``RUN@STEP``, whose network is the weaker one of autoguidance, which then is the type of a
            guidance that names none.
        label: a class by number or name.
        prompt: text that samples continue or show.
        grid_only: write the overview alone.
        out: folder to write to.
        shards: write a data set of shards there instead of single files.
    """

    count: int
    seed: int = 0
    steps: int | None = None
    sampler: str | None = None
    guidance: str | None = None
    guide: str | None = None
    label: str | None = None
    prompt: str | None = None
    grid_only: bool = False
    out: Path | None = None
    shards: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a draw wrote, and lines to show of it."""

    step: int
    folder: Path
    files: list[Path]
    preview: list[str]


def sample_run(run: Path, options: SampleOptions) -> Written:
    """Draw samples and write them to ``out`` (by default ``samples/drawn-step_N`` in the run folder), or as shards.

    Raises:
        UserError: the run has no sampler or no checkpoint, or an option does not fit it.
        DataError: the shards' folder is not empty.
    """
    trained = load_trained(run, overrides=() if options.guide is None else guide_overrides(options.guide))
    if trained.recipe.sampling is None:
        raise UserError.of("the run's recipe has no sampling section", where=str(run), fix="add one and resume the run")
    recipe = adjusted(trained.recipe, options)
    check_recipe(recipe)
    info = describe(recipe.data)
    conditions = conditions_of(
        recipe, info, options.count, label=_label_number(options.label, info), prompt=options.prompt
    )
    step = trained.candidate.step
    if options.shards is not None:
        files = write_shards(options.shards, _passes(trained, recipe, options, conditions, info), info)
        return Written(step=step, folder=options.shards, files=files, preview=[])
    parts = list(_passes(trained, recipe, options, conditions, info))
    fields = {name: torch.cat([part.fields[name] for part in parts]) for name in parts[0].fields}
    samples = Samples(fields=fields, conditions=conditions, info=info)
    folder = options.out if options.out is not None else RunFolder(run).samples / f"drawn-step_{step}"
    files = samples.write(folder, overview_only=options.grid_only)
    preview = [] if samples.are_images else [text[:_PREVIEW_CHARACTERS] for text in samples.texts[:1]]
    return Written(step=step, folder=folder, files=files, preview=preview)


def adjusted(recipe: Recipe, options: SampleOptions) -> Recipe:
    """Return the recipe with the sampler and guidance that the options ask for.

    Raises:
        UserError: there is no such sampler or guidance, or the run's kind of model has none.
    """
    assert recipe.sampling is not None
    values: dict[str, Any] = recipe.sampling.model_dump()
    if options.sampler is not None:
        kinds = Slot.of_field(Recipe.model_fields["sampling"]).kinds()
        fitting = recipe.objective.fit.samplers
        if options.sampler not in fitting:
            meant = nearest(options.sampler, list(fitting))
            raise UserError.of(
                f"there is no sampler {options.sampler!r} for objective {recipe.objective.type}",
                where="--sampler",
                allowed=", ".join(fitting),
                fix=f"did you mean {meant}?" if meant else None,
            )
        fields = kinds[options.sampler].model_fields
        values = {name: value for name, value in values.items() if name in fields} | {"type": options.sampler}
    if options.guidance is not None or options.guide is not None:
        if "guidance" not in values:
            raise UserError.of(f"sampler {values['type']} has no guidance", where="--guidance", fix="leave it out")
        present = values["guidance"]
        if options.guide is not None and present["type"] not in ("autoguidance", "combined"):
            present = {"type": "autoguidance"}
        values["guidance"] = present if options.guidance is None else _guidance(options.guidance, present)
    try:
        sampling: Any = TypeAdapter(SamplingConfig).validate_python(values)
    except ValidationError as error:
        raise UserError.of(str(error.errors()[0]["msg"]), where="--guidance") from error
    return recipe.model_copy(update={"sampling": sampling})


def guide_overrides(guide: str) -> list[str]:
    """Return the changes of a recipe by which another run, or an earlier step of one, becomes its guide."""
    run, _, step = guide.rpartition("@")
    named = {"run": run, "step": int(step)} if run and step.isdecimal() else {"run": guide}
    return [f"networks.guide={json.dumps({'type': 'trained', **named})}", "objective.guide=guide"]


def _guidance(text: str, present: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``none``, ``2.5``, ``cfg_zero`` or ``cfg_zero:2.5``; what the present guidance shares with it is kept."""
    kind, _, scale = text.rpartition(":") if ":" in text or _is_number(text) else (text, "", "")
    kinds = {
        name: settings
        for name, settings in Slot.of_field(EulerConfig.model_fields["guidance"]).kinds().items()
        if name != "combined"
    }
    kind = kind or (present["type"] if present["type"] not in ("none", "combined") else "cfg")
    if kind not in kinds or (scale and not _is_number(scale)):
        raise UserError.of(
            f"there is no guidance {text!r}",
            where="--guidance",
            allowed=f"a scale, or one of {', '.join(kinds)}, with `:scale` after it or not",
            fix="for example --guidance 2 or --guidance cfg_zero:2",
        )
    kept = {name: value for name, value in present.items() if name in kinds[kind].model_fields}
    return kept | {"type": kind} | ({"scale": float(scale)} if scale and kind != "none" else {})


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _label_number(label: str | None, info: DataInfo) -> int | None:
    """Read a class given by number or name."""
    if label is None:
        return None
    if label in info.classes:
        return info.classes.index(label)
    if label.isdecimal():
        return int(label)
    raise no_such_class(repr(label), info)


def _passes(
    trained: Trained, recipe: Recipe, options: SampleOptions, conditions: Mapping[str, Tensor], info: DataInfo
) -> Iterator[Samples]:
    """Draw pass by pass, so that an export of any length needs the memory of one."""
    assert recipe.sampling is not None
    sampler: Sampler = recipe.sampling.load()(recipe.sampling, recipe.objective, trained.settings)
    for numbers in torch.split(torch.arange(options.count), _BATCH):
        own = {name: value[numbers] for name, value in conditions.items()}
        request = SampleRequest(seed=options.seed, numbers=numbers, conditions=own, steps=options.steps)
        fields = draw(sampler, trained.networks, request, batch=_BATCH, device=trained.device, latents=info.latents)
        yield Samples(fields=fields, conditions=own, info=info)


def write_shards(folder: Path, passes: Iterator[Samples], info: DataInfo) -> list[Path]:
    """Write images as a data set that a recipe can train on, with the classes or the captions they were drawn for.

    Raises:
        UserError: the samples are texts.
        DataError: the folder is not empty.
    """
    number, channels, height, width = 0, 0, 0, 0
    labelled = captioned = False
    with building(BuildOptions(out=folder, val_fraction=0.0)) as work:
        for samples in passes:
            if not samples.are_images:
                raise UserError.of("shards hold images, this run generates text", where="--shards", fix="leave it out")
            images, labels = samples.fields["image"], samples.conditions.get("label")
            labelled, captioned = labels is not None, CAPTION in samples.conditions
            texts = samples.captions if captioned else None
            _, channels, height, width = images.shape
            for row, image in enumerate(images):
                members = {"png": encode_png(to_picture(image))}
                label = None if labels is None else int(labels[row])
                if label is not None:
                    members["cls"] = str(label).encode()
                if texts is not None:
                    members["txt"] = texts[row].encode()
                work.writers[TRAIN].add(f"sample-{number:08d}", members, label=label, size=(height, width))
                number += 1
        work.finish(
            "image-text" if captioned else "images",
            classes=info.classes if labelled else (),
            tokenizer=info.tokenizer.description() if captioned and info.tokenizer is not None else None,
            image_size=(height, width),
            channels=channels,
        )
    return sorted(folder.rglob("*.tar"))
