"""Promise 6: the smoke recipes, trained by the real command, meet quality gates that can fail."""

import json
from pathlib import Path

import numpy as np
import pytest

from commands import last_values, output_of, sixfold
from sixfold.evaluation.ngram import NGram
from sixfold.recipe.load import load_recipe
from sixfold.tracking.events import read_events, read_metrics
from sixfold_data.evaluation import EvaluationReader
from sixfold_data.stream import TrainStream

DATA = {"flow/dit-smoke": "digits", "lm/moe-smoke": "stdlib"}


@pytest.fixture(scope="module")
def trained(demo_data, tmp_path_factory) -> dict[str, Path]:
    """Train both recipes as they are, side by side, one core each."""
    folder = tmp_path_factory.mktemp("quality")
    runs = {name: folder / name.replace("/", "-") for name in DATA}
    processes = {
        name: sixfold(
            *("run", name, f"data.path={demo_data / DATA[name]}", "tracking.type=jsonl", "--run-dir", str(run)),
            folder=folder,
        )
        for name, run in runs.items()
    }
    for process in processes.values():
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
    return runs


@pytest.mark.timeout(600)
def test_digits_are_as_good_as_new_ones_and_not_memorised(trained):
    values = last_values(trained["flow/dit-smoke"])
    assert values["val/classifier_accuracy"] > 0.97, "the features must know digits"
    assert values["val/fd_ratio"] <= 0.8
    assert values["val/nearest_neighbour"] >= 0.9
    assert values["val/conditional_accuracy"] >= 0.95


def test_text_is_predicted_better_than_by_an_interpolated_trigram(trained, demo_data):
    measured = read_metrics(trained["lm/moe-smoke"])["val/bits_per_byte"]
    recipe = load_recipe("lm/moe-smoke", [f"data.path={demo_data / 'stdlib'}"]).recipe
    stream = TrainStream(recipe.data, seed=recipe.seed, rank=0, world_size=1, start_samples=0, quarantine_path=None)
    seen = np.concatenate([next(stream)["tokens"][:, :-1].numpy().ravel() for _ in range(recipe.train.steps)])
    held_out = np.concatenate([batch["tokens"][:, 1:].numpy().ravel() for batch in held_out_batches(recipe)])
    trigram = NGram(seen, vocabulary=257, order=3).bits_per_byte(held_out)
    print(f"held-out bits per byte: {measured[max(measured)]:.3f}, trigram on the same bytes: {trigram:.3f}")
    assert measured[max(measured)] <= 0.9 * trigram


def held_out_batches(recipe):
    assert recipe.evaluation is not None
    limit, batch = recipe.evaluation.held_out_samples, recipe.evaluation.batch
    return EvaluationReader(recipe.data, batch=batch, limit=limit)


def test_samples_are_drawn_shown_and_reproducible(trained, tmp_path):
    for name, run in trained.items():
        kind = "image" if name.startswith("flow") else "text"
        assert any(event.get("event") == kind for event in read_events(run)), "samples are shown while training"
        for folder in ("first", "second"):
            output_of(
                *("sample", str(run), "--n", "4", "--steps", "8", "--seed", "3", "--out", str(tmp_path / folder)),
                folder=tmp_path,
            )
        first, second = (np.load(tmp_path / folder / "samples.npz") for folder in ("first", "second"))
        for field in first.files:
            assert np.array_equal(first[field], second[field])


def test_evaluate_repeats_what_training_measured(trained, tmp_path):
    run = trained["lm/moe-smoke"]
    again = json.loads(output_of("evaluate", str(run), "--json", folder=tmp_path))
    measured = read_metrics(run)["val/loss"]
    assert again["val/loss"] == pytest.approx(measured[max(measured)], rel=1e-6)


def test_compare_finds_a_run_equal_to_itself(trained, tmp_path):
    run = str(trained["lm/moe-smoke"])
    output_of("compare", run, run, folder=tmp_path)


def test_export_writes_safetensors(trained, tmp_path):
    from safetensors.torch import load_file

    run, file = str(trained["flow/dit-smoke"]), str(tmp_path / "dit.safetensors")
    written = json.loads(output_of("export", run, "--out", file, "--json", folder=tmp_path))
    assert written == {"files": [file]}
    assert any(name.startswith("layers.0.") for name in load_file(file))
