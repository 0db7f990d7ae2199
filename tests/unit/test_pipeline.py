"""Pipelines: what is run again, what is not, and what a changed input changes; with real stages, made small."""

import json
import subprocess
import sys

import pytest

from sixfold.errors import RecipeError
from sixfold.pipeline.load import is_pipeline, load_pipeline
from sixfold.pipeline.runner import plan, run_pipeline
from sixfold_launchers.job_book import JobBook

TWO_STAGES = """
name: two
tracking: {type: jsonl}
stages:
  digits: {type: command, command: [data, demo, digits, --out, "{here}"]}
  model:
    type: train
    recipe: flow/dit-smoke
    settings:
      data.path: "{digits}"
      train.steps: 2
      evaluation: null
      tracking: {type: jsonl}
      networks.denoiser.depth: 1
"""


@pytest.fixture
def pipeline(tmp_path):
    (tmp_path / "two.yaml").write_text(TWO_STAGES)
    return tmp_path / "two.yaml"


def test_finished_stages_are_not_run_again(pipeline, tmp_path):
    said = []
    assert run_pipeline(load_pipeline(pipeline), tmp_path / "out", said.append) == 0
    stages = plan(load_pipeline(pipeline), tmp_path / "out")
    assert all(stage.finished for stage in stages)
    assert stages[1].record.inputs == {"digits": stages[0].record.output.sha256}
    events = stages[1].folder / "events.jsonl"
    written = events.read_bytes()
    said.clear()
    assert run_pipeline(load_pipeline(pipeline), tmp_path / "out", said.append) == 0
    assert [line.count("finished before") for line in said] == [1, 1]
    assert events.read_bytes() == written

    changed = plan(load_pipeline(pipeline, ["stages.model.settings.train.steps=3"]), tmp_path / "out")
    assert changed[0].finished
    assert not changed[1].finished
    assert changed[1].folder != stages[1].folder


def test_an_input_that_changes_changes_all_that_follows(pipeline, tmp_path):
    before = plan(load_pipeline(pipeline), tmp_path)
    after = plan(load_pipeline(pipeline, ["stages.digits.command.2=stdlib"]), tmp_path)
    assert all(a.key != b.key for a, b in zip(before, after, strict=True))
    again = plan(load_pipeline(pipeline), tmp_path / "elsewhere")
    assert [stage.key for stage in again] == [stage.key for stage in before], "keys do not depend on where it is run"


def test_a_failed_stage_stops_the_pipeline_and_goes_on_later(pipeline, tmp_path):
    said = []
    broken = load_pipeline(pipeline, ["stages.digits.command.2=nothing-like-it"])
    assert run_pipeline(broken, tmp_path / "out", said.append) == 2
    assert len(said) == 2
    assert not plan(broken, tmp_path / "out")[0].finished


FAILS_ONCE = """#!/bin/sh
[ -e {folder}/failed ] && exec {python} "$@"
touch {folder}/failed
echo 1 > "$3/exit_code"
"""


def test_a_submitted_stage_whose_job_failed_gets_another_turn(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("SIXFOLD_STATE", str(tmp_path / "book"))
    python = tmp_path / "python"
    python.write_text(FAILS_ONCE.format(folder=tmp_path, python=sys.executable))
    python.chmod(0o755)
    resources = [f"stages.model.profile_settings={json.dumps({'python': str(python), 'runs': str(tmp_path)})}"]
    submitted = load_pipeline(pipeline, ["stages.model.profile=local", *resources])
    said = []
    assert run_pipeline(submitted, tmp_path / "out", said.append) == 1
    assert [job.state for job in JobBook().jobs()] == ["failed"]
    assert run_pipeline(submitted, tmp_path / "out", said.append) == 0
    assert [job.state for job in JobBook().jobs()] == ["finished"], "the same job, started again"
    assert plan(submitted, tmp_path / "out")[1].finished


def test_faults_name_the_stage_and_the_line(pipeline, tmp_path):
    pipeline.write_text(TWO_STAGES.replace('"{digits}"', '"{didgits}"'))
    with pytest.raises(RecipeError, match="stage model refers to 'didgits', which is no stage before it"):
        load_pipeline(pipeline)
    pipeline.write_text(TWO_STAGES.replace("train.steps: 2", "train.stepz: 2"))
    with pytest.raises(RecipeError, match=r"stage model: .*stepz"):
        plan(load_pipeline(pipeline), tmp_path)
    pipeline.write_text(TWO_STAGES.replace("recipe: flow", "reciep: flow"))
    with pytest.raises(RecipeError, match="reciep"):
        load_pipeline(pipeline)


def test_the_command_runs_pipelines_too(pipeline, tmp_path):
    assert is_pipeline(pipeline)
    command = [sys.executable, "-m", "sixfold.cli.main", "run", str(pipeline), "--dry-run"]
    told, record = (
        subprocess.run(
            [*command, *more, "--run-dir", str(tmp_path / "o")], capture_output=True, text=True, check=True
        ).stdout
        for more in ([], ["--json"])
    )
    assert "would make" in told
    assert "data demo digits" in told
    stages = json.loads(record)["stages"]
    assert [(stage["name"], stage["finished"]) for stage in stages] == [("digits", False), ("model", False)]
    assert stages[0]["command"][:3] == ["data", "demo", "digits"]
