"""Memory of a step with several roles: no more than its roles need alone."""

import pytest

from case_runs import prepare
from recipe_cases import recipe_on
from role_memory import measure_memory

LARGEST_RATIO = 1.3
MANY_ACTIVATIONS = "data.global_batch=128"
"""A batch at which they outweigh what stays, so that another role's graph, kept, would show."""


@pytest.mark.parametrize(
    ("name", "overrides"), [("distill/dmd2-smoke", ("objective.steps=8",)), ("distill/ladd-smoke", ())]
)
def test_the_peak_of_a_step_is_within_what_its_roles_need_alone(name, overrides, demo_data):
    found = measure_memory(recipe_on(name, prepare(name, demo_data), MANY_ACTIVATIONS, *overrides))
    assert found.ratio <= LARGEST_RATIO
    teacher, student = found.needs["teacher"], found.needs["denoiser"]
    assert student.computing_bytes > student.held_bytes
    # Parameters alone, where the student has momentum and an average, too.
    assert teacher.held_bytes <= student.held_bytes / 3
