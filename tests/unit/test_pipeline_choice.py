"""Which stages of a pipeline are run: any subset, or all, by short overrides."""

import json

import pytest
from typer.testing import CliRunner

from sixfold.cli.main import build_app
from sixfold.errors import RecipeError
from sixfold.pipeline.load import load_pipeline
from sixfold.pipeline.runner import plan
from sixfold.recipe.catalogue import find_recipe

SOURCE = find_recipe("pipelines/few-step-smoke")
DEFAULT = ["digits", "teacher", "consistency", "scm", "dmd2", "ladd", "mean-flow", "table"]
MORE = ["consistency-train", "ect", "scm-train", "lcm", "add", "reflow", "progressive", "mean-flow-scratch"]


def rows_of(pipeline):
    """The runs that the table compares."""
    return [word.partition("}")[0].lstrip("{") for word in pipeline.stages["table"].command if "}@" in word]


def test_by_default_five_students_are_trained():
    pipeline = load_pipeline(SOURCE)
    assert list(pipeline.stages) == DEFAULT
    assert list(pipeline.left_out) == MORE
    assert rows_of(pipeline) == DEFAULT[1:-1]


def test_any_subset_is_run_and_compared(tmp_path):
    pipeline = load_pipeline(SOURCE, ["stages.dmd2=null", "stages.ladd=null", "stages.ect.enabled=true"])
    assert list(pipeline.stages) == ["digits", "teacher", "consistency", "scm", "mean-flow", "ect", "table"]
    assert rows_of(pipeline) == ["teacher", "consistency", "scm", "mean-flow", "ect"]
    table = plan(pipeline, tmp_path)[-1]
    assert not any("{" in word for word in table.command)
    off = load_pipeline(SOURCE, ["stages.scm.enabled=false"])
    assert "scm" not in (*off.stages, *rows_of(off))


def test_all_are_run_by_one_override(tmp_path):
    pipeline = load_pipeline(SOURCE, ["all_stages=true"])
    assert pipeline.left_out == ()
    assert list(pipeline.stages) == [*DEFAULT[:-1], *MORE, "table"]
    assert rows_of(pipeline) == [*DEFAULT[1:-1], *MORE]
    assert [stage.name for stage in plan(pipeline, tmp_path)] == list(pipeline.stages)


def test_a_stage_that_others_stand_on_is_missed():
    with pytest.raises(
        RecipeError, match=r"stage consistency reads stage teacher, which is left out(.*\n)*.*enabled=true"
    ):
        load_pipeline(SOURCE, ["stages.teacher=null"])


@pytest.mark.parametrize("override", ["stages.etc.enabled=true", "stages.etc=null", "stages.etc.settings.seed=1"])
def test_a_stage_that_is_not_there_is_named_with_its_nearest(override):
    with pytest.raises(RecipeError, match=r"there is no stage 'etc'(.*\n)*.*did you mean stages\.ect\?"):
        load_pipeline(SOURCE, [override])


def test_a_stage_may_be_added():
    pipeline = load_pipeline(SOURCE, ["stages.more={type: command, command: [doctor]}"])
    assert list(pipeline.stages) == [*DEFAULT, "more"]


def test_a_dry_run_tells_what_is_left_out():
    words = ["run", str(SOURCE), "stages.scm=null", "--dry-run"]
    shown = CliRunner().invoke(build_app(), words, catch_exceptions=False).output
    assert "left out: scm, consistency-train, ect" in shown
    assert "all_stages=true" in shown
    shown = CliRunner().invoke(build_app(), [*words, "--json"], catch_exceptions=False).output
    assert json.loads(shown)["left_out"] == ["scm", *MORE]
