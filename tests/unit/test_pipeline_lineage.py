"""What pipelines know of their stages' outputs, and what MLflow is told: real stages against a real sqlite store."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sixfold.checkpoint.manifest import hash_stream
from sixfold.pipeline.content import outside
from sixfold.pipeline.load import load_pipeline
from sixfold.pipeline.runner import plan, run_pipeline
from sixfold.tracking.lineage import PARENT_TAG, STAGE_TAG
from sixfold.tracking.mlflow import open_client
from sixfold_data.index import read_manifest
from sixfold_data.store import open_store

pytestmark = pytest.mark.timeout(600)  # two pipelines, each of several commands that import torch and MLflow

STAGES = """
name: lineage
tracking: {{type: mlflow, uri: "{uri}"}}
stages:
  scenes: {{type: command, command: [data, demo, scenes, --samples, "40", --image-size, "16", --out, "{{here}}"]}}
  codec:
    type: train
    recipe: codec/kl-scenes-smoke
    settings:
      data.path: "{{scenes}}"
      data.global_batch: 8
      networks.codec.width: 4
      networks.codec.groups: 2
      networks.codec.image_size: 16
      evaluation: null
      train.steps: {steps}
      checkpoint.every_steps: {every}
      tracking.close_timeout_s: 1.0
  latents: {{type: command, command: [data, encode, "{{codec}}", "{{scenes}}", --out, "{{here}}"], resumable: true}}
"""


def write_pipeline(folder, *, steps=1, every=1, uri=None):
    file = folder / "lineage.yaml"
    file.write_text(STAGES.format(uri=uri or f"sqlite:///{folder}/mlflow.db", steps=steps, every=every))
    return load_pipeline(file)


def sha256_of(path):
    with path.open("rb") as stream:
        return hash_stream(stream).sha256


def runs_of(folder):
    client = open_client(f"sqlite:///{folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run for experiment in experiments for run in client.search_runs([experiment])]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lineage")
    pipeline = write_pipeline(folder)
    assert run_pipeline(pipeline, folder / "out", print) == 0
    return folder, pipeline


def test_mlflow_has_the_pipeline_its_stages_and_what_each_left(done):
    folder, pipeline = done
    scenes, codec, latents = plan(pipeline, folder / "out")
    hashes = {
        "scenes": f"data:{read_manifest(open_store(str(scenes.folder))).fingerprint}",
        "codec": f"checkpoint:{sha256_of(codec.folder / 'checkpoints' / 'step_00000001' / 'MANIFEST.json')}",
        "latents": f"data:{read_manifest(open_store(str(latents.folder))).fingerprint}",
    }
    runs = runs_of(folder)
    (parent,) = (run for run in runs if PARENT_TAG not in run.data.tags)
    children = {run.data.tags[STAGE_TAG]: run for run in runs if run.data.tags.get(PARENT_TAG) == parent.info.run_id}
    assert len(runs) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {name: run.data.tags["sixfold.output"] for name, run in children.items()} == hashes
    assert {name: parent.data.tags[f"stage.{name}.output"] for name in hashes} == hashes
    read = json.loads(children["latents"].data.tags["sixfold.inputs"])
    assert read == {name: hashes[name].partition(":")[2] for name in ("codec", "scenes")}
    assert "train/loss" in children["codec"].data.metrics, "the training's own run"


def test_an_output_that_was_tampered_with_is_made_again(done):
    folder, pipeline = done
    said = []
    latents = plan(pipeline, folder / "out")[2]
    shard = next((latents.folder / "train").glob("*.tar"))
    before = shard.read_bytes()
    os.utime(shard)
    assert latents.finished, "a file that was merely touched is read, and is the same"
    shard.write_bytes(before[:600] + b"?" + before[601:])
    assert not latents.finished
    assert run_pipeline(pipeline, folder / "out", said.append) == 0
    assert [line.count("finished before") for line in said[:2]] == [1, 1]
    assert "1 files of its output are not what it left: train/shard-000000.tar" in said[2]
    assert shard.read_bytes() == before
    assert plan(pipeline, folder / "out")[2].finished


def test_a_key_follows_what_is_read_from_outside(tmp_path, done):
    data = plan(done[1], done[0] / "out")[0].folder
    file = tmp_path / "outside.yaml"
    stage = f'{{type: train, recipe: codec/kl-scenes-smoke, settings: {{data.path: "{tmp_path}/data"}}}}'
    file.write_text(f"name: outside\ntracking: {{type: jsonl}}\nstages: {{codec: {stage}}}\n")
    keys = []
    for content in (data, done[0] / "out" / plan(done[1], done[0] / "out")[2].folder.name):
        (tmp_path / "data").unlink(missing_ok=True)
        (tmp_path / "data").symlink_to(content)
        keys += [plan(load_pipeline(file), tmp_path)[0].key for _ in range(2)]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    (tmp_path / "words.txt").write_text("one")
    one = outside(str(tmp_path / "words.txt"))
    (tmp_path / "words.txt").write_text("two")
    assert one != outside(str(tmp_path / "words.txt")) is not None


def test_a_killed_stage_goes_on_and_stages_are_recorded_when_mlflow_is_back(tmp_path):
    pipeline = write_pipeline(tmp_path, steps=24, every=4, uri="http://127.0.0.1:9")  # nothing listens there
    command = [sys.executable, "-m", "sixfold.cli.main", "run", str(tmp_path / "lineage.yaml"), "--run-dir"]
    process = subprocess.Popen([*command, str(tmp_path / "out")], start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/codec-*/checkpoints/step_*/MANIFEST.json")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    scenes, codec, _ = plan(pipeline, tmp_path / "out")
    assert scenes.finished
    assert scenes.record.mlflow_run is None
    assert not codec.finished
    pipeline = write_pipeline(tmp_path, steps=24, every=4)
    assert run_pipeline(pipeline, tmp_path / "out", print) == 0
    events = [json.loads(line) for line in (codec.folder / "events.jsonl").read_text().splitlines()]
    (resumed,) = (event["step"] for event in events if event.get("event") == "resumed")
    assert 0 < resumed < 24, "it went on from a checkpoint"
    assert events[-1]["step"] == 24
    names = {run.data.tags.get(STAGE_TAG) for run in runs_of(tmp_path)}
    assert names == {None, "scenes", "codec", "latents"}
