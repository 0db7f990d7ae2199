"""Evaluation in the loop and by command: held-out measures, scores of samples, and samples to look at.

Every rank takes part, for sharded networks need all ranks to compute: held-out batches and sample numbers are dealt
out, sums and samples come back together. Scores are computed on rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sixfold.distributed.collectives import broadcast_object, gather_objects, sum_over_ranks
from sixfold.distributed.process_group import World
from sixfold.distributed.randomness import PositionRandom
from sixfold.evaluation.features import LabelledImages
from sixfold.evaluation.images import SAMPLE_METRICS, ImageScores
from sixfold.objectives.contract import Networks, Objective, Sum, add_sums, means_of
from sixfold.recipe.recipe import Recipe
from sixfold.recipe.trained import resolve_networks
from sixfold.samplers.contract import Sampler, SampleRequest
from sixfold.train.samples import Samples, conditions_of, draw
from sixfold_data.describe import describe
from sixfold_data.evaluation import EvaluationReader, read_split_arrays

SEED_OFFSET = 1
"""Held-out noise differs from training noise even where positions coincide."""


class Evaluator:
    """Measures networks as the recipe's ``evaluation`` says; made once a run, by all ranks.

    Args:
        recipe: the resolved recipe, with an ``evaluation`` section.
        world: this rank.
        cache: folder in which trained feature extractors are kept.
    """

    def __init__(self, recipe: Recipe, world: World, cache: Path) -> None:
        assert recipe.evaluation is not None, "a recipe without an evaluation section measures nothing"
        self.config = recipe.evaluation
        self._recipe, self._world, self._cache = recipe, world, cache
        self._info = describe(recipe.data)
        self._held_out = EvaluationReader(
            recipe.data,
            batch=self.config.batch,
            rank=world.rank,
            world_size=world.size,
            limit=self.config.held_out_samples,
        )
        self._sampler: Sampler | None = None
        if recipe.sampling is not None:
            self._sampler = recipe.sampling.load()(recipe.sampling, recipe.objective, resolve_networks(recipe))
        self._scores_samples = any(metric in SAMPLE_METRICS for metric in self.config.metrics)
        self._scores: ImageScores | None = None

    @torch.no_grad()
    def measure(self, objective: Objective, networks: Networks) -> dict[str, float]:
        """Return held-out measures and, where asked for, scores of samples, under names such as ``val/loss``."""
        values = self._held_out_means(objective, networks)
        if self._scores_samples:
            values |= self._sample_scores(networks)
        return {f"val/{name}": value for name, value in values.items()}

    @torch.no_grad()
    def samples_to_show(self, networks: Networks) -> Samples | None:
        """Draw the recipe's ``show_samples`` samples, conditions in turn; None where nothing samples."""
        if self._sampler is None:
            return None
        count = self.config.show_samples
        conditions = conditions_of(self._recipe, self._info, count)
        fields = self._draw(networks, count, conditions, seed=self._recipe.seed)
        return Samples(fields=fields, conditions=conditions, info=self._info)

    def _held_out_means(self, objective: Objective, networks: Networks) -> dict[str, float]:
        totals: dict[str, Sum] = {}
        for batch in self._held_out:
            # A rank that has run out computes along, since sharded networks need all ranks, but adds nothing.
            spare = len(batch.positions) == 0
            on_device = (self._held_out.first() if spare else batch).to(self._world.device)
            random = PositionRandom(self._recipe.seed + SEED_OFFSET, on_device.positions)
            sums = objective.evaluate(networks, on_device, random)
            add_sums(totals, {name: value.nothing() for name, value in sums.items()} if spare else sums)
        summed = sum_over_ranks(
            {f"{name}/{part}": getattr(value, part) for name, value in totals.items() for part in ("total", "count")}
        )
        return means_of({name: Sum(summed[f"{name}/total"], summed[f"{name}/count"]) for name in totals})

    def _sample_scores(self, networks: Networks) -> dict[str, float]:
        scores = self._prepare_scores()
        count = self._info.samples[self._recipe.data.splits.train]
        if self.config.samples != "split":
            count = self.config.samples
        labels = self._training_labels(count)
        conditions = {} if labels is None else {"label": labels}
        fields = self._draw(networks, count, conditions, seed=self._recipe.seed + SEED_OFFSET)
        values = None if scores is None else scores(fields["image"], labels)
        return broadcast_object(values)

    def _prepare_scores(self) -> ImageScores | None:
        """Read the splits and train the feature extractor, once, on rank 0."""
        if self._scores is None and self._world.rank == 0:
            splits = self._recipe.data.splits
            training, held_out = (self._labelled(name) for name in (splits.train, splits.evaluation))
            self._scores = ImageScores(
                self.config, training, held_out, cache=self._cache, fingerprint=self._info.fingerprint
            )
        return self._scores

    def _labelled(self, split: str) -> LabelledImages:
        arrays = {name: torch.from_numpy(value) for name, value in read_split_arrays(self._recipe.data, split).items()}
        return LabelledImages(images=arrays["image"], labels=arrays.get("label"))

    def _training_labels(self, count: int) -> Tensor | None:
        """Labels in the training split's own proportions: those of its first samples, round and round."""
        if not self._info.classes:
            return None
        scores = self._prepare_scores()
        labels = broadcast_object(None if scores is None else scores.training.require_labels())
        return labels[torch.arange(count) % len(labels)]

    def _draw(
        self, networks: Networks, count: int, conditions: Mapping[str, Tensor], *, seed: int
    ) -> dict[str, Tensor]:
        """Draw samples 0 to ``count - 1``, dealt out among ranks in equal numbers of passes; all ranks get them all."""
        assert self._sampler is not None, "sample metrics without a sampling section are refused by the recipe's checks"
        world = self._world
        share = -(-count // world.size)
        # The last rank's surplus repeats a sample and is cut off below.
        mine = torch.arange(world.rank * share, (world.rank + 1) * share).clamp(max=count - 1)
        request = SampleRequest(
            seed=seed, numbers=mine, conditions={name: value[mine] for name, value in conditions.items()}
        )
        drawn = draw(self._sampler, networks, request, batch=self.config.batch, device=world.device)
        gathered = gather_objects(drawn)
        return {name: torch.cat([part[name] for part in gathered])[:count] for name in drawn}
