"""Comparing runs, finding them, and the commands over both."""

import json
import math

import pytest
import typer
from typer.testing import CliRunner

from sixfold.cli import compare_command
from sixfold.errors import UserError
from sixfold.tracking.compare import compare, relative_difference
from sixfold.tracking.events import EventLog
from sixfold.tracking.runs import find_run, list_runs


def make_run(folder, losses, **others):
    log = EventLog(folder)
    log.begin(step=0)
    for step, loss in losses.items():
        log.metrics(step=step, samples=step, values={"train/loss": loss, "perf/samples_per_s": 1e3 * loss, **others})
    log.close()
    return folder


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1e-30, 1.0), (1.0, 2.0, 0.5), (-1.0, 1.0, 2.0), (math.nan, math.nan, 0.0),
     (math.nan, 1.0, math.inf), (math.inf, math.inf, 0.0), (math.inf, 1.0, math.inf)],
)  # fmt: skip
def test_relative_difference(a, b, expected):
    assert relative_difference(a, b) == relative_difference(b, a) == expected


def test_the_largest_difference_is_found_where_runs_part(tmp_path):
    a = make_run(tmp_path / "a", {1: 1.0, 2: 1.0, 3: 2.0, 4: 1.0}, **{"val/only_a": 1.0})
    b = make_run(tmp_path / "b", {1: 1.0, 2: 1.25, 3: 2.5, 9: 7.0})
    loss, only_a = compare(a, b)
    assert (loss.name, loss.step, loss.value_a, loss.value_b, loss.common_steps) == ("train/loss", 2, 1.0, 1.25, 3)
    assert loss.largest == pytest.approx(0.2)
    assert (loss.only_in_a, loss.only_in_b) == ((4,), (9,))
    assert (only_a.name, only_a.common_steps, only_a.only_in_a) == ("val/only_a", 0, (1, 2, 3, 4))
    assert "perf/samples_per_s" in {difference.name for difference in compare(a, b, machine=True)}


def test_runs_are_found_by_folder_id_and_recipe(tmp_path):
    run = make_run(tmp_path / "runs/flow/dit/20250101-a", {1: 1.0})
    make_run(tmp_path / "runs/lm/moe/20250101-b", {1: 1.0})
    root = tmp_path / "runs"
    assert find_run(str(run), root) == find_run("20250101-a", root) == find_run("flow/dit/20250101-a", root) == run
    assert len(list_runs(root)) == 2
    with pytest.raises(UserError, match="20250101-a"):
        find_run("20250101a", root)
    make_run(tmp_path / "runs/flow/dit-xl/20250101-a", {1: 1.0})
    with pytest.raises(UserError, match="2 runs are called"):
        find_run("20250101-a", root)
    with pytest.raises(UserError, match="holds no runs"):
        find_run("x", tmp_path / "nowhere")


@pytest.fixture
def command():
    app = typer.Typer()
    app.callback()(lambda: None)
    compare_command.register(app)
    return lambda *arguments: CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_exits_1_beyond_the_tolerance(tmp_path, command):
    a, b = make_run(tmp_path / "a", {1: 1.0, 2: 1.0}), make_run(tmp_path / "b", {1: 1.0, 2: 1.01})
    assert command(a, b).exit_code == 0
    assert command(a, b, "--rtol", "0.1").exit_code == 0
    beyond = command(a, b, "--rtol", "1e-3")
    assert beyond.exit_code == 1
    assert "beyond 0.001: train/loss" in beyond.output
    assert "perf/" not in beyond.output


@pytest.mark.parametrize(
    ("of_b", "told"),
    [
        ({"losses": {1: 1.0, 2: 1.0, 3: 1.0}}, "missing: train/loss (A lacks 3)"),
        ({"losses": {1: 1.0}}, "missing: train/loss (B lacks 2)"),
        ({"losses": {1: 1.0, 2: 1.0}, "val/fd": 1.0}, "missing: val/fd (A lacks 1, 2)"),
    ],
)
def test_what_one_run_lacks_is_beyond_every_tolerance(tmp_path, command, of_b, told):
    a, b = make_run(tmp_path / "a", {1: 1.0, 2: 1.0}), make_run(tmp_path / "b", **of_b)
    assert command(a, b).exit_code == 0
    judged = command(a, b, "--rtol", "0.1")
    assert judged.exit_code == 1
    assert told in judged.output
    assert command(a, b, "--rtol", "0.1", "--common").exit_code == 0
    assert json.loads(command(a, b, "--rtol", "0.1", "--json").output)["missing"] == [told.split()[1]]


def test_the_command_writes_valid_json(tmp_path, command):
    a, b = make_run(tmp_path / "a", {1: 1.0}), make_run(tmp_path / "b", {1: math.nan})
    result = command(a, b, "--rtol", "1e-3", "--json")
    assert result.exit_code == 1
    (loss,) = json.loads(result.output, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["metrics"]
    assert (loss["name"], loss["largest"], loss["value_b"]) == ("train/loss", "Infinity", "NaN")


def test_runs_with_nothing_in_common_are_refused(tmp_path, command):
    a, b = make_run(tmp_path / "a", {1: 1.0}), make_run(tmp_path / "b", {2: 1.0})
    assert isinstance(command(a, b).exception, UserError)
