"""Promise 6 for few-step generators: one and two steps of a student are worth what its teacher's fifty are, nearly."""

import json

import pytest

from commands import output_of, table_of_pipeline, train

STEPS_OF_TEACHER = 50
ONE_STEP_BOUNDS = {"consistency-distill": 2.0, "scm-distill": 2.0, "dmd2": 2.0, "mean-flow": 3.0}
"""How much larger than the teacher's a student's Frechet distance may be in one step."""

SMALL = (
    "networks.denoiser.width=64",
    "networks.denoiser.depth=2",
    "evaluation={metrics: [fd, density_coverage], resamples: 0}",
)


def rows_of(table):
    """Records of a table by the run's short name and the number of steps."""
    return {(row["name"].removeprefix("distill/").removesuffix("-smoke"), row["steps"]): row for row in table}


@pytest.mark.quality
@pytest.mark.timeout(900)
def test_a_student_jumps_where_its_teacher_needs_many_steps(demo_data, tmp_path):
    """The whole way with a small network; the gates proper are below."""
    data = f"data.path={demo_data / 'digits'}"
    teacher = train("distill/teacher-smoke", data, *SMALL, "train.steps=500", run=tmp_path / "teacher")
    runs = [f"networks.{role}.run={teacher}" for role in ("teacher", "denoiser")]
    short = ("train.steps=150", SMALL[-1])
    student = train("distill/consistency-distill-smoke", data, *runs, *short, run=tmp_path / "student")
    words = ("tabulate", f"{teacher}@1,{STEPS_OF_TEACHER}", f"{student}@1", "--json", "--out", str(tmp_path / "table"))
    row = rows_of(json.loads(output_of(*words, folder=tmp_path).splitlines()[-1]))
    print({key: (values["fd"], values["coverage"]) for key, values in row.items()})
    one, many, jump = row["teacher", 1], row["teacher", STEPS_OF_TEACHER], row["consistency-distill", 1]
    assert jump["evaluations"] == one["evaluations"] == 1
    assert jump["fd"] <= 0.4 * one["fd"]
    assert jump["fd"] <= 3.0 * many["fd"]
    assert jump["coverage"] >= 0.8 * many["coverage"]


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
