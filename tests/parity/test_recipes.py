"""Promise 1 on the real recipes: the same losses and gradient norms on every engine, world size and accumulation.

``make parity`` tries every recipe in every way and prints the tables. The suite does so for the first two, and for the
others takes one way of each kind: what a family adds to the engines shows there, in a fifth of the time.
"""

import os

import pytest

from parity_matrix import MATRIX, run_matrix, table
from recipe_cases import RECIPES, train_recipe

STEPS = 20
IN_EVERY_WAY = list(RECIPES) if os.environ.get("SIXFOLD_PARITY") == "full" else ["lm/moe-smoke", "flow/dit-smoke"]
ONE_OF_EACH_KIND = ("DDP 2", "HSDP 2x2", "ZeRO-2 2", "ZeRO-3 2")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_is_the_same_on_every_engine(name, demo_data):
    whole = name in IN_EVERY_WAY
    names, accumulations = (tuple(MATRIX), (1, 2)) if whole else (ONE_OF_EACH_KIND, (2,))
    rows = run_matrix(
        train_recipe, name, str(demo_data), STEPS if whole else STEPS // 2, names=names, accumulations=accumulations
    )
    print("\n" + table(f"{name}, fp32", rows))
    assert [row for row in rows if not row.agrees] == []
