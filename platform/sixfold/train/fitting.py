"""Checks of a recipe against the data it names, before anything starts; every fault is collected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from sixfold.errors import Fault, RecipeError, SixfoldError
from sixfold.models.settings import NetworkSettings
from sixfold.models.trained.network import NetworksConfig, TrainedNetwork, architecture_of
from sixfold.recipe.recipe import Recipe
from sixfold.recipe.trained import load_source, resolve_networks
from sixfold_data.describe import DataInfo, describe


@runtime_checkable
class TakesImages(Protocol):
    """Settings of a network that reads square images of the data set; ``classes`` too if it reads labels."""

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the images."""
        ...


@runtime_checkable
class TakesRectangles(Protocol):
    """Settings of a network that reads images of several aspect ratios too."""

    @property
    def patch_size(self) -> int:
        """What both sides are multiples of, in pixels."""
        ...

    @property
    def largest_side(self) -> int:
        """Most pixels of a side."""
        ...


@runtime_checkable
class TakesTokens(Protocol):
    """Settings of a network that reads tokens of a text data set."""

    @property
    def vocab_size(self) -> int:
        """How many different tokens it knows."""
        ...


def check_data_fits(recipe: Recipe, info: DataInfo) -> None:
    """Check that the networks take what the data set holds.

    Raises:
        RecipeError: with every fault.
    """
    faults = [*_splits_exist(recipe, info)]
    networks = resolve_networks(recipe)
    if "text_encoder" in recipe.objective.needs.values():
        faults += _caption_faults(info)
    # A network of the wrong kind, or given pixels for latents, says nothing by its sizes.
    faults += [*_capability_faults(recipe, networks), *latents_faults(recipe, info)] or [
        fault
        for name in recipe.objective.network_names
        if name != recipe.objective.latents_of  # which reads the images that the latents were made of
        for fault in _network_faults(name, networks[name], info)
    ]
    if faults:
        raise RecipeError(*faults)


def _splits_exist(recipe: Recipe, info: DataInfo) -> Iterator[Fault]:
    wanted = {"data.splits.train": recipe.data.splits.train}
    if recipe.evaluation is not None:
        wanted["data.splits.evaluation"] = recipe.data.splits.evaluation
    for key, split in wanted.items():
        if not info.samples.get(split):
            yield Fault(
                what=f"{key} is {split!r}, and the data set has no samples of that split",
                where=", ".join(recipe.data.paths),
                allowed=", ".join(name for name, samples in info.samples.items() if samples) or "none",
                fix=f"set {key} to one of these, or build the data set with such a split",
            )


def _capability_faults(recipe: Recipe, networks: NetworksConfig) -> Iterator[Fault]:
    """What a network of another run is, is known only now."""
    for name, capability in recipe.objective.needs.items():
        network = networks[name]
        if isinstance(network, TrainedNetwork) and capability not in network.architecture.provides:
            yield Fault(
                what=f"objective {recipe.objective.type} needs a {capability.replace('_', ' ')} as {name!r}, and role "
                f"{network.role!r} of {network.run} is a network of type {network.architecture.model_dump()['type']}",
                where=f"networks.{name}",
                fix=f"name another run as networks.{name}.run",
            )


def latents_faults(recipe: Recipe, info: DataInfo) -> Iterator[Fault]:
    """Latents and a codec come together."""
    codec = recipe.objective.latents_of
    if codec is None and info.latents is not None:
        yield Fault(
            what="the data hold latents, and the objective names no codec to decode samples with",
            where=", ".join(recipe.data.paths),
            fix="add networks.codec: {type: trained, run: <the codec's run>} and objective.codec: codec",
        )
    if codec is not None and info.latents is None:
        source, run = recipe.data.paths[0], getattr(recipe.networks[codec], "run", None)
        out = f"{source.rstrip('/')}-latents"
        yield Fault(
            what=f"objective.codec is {codec!r}, but the data hold {info.kind}, not latents",
            where=", ".join(recipe.data.paths),
            fix=f"encode them with `sixfold data encode {run or 'RUN'} {source} --out {out}`, and set data.path={out}",
        )


def _network_faults(name: str, network: NetworkSettings | TrainedNetwork, info: DataInfo) -> Iterator[Fault]:
    settings: object = architecture_of(network)
    faults = [*_image_faults(name, settings, info)] if isinstance(settings, TakesImages) else []
    faults += _text_faults(name, settings, info) if isinstance(settings, TakesTokens) else []
    if isinstance(network, TrainedNetwork):
        fix = f"name a run on such data as networks.{name}.run, or take the data that {network.run} was trained on"
        faults = [replace(fault, fix=fix) for fault in faults]
    yield from faults
    yield from _class_faults(name, network, info)


def _image_faults(name: str, network: TakesImages, info: DataInfo) -> Iterator[Fault]:
    if info.kind == "text":
        yield _fault(
            f"networks.{name}",
            "a network for images",
            "text",
            "train a language model on it: objective.type=next_token",
        )
        return
    if info.buckets:
        yield from _bucket_faults(name, network, info.buckets)
    elif info.image_size != (network.image_size, network.image_size):
        found = "several sizes" if info.image_size is None else "x".join(map(str, info.image_size))
        key = f"networks.{name}.image_size"
        square = info.image_size is not None and len(set(info.image_size)) == 1
        other = f"{key}={info.image_size[0]}" if info.image_size is not None and square else ""
        resize = "" if info.latents is not None else f"data.image_size={network.image_size}"
        kind = "images" if info.latents is None else "latents"
        fix = "set " + ", or ".join(filter(None, (resize, other)))
        yield _fault(key, network.image_size, f"{kind} of {found}", fix)
    if info.channels != network.channels:
        key = f"networks.{name}.channels"
        yield _fault(key, network.channels, f"{info.channels} channels", f"set {key}={info.channels}")
    classes: int = getattr(network, "classes", 0)
    if classes not in (0, len(info.classes)):
        key = f"networks.{name}.classes"
        yield _fault(key, classes, f"{len(info.classes)} classes", f"set {key}={len(info.classes)}")


def _class_faults(name: str, network: object, info: DataInfo) -> Iterator[Fault]:
    """A network of another run knows classes by number: they must be the same classes in the same order."""
    if (
        not isinstance(network, TrainedNetwork)
        or network.run is None
        or not getattr(network.architecture, "classes", 0)
    ):
        return
    known = _classes_of(network.run)
    differing = [number for number, pair in enumerate(zip(known, info.classes, strict=False)) if len(set(pair)) > 1]
    if differing:
        first = differing[0]
        yield Fault(
            what=f"networks.{name} was trained on other classes: number {first} is {known[first]!r} to it, "
            f"and {info.classes[first]!r} in this data set ({len(differing)} of {len(known)} differ)",
            where=f"networks.{name}",
            fix="name a run on the same classes, or build this data set with those of that run",
        )


def _classes_of(run: Path) -> tuple[str, ...]:
    """The names of the classes in a run's data; none where they are not there any more."""
    try:
        return describe(load_source(str(run / "recipe.yaml"), "networks").data).classes
    except SixfoldError:
        return ()


def _bucket_faults(name: str, network: TakesImages, buckets: Sequence[tuple[int, int]]) -> Iterator[Fault]:
    if isinstance(network, TakesRectangles):
        step, largest = network.patch_size, network.largest_side
        misfits = [shape for shape in buckets if max(shape) > largest or any(side % step for side in shape)]
        allowed = f"sides that are multiples of {step}, up to {largest}"
        fix = f"change data.buckets, or networks.{name}.position_grid: patches a side, for the longest one"
    else:
        misfits = [shape for shape in buckets if shape != (network.image_size, network.image_size)]
        allowed = f"{network.image_size}x{network.image_size}"
        fix = "take a network of type mmdit, or data.image_size in the place of data.buckets"
    if misfits:
        sizes = ", ".join(f"{width}x{height}" for height, width in misfits)
        yield Fault(
            what=f"networks.{name} cannot read pictures of {sizes}, which are among data.buckets",
            where="data.buckets",
            allowed=allowed,
            fix=fix,
        )


def _caption_faults(info: DataInfo) -> Iterator[Fault]:
    if not info.captioned:
        yield Fault(
            what=f"the objective has text encoders, but the data set holds {info.kind} without captions",
            where="data.path",
            allowed="image-text, or latents of it",
            fix="build captioned images with `sixfold data build image-text`, or `sixfold data demo scenes`",
        )


def _text_faults(name: str, network: TakesTokens, info: DataInfo) -> Iterator[Fault]:
    if info.kind != "text":
        yield _fault(
            f"networks.{name}", "a language model", info.kind, "train a denoiser on it: objective.type=denoising"
        )
    elif info.vocabulary_size is not None and network.vocab_size < info.vocabulary_size:
        key = f"networks.{name}.vocab_size"
        rounded = -(-info.vocabulary_size // 8) * 8
        yield _fault(key, network.vocab_size, f"{info.vocabulary_size} tokens", f"set {key}={rounded}")


def _fault(key: str, value: object, held: str, fix: str) -> Fault:
    return Fault(what=f"{key} is {value}, but the data set holds {held}", where=key, fix=fix)
