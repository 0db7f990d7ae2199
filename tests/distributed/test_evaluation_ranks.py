"""Measures do not depend on how many ranks share them, even where some rank gets nothing to measure."""

import pytest
import torch

from ranks import rank_pool
from recipe_cases import RECIPES, recipe_on
from sixfold.distributed.process_group import join
from sixfold.evaluation.report import logged
from sixfold.train.assembly import assemble
from sixfold.train.evaluator import Evaluator

HELD_OUT = ("evaluation.metrics=[loss]", "evaluation.held_out_samples=6", "evaluation.batch=4")
SAMPLES = (
    "evaluation.metrics=[loss, fd, cmmd, precision_recall, density_coverage, nearest_neighbour]",
    *("evaluation.features=pixel", "evaluation.samples=10", "evaluation.batch=4", "evaluation.held_out_samples=6"),
    *("evaluation.resamples=3", "evaluation.reference_features=300", "sampling.steps=2"),
)


def _measure(name, data, cache, overrides):
    recipe = recipe_on(name, data, *overrides)
    training = assemble(recipe, join())
    return logged(Evaluator(recipe, join(), cache).measure(training.objective, training.networks))


@pytest.mark.parametrize(
    ("name", "overrides"), [*((name, HELD_OUT) for name in RECIPES), ("flow/dit-smoke", SAMPLES)], ids=str
)
def test_ranks_without_a_sample_change_nothing(name, overrides, demo_data, tmp_path):
    alone, *_ = rank_pool(1).run(_measure, name, str(demo_data), tmp_path / "alone", overrides)
    together = rank_pool(4).run(_measure, name, str(demo_data), tmp_path / "together", overrides)
    assert alone["val/loss"] > 0
    assert ("val/recall" in alone) == (overrides is SAMPLES)
    for measured in together:
        assert measured.keys() == alone.keys()
        for metric, value in alone.items():
            torch.testing.assert_close(measured[metric], value, rtol=1e-5, atol=0)
