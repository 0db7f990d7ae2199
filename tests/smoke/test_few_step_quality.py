"""Promise 6 for few-step generators: one and two steps of a student are worth what its teacher's fifty are, nearly."""

import pytest

from commands import table_of_pipeline

STEPS_OF_TEACHER = 50
ONE_STEP_BOUNDS = {"consistency-distill": 2.0, "scm-distill": 2.0, "dmd2": 2.0, "mean-flow": 3.0}
"""How much larger than the teacher's a student's Frechet distance may be in one step."""


def rows_of(table):
    """Records of a table by the run's short name and the number of steps."""
    return {(row["name"].removeprefix("distill/").removesuffix("-smoke"), row["steps"]): row for row in table}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What the pipeline's last stage writes."""
    return rows_of(table_of_pipeline("pipelines/few-step-smoke", tmp_path_factory.mktemp("few-step")))


@pytest.mark.quality
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("student", ONE_STEP_BOUNDS)
def test_students_are_near_their_teacher_and_as_varied(table, student):
    teacher = table["teacher", STEPS_OF_TEACHER]
    assert table[student, 1]["fd"] <= ONE_STEP_BOUNDS[student] * teacher["fd"]
    assert table[student, 2]["fd"] <= 1.5 * teacher["fd"]
    for steps in (1, 2):
        assert table[student, steps]["coverage"] >= 0.9 * teacher["coverage"]
        assert table[student, steps]["fd"] < table["teacher", steps]["fd"], "at equal evaluations"
