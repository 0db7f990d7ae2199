"""Names and values that MLflow takes, the environment, and the settings."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from sixfold.tracking.config import MLflowConfig, TrackingConfig
from sixfold.tracking.environment import VARIABLES, collect_environment, git_state
from sixfold.tracking.names import NameMap, flatten, image_key, metric_name, parameter_value, redact


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("train/loss", "train/loss"),
        ("val/acc@5 (top)", "val/acc_5 _top_"),
        ("a//b/../c/./d", "a/b/c/d"),
        ("/absolute", "absolute"),
        ("..", "_"),
        ("", "_"),
    ],
)
def test_metric_names(name, accepted):
    assert metric_name(name) == accepted


def test_long_names_stay_apart():
    one, two = metric_name("x" * 300 + "a"), metric_name("x" * 300 + "b")
    assert len(one) == len(two) == 250
    assert one != two


def test_names_that_become_equal_stay_apart():
    names = NameMap()
    assert names["a%b"] == "a_b"
    assert names["a#b"] != "a_b"
    assert names["a%b"] == "a_b"
    assert metric_name(names["a#b"]) == names["a#b"]


def test_image_keys_are_plain():
    assert image_key("samples/grid: é") == "samples/grid_ _"


def test_parameters_are_flat_and_cut_with_a_note():
    flat = flatten({"a": {"b": 1e-4, "c": [1, 2], "d": {}, "e": None}, "f": True})
    assert flat == {"a.b": "0.0001", "a.c": "[1, 2]", "a.d": "{}", "a.e": "None", "f": "True"}
    cut = parameter_value("x" * 7000)
    assert len(cut) == 6000
    assert "cut from 7000 characters" in cut


def test_credentials_are_blanked_and_nothing_else():
    assert redact("--uri http://me:secret@host:5000/x") == "--uri http://***@host:5000/x"
    assert redact("hub_token=abc --api-key xyz") == "hub_token=*** --api-key ***"
    harmless = "objective.type=next_token data.tokenizer=bytes max_tokens=512 --seed 0"
    assert redact(harmless) == harmless
    assert flatten({"store": {"password": "x", "uri": "s3://k:s@bucket"}}) == {
        "store.password": "***",
        "store.uri": "s3://***@bucket",
    }


def test_git_state_tells_clean_from_dirty(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-q", "-m", "x")
    clean = git_state(tmp_path)
    assert clean is not None
    assert (len(clean.commit), clean.dirty, clean.difference_sha256) == (40, False, None)
    (tmp_path / "a.py").write_text("2\n")
    dirty = git_state(tmp_path)
    (tmp_path / "b.py").write_text("")
    dirtier = git_state(tmp_path)
    assert dirty.commit == dirtier.commit == clean.commit
    assert dirty.dirty
    assert len({clean.difference_sha256, dirty.difference_sha256, dirtier.difference_sha256}) == 3


def test_the_environment_holds_no_secret_variables(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "very-secret")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(sys, "argv", ["sixfold", "run", "x", "tracking.uri=http://me:very-secret@host"])
    environment = collect_environment()
    assert "very-secret" not in str(environment.as_dict()) + str(environment.as_tags())
    assert environment.variables["WORLD_SIZE"] == "3"
    assert set(environment.variables) <= set(VARIABLES)
    assert environment.packages["torch"]


def test_a_folder_as_store_is_refused_with_the_way_out():
    assert MLflowConfig().uri == "sqlite:///mlflow.db"
    with pytest.raises(ValidationError, match=r"got './mlruns'.*sqlite:///mlflow\.db"):
        TypeAdapter(TrackingConfig).validate_python({"type": "mlflow", "uri": "./mlruns"})
