"""Evaluation in the loop and by command: held-out measures, scores of samples, and samples to look at.

Every rank takes part, for sharded networks need all ranks to compute: held-out batches and sample numbers are dealt
out; sums, and the rows that metrics make of samples, come back together. Estimates are made on rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sixfold.distributed.collectives import broadcast_object, gather_objects, sum_over_ranks
from sixfold.distributed.process_group import World
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import DataError, TrainingError
from sixfold.evaluation.config import FeatureMetricConfig
from sixfold.evaluation.contract import Drawn, Estimate, SampleMetric
from sixfold.evaluation.features import LabelledImages, require_finite
from sixfold.evaluation.references import References, Split
from sixfold.models.trained.network import architecture_of
from sixfold.objectives.contract import Batch, Networks, Objective, Sum, add_sums, means_of
from sixfold.recipe.recipe import Recipe
from sixfold.recipe.trained import resolve_networks
from sixfold.samplers.contract import Sampler, SampleRequest
from sixfold.train.samples import Samples, conditions_of, conditions_read, draw
from sixfold_data.config import DataConfig
from sixfold_data.describe import DataInfo, describe
from sixfold_data.evaluation import EvaluationReader, read_split_arrays

SEED_OFFSET = 1
"""Held-out noise differs from training noise even where positions coincide."""

_ALL_OF_ONE_PATH = {"mixture": (), "filter": None, "buckets": None}
"""Settings of the training data that are not meant for reference images."""

CONDITIONS = ("label", "caption")
"""The fields of a batch that samples are drawn for."""


class Evaluator:
    """Measures networks as the recipe's ``evaluation`` says; made once a run, by all ranks.

    Args:
        recipe: the resolved recipe, with an ``evaluation`` section.
        world: this rank.
        cache: folder in which trained feature extractors and reference features are kept.
        quarantine: the log of samples that cannot be read, or None.

    Attributes:
        drawing_s: seconds this rank has spent drawing samples, without what was made of them.
    """

    def __init__(self, recipe: Recipe, world: World, cache: Path, quarantine: Path | None = None) -> None:
        assert recipe.evaluation is not None, "a recipe without an evaluation section measures nothing"
        self.config = recipe.evaluation
        self._recipe, self._world = recipe, world
        self._info = describe(recipe.data)
        self._held_out = EvaluationReader(
            recipe.data,
            batch=self.config.batch,
            rank=world.rank,
            world_size=world.size,
            limit=self.config.held_out_samples,
            quarantine_path=quarantine,
        )
        self._sampler: Sampler | None = None
        if recipe.sampling is not None:
            self._sampler = recipe.sampling.load()(recipe.sampling, recipe.objective, resolve_networks(recipe))
        self._held_out_metrics = [
            settings.load()(settings, recipe.objective, resolve_networks(recipe))
            for settings in self.config.held_out_metrics
        ]
        self._images = ImagesOf(recipe, self._info, world, quarantine)
        self._cache = cache if self.config.cache is None else Path(self.config.cache).expanduser()
        self.drawing_s = 0.0

    def prepare(self) -> None:
        """Make what samples are compared with, so that what is wrong with it is known before training; a collective.

        Raises:
            DataError: the reference images are too few for a metric, or have features that are not finite.
            UserError: an extractor cannot be loaded.
        """
        _ = self._metrics

    @torch.no_grad()
    def measure(self, objective: Objective, networks: Networks) -> list[Estimate]:
        """Return held-out measures and, where asked for, estimates from samples; equal on all ranks.

        Raises:
            DataError: the reference images are too few for a metric, or have features that are not finite.
            TrainingError: the samples have features that are not finite.
        """
        return self._held_out_means(objective, networks) + self.sample_estimates(networks)

    @torch.no_grad()
    def samples_to_show(self, networks: Networks) -> Samples | None:
        """Draw the recipe's ``show_samples`` samples, conditions in turn; None where nothing samples."""
        if self._sampler is None:
            return None
        count = self.config.show_samples
        conditions = conditions_of(self._recipe, self._info, count)
        parts = gather_objects(list(self._drawn(networks, count, conditions, seed=self._recipe.seed)))
        batches = [batch for part in parts for batch in part]
        fields = {name: torch.cat([batch[name] for batch in batches])[:count] for name in batches[0]}
        return Samples(fields=fields, conditions=conditions, info=self._info)

    def _held_out_means(self, objective: Objective, networks: Networks) -> list[Estimate]:
        totals: dict[str, Sum] = {}
        for batch in self._held_out:
            # A rank that has run out computes along, since sharded networks need all ranks, but adds nothing.
            spare = len(batch.positions) == 0
            on_device = (self._held_out.first() if spare else batch).to(self._world.device)
            random = PositionRandom(self._recipe.seed + SEED_OFFSET, on_device.positions)
            sums = dict(objective.evaluate(networks, on_device, random))
            for metric in self._held_out_metrics:
                sums |= metric(networks, on_device, random)
            add_sums(totals, {name: value.nothing() for name, value in sums.items()} if spare else sums)
        summed = sum_over_ranks(
            {f"{name}/{part}": getattr(value, part) for name, value in totals.items() for part in ("total", "count")}
        )
        means = means_of(
            {name: value.holding(summed[f"{name}/total"], summed[f"{name}/count"]) for name, value in totals.items()}
        )
        return [Estimate(name=name, value=value, samples=self._held_out.samples) for name, value in means.items()]

    @cached_property
    def _metrics(self) -> Sequence[SampleMetric]:
        """The metrics of samples, with what they compare samples with; made when first needed, by all ranks."""
        compared = [metric for metric in self.config.sample_metrics if isinstance(metric, FeatureMetricConfig)]
        if any(not self.config.features_of(metric).resizes for metric in compared):
            self._images.require_alike()
        return [settings.load()(settings, self._references) for settings in self.config.sample_metrics]

    @cached_property
    def _references(self) -> References:
        return References(
            self.config, self._images, cache=self._cache, device=self._world.device, rank=self._world.rank
        )

    @torch.no_grad()
    def sample_estimates(self, networks: Networks) -> list[Estimate]:
        """Draw samples, turn each into one row a view as soon as it is drawn, and estimate on rank 0."""
        if not self._metrics:
            return []
        count = self._info.samples[self._recipe.data.splits.train]
        if self.config.samples != "split":
            count = self.config.samples
        makers = {metric.view: metric for metric in self._metrics}
        mine: dict[str, list[Tensor]] = {view: [] for view in makers}
        conditions = self._conditions(count)
        numbers = self._share(count)
        for fields in self._drawn(networks, count, conditions, seed=self._recipe.seed + SEED_OFFSET):
            rows, numbers = numbers[: len(fields["image"])], numbers[len(fields["image"]) :]
            drawn = self._images.drawn(fields["image"], {name: value[rows] for name, value in conditions.items()})
            for view, metric in makers.items():
                mine[view].append(metric.rows(drawn).cpu())
        gathered = gather_objects({view: torch.cat(parts) for view, parts in mine.items()})
        estimates: list[Estimate] | None = None
        if self._world.rank == 0:
            whole = {view: torch.cat([part[view] for part in gathered])[:count] for view in makers}
            for view, values in whole.items():
                require_finite(values, f"rows of drawn samples ({view})", TrainingError)
            estimates = [
                estimate
                for metric in self._metrics
                for estimate in metric.estimates(whole[metric.view].to(self._world.device))
            ]
            estimates += self._references.facts()
        return broadcast_object(estimates)

    def _conditions(self, count: int) -> dict[str, Tensor]:
        """Conditions in a split's own proportions: those of its first samples, round and round."""
        found = broadcast_object(self._images.conditions(count) if self._world.rank == 0 else None)
        return {name: value[torch.arange(count) % len(value)] for name, value in found.items()}

    def _share(self, count: int) -> Tensor:
        """The sample numbers that this rank draws: as many on every rank, the last rank's surplus repeating one."""
        share = -(-count // self._world.size)
        first = self._world.rank * share
        return torch.arange(first, first + share).clamp(max=count - 1)

    def _drawn(
        self, networks: Networks, count: int, conditions: Mapping[str, Tensor], *, seed: int
    ) -> Iterator[dict[str, Tensor]]:
        """Draw this rank's share of samples 0 to ``count - 1``, a pass at a time."""
        assert self._sampler is not None, "sample metrics without a sampling section are refused by the recipe's checks"
        for numbers in torch.split(self._share(count), self.config.batch):
            request = SampleRequest(
                seed=seed, numbers=numbers, conditions={name: value[numbers] for name, value in conditions.items()}
            )
            started = time.perf_counter()
            fields = draw(
                self._sampler,
                networks,
                request,
                batch=self.config.batch,
                device=self._world.device,
                latents=self._info.latents,
            )
            self.drawing_s += time.perf_counter() - started
            yield fields


class ImagesOf:
    """A recipe's images as what samples are compared with: an :class:`~sixfold.evaluation.references.ImageSource`."""

    def __init__(self, recipe: Recipe, info: DataInfo, world: World, quarantine: Path | None = None) -> None:
        assert recipe.evaluation is not None
        self._config, self._world, self._info = recipe.evaluation, world, info
        self._recipe, self._own = recipe, recipe.data
        self._quarantine = quarantine

    @cached_property
    def _data(self) -> DataConfig:
        reference = self._config.reference
        return self._own if reference is None else self._own.model_copy(update={**_ALL_OF_ONE_PATH, "path": reference})

    @cached_property
    def _reference_info(self) -> DataInfo:
        return self._info if self._config.reference is None else describe(self._data)

    def require_alike(self) -> None:
        """Raise DataError unless the reference images have the samples' size and channels."""
        codec, theirs = self._recipe.objective.latents_of, self._reference_info
        size, channels = self._info.image_size, self._info.channels
        if codec is not None:
            decoder: Any = architecture_of(resolve_networks(self._recipe)[codec])
            size, channels = (decoder.image_size, decoder.image_size), decoder.channels
        if theirs.latents is None and (theirs.image_size, theirs.channels) != (size, channels):
            raise DataError.of(
                f"reference images are {_shape(theirs.image_size, theirs.channels)}, samples are "
                f"{_shape(size, channels)}, and these features take images as they are",
                where="evaluation.reference",
                fix="name a data set of the samples' size, or evaluation.features that resize (timm, transformers)",
            )

    @property
    def fingerprint(self) -> str:
        """The data's, with what else decides how images are decoded."""
        splits = self._data.splits
        chosen = "" if self._data.filter is None else f"/{self._data.filter.text}"
        return f"{self._reference_info.fingerprint}/{self._data.image_size}/{splits.train}/{splits.evaluation}{chosen}"

    def size(self, split: Split) -> int:
        """How many images a split has."""
        return self._reference_info.samples[self._name(split)]

    def shares(self, split: Split) -> Iterator[Batch]:
        """This rank's share of a split."""
        yield from EvaluationReader(
            self._data,
            split=self._name(split),
            batch=self._config.batch,
            rank=self._world.rank,
            world_size=self._world.size,
            quarantine_path=self._quarantine,
        )

    def whole(self, split: Split) -> LabelledImages:
        """A whole split in memory."""
        arrays = read_split_arrays(self._data, self._name(split), quarantine_path=self._quarantine)
        labels = torch.from_numpy(arrays["label"]) if "label" in arrays else None
        return LabelledImages(images=torch.from_numpy(arrays["image"]), labels=labels)

    def conditions(self, count: int) -> dict[str, Tensor]:
        """The conditions of a split's first samples, ``count`` of them where it has so many."""
        splits = self._own.splits
        split = splits.train if self._config.conditions == "training" else splits.evaluation
        reader = EvaluationReader(self._own, split=split, batch=self._config.batch, limit=count)
        batches = list(reader) if self._info.classes or self._info.captioned else []
        read = conditions_read(self._recipe)
        present = [name for name in CONDITIONS if batches and name in batches[0].fields and name in read]
        return {name: torch.cat([batch[name] for batch in batches]) for name in present}

    def drawn(self, images: Tensor, conditions: Mapping[str, Tensor]) -> Drawn:
        """Samples with what they were drawn for, captions as text too."""
        captions, tokenizer = None, self._info.tokenizer
        if "caption" in conditions and tokenizer is not None:
            rows = (row[row != tokenizer.end_of_text] for row in conditions["caption"].numpy())
            captions = [tokenizer.decode(row) for row in rows]
        return Drawn(images=images.to(self._world.device), conditions=conditions, captions=captions)

    def _name(self, split: Split) -> str:
        return self._data.splits.train if split == "training" else self._data.splits.evaluation


def _shape(size: tuple[int, int] | None, channels: int | None) -> str:
    sides = "of several sizes" if size is None else f"{size[0]}x{size[1]}"
    return f"{sides} with {channels} channel{'' if channels == 1 else 's'}"
