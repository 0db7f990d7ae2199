"""Held-out measures do not depend on how many ranks share them, even where some rank gets nothing to measure."""

import pytest
import torch

from ranks import rank_pool
from recipe_cases import RECIPES, recipe_on
from sixfold.distributed.process_group import join
from sixfold.train.assembly import assemble
from sixfold.train.evaluator import Evaluator


def _measure(name, data, cache):
    recipe = recipe_on(name, data, "evaluation.metrics=[loss]", "evaluation.held_out_samples=6", "evaluation.batch=4")
    training = assemble(recipe, join())
    return Evaluator(recipe, join(), cache).measure(training.objective, training.networks)


@pytest.mark.parametrize("name", list(RECIPES))
def test_ranks_without_a_sample_change_nothing(name, demo_data, tmp_path):
    alone, *_ = rank_pool(1).run(_measure, name, str(demo_data), tmp_path)
    together = rank_pool(4).run(_measure, name, str(demo_data), tmp_path)
    assert alone["val/loss"] > 0
    for measured in together:
        assert measured.keys() == alone.keys()
        for metric, value in alone.items():
            torch.testing.assert_close(measured[metric], value, rtol=1e-5, atol=0)
