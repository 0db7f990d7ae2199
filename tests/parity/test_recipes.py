"""Promise 1 on the real recipes: the same losses and gradient norms on every engine, world size and accumulation.

``make parity`` prints the table.
"""

import pytest

from parity_matrix import run_matrix, table
from recipe_cases import RECIPES, train_recipe

STEPS = 20


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_is_the_same_on_every_engine(name, demo_data):
    rows = run_matrix(train_recipe, name, str(demo_data), STEPS)
    print("\n" + table(f"{name}, fp32, {STEPS} steps", rows))
    assert [row for row in rows if not row.agrees] == []
