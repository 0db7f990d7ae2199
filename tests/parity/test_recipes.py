"""Promise 1 on the real recipes: the same losses and gradient norms on every engine, world size and accumulation.

``make parity`` tries every recipe in every way and prints the tables. The suite does so for the first two, and for the
others takes one way of each kind and a few steps: what a family adds to the engines shows there, in a fifth of the
time. Latents and further few-step students are left to ``make parity``.
"""

import pytest

from case_runs import prepare
from parity_matrix import FULL, MATRIX, run_matrix, table
from recipe_cases import CASES, FEW_STEP, RECIPES, recipe_on, train_recipe, with_engine
from sixfold.engine.config import DeepSpeedConfig
from sixfold.errors import RecipeError
from sixfold.recipe.checks import check_recipe

STEPS, FEWER_STEPS, FEWEST_STEPS = 20, 10, 5
IN_EVERY_WAY = list(CASES) if FULL else ["lm/moe-smoke", "flow/dit-smoke"]
ONE_OF_EACH_KIND = ("DDP 2", "HSDP 2x2", "ZeRO-2 2", "ZeRO-3 2")
FORWARD_MODE = [name for name in CASES if "scm" in name or "mean-flow" in name]


def steps_of(name):
    """How many steps agreement is asked for."""
    return STEPS if name in IN_EVERY_WAY else FEWEST_STEPS if name in FEW_STEP else FEWER_STEPS


@pytest.mark.timeout(1800 if FULL else 900)
@pytest.mark.parametrize("name", list(CASES) if FULL else [*RECIPES, *FEW_STEP])
def test_recipe_is_the_same_on_every_engine(name, demo_data):
    ways, accumulations = (tuple(MATRIX), (1, 2)) if name in IN_EVERY_WAY else (ONE_OF_EACH_KIND, (2,))
    ways = [way for way in ways if not (name in FORWARD_MODE and way == "ZeRO-3 2")]
    data = prepare(name, demo_data)
    rows = run_matrix(train_recipe, name, data, steps_of(name), names=ways, accumulations=accumulations)
    print("\n" + table(f"{name}, fp32", rows))
    assert [row for row in rows if not row.agrees] == []


@pytest.mark.parametrize("name", [name for name in FORWARD_MODE if FULL or name in FEW_STEP])
def test_forward_mode_is_refused_where_parameters_are_partitioned(name, demo_data):
    recipe = recipe_on(name, prepare(name, demo_data))
    with pytest.raises(RecipeError, match="forward-mode"):
        check_recipe(with_engine(recipe, DeepSpeedConfig(precision="fp32", zero_stage=3), None))
