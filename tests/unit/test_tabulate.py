"""The table of runs by steps and guidance: what it counts, and what it writes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from latent_cases import train_run
from sixfold.errors import UserError
from sixfold.recipe.load import load_recipe
from sixfold.train.tabulate import Way, table, tabulate, ways_of, write_table


def trained(demo_data, folder, evaluation):
    settings = [
        f"data.path={demo_data / 'digits'}",
        "data.global_batch=8",
        "networks.denoiser.depth=1",
        "tracking={type: jsonl}",
        f"evaluation={evaluation}",
    ]
    return train_run(load_recipe("flow/dit-smoke", settings).recipe, folder, steps=1)


@pytest.fixture(scope="module")
def run(demo_data, tmp_path_factory):
    evaluation = "{metrics: [nearest_neighbour], samples: 24, show_samples: 12, resamples: 0}"
    return trained(demo_data, tmp_path_factory.mktemp("run") / "dit", evaluation)


def test_every_way_is_measured_once_and_its_evaluations_are_counted(run, tmp_path):
    said = []
    ways = ways_of(f"{run}@1,3", lambda name: run, sampler=None, guidances=["1", "2"])
    lines = tabulate(ways, cache=tmp_path / "cache", samples=None, say=said.append)
    assert [(line.steps, line.evaluations) for line in lines] == [(1, 1.0), (1, 2.0), (3, 3.0), (3, 6.0)]
    assert [estimate.name for estimate in lines[0].estimates] == ["nearest_neighbour"]
    assert lines[0].estimates[0].samples == 24
    assert all(line.seconds_per_sample > 0 for line in lines)
    assert len(said) == len(lines)

    written = write_table(lines, tmp_path / "table")
    assert [path.name for path in written] == ["table.md", "table.json", "samples.png"]
    records = json.loads(written[1].read_text())
    assert records[3]["evaluations"] == 6.0
    assert records[3]["nearest_neighbour"] == lines[3].estimates[0].value
    headings, rows = table(lines)
    assert written[0].read_text().count("\n") == 2 + len(rows)
    assert headings[-1] == "nearest_neighbour"


def test_more_samples_are_drawn_where_asked_for(run, tmp_path):
    (line,) = tabulate([Way(run=run, steps=1)], cache=tmp_path, samples=30, say=lambda text: None)
    assert line.estimates[0].samples == 30


def test_what_a_sample_costs_is_counted_without_a_metric_of_samples(demo_data, tmp_path):
    unmeasured = trained(demo_data, tmp_path / "run", "{metrics: [loss], show_samples: 12}")
    (line,) = tabulate([Way(run=unmeasured, steps=3)], cache=tmp_path, samples=None, say=lambda text: None)
    assert (line.evaluations, line.estimates) == (3.0, [])
    assert line.seconds_per_sample > 0


def test_pictures_of_several_sizes_share_a_grid(run, tmp_path):
    grey, coloured = -torch.ones(2, 1, 32, 32), torch.ones(3, 3, 64, 64)
    grey[:, :, :16] = 0.0
    (line,) = tabulate([Way(run=run, steps=1)], cache=tmp_path, samples=2, say=lambda text: None)
    *_, path = write_table([replace(line, images=images) for images in (grey, coloured)], tmp_path / "table")
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    tiles = [pixels[4:68, left : left + 64] for left in range(4, 5 * 68, 68)]
    for tile in tiles[:2]:
        assert (tile[:32] == 128).all()
        assert (tile[32:] == 0).all(), "pixels are repeated, not blended"
    for tile in tiles[2:]:
        assert (tile == 255).all()


def test_steps_that_are_no_numbers_are_named(run):
    with pytest.raises(UserError, match="'x,1' are no numbers of steps"):
        ways_of(f"{run}@x,1", lambda name: run, sampler=None, guidances=[])


def test_a_run_that_samples_nothing_is_refused(demo_data, tmp_path):
    recipe = load_recipe(
        "flow/dit-smoke",
        [f"data.path={demo_data / 'digits'}", "data.global_batch=8", "evaluation=null", "tracking={type: jsonl}"],
    ).recipe
    run = train_run(recipe, tmp_path / "run", steps=0)
    with pytest.raises(UserError, match="no sampling or no evaluation section"):
        tabulate([Way(run=run)], cache=tmp_path, samples=None, say=lambda text: None)
