"""Every full-size recipe can be planned and rehearsed: promise 7.

``SIXFOLD_PLANS=full`` tries every one as it is, which takes half a minute of CPU time each. The suite takes two; fake
tensors cost time by the operation, not by the element, and so it makes them two blocks deep.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sixfold.cli.main import build_app
from sixfold.errors import RecipeError
from sixfold.models.text_encoder.config import HuggingFaceTextConfig
from sixfold.models.text_encoder.hugging_face import SilentText
from sixfold.pipeline.load import is_pipeline
from sixfold.planning.trace import trace_step
from sixfold.recipe.catalogue import catalogue
from sixfold.recipe.load import load_recipe
from sixfold.train.rehearsal import rehearse_recipe

RANKS = 512
FULL_SIZE = [
    entry.name for entry in catalogue() if not entry.name.endswith(("-smoke", "-cpu")) and not is_pipeline(entry.path)
]
FULL = os.environ.get("SIXFOLD_PLANS") == "full"
IN_SUITE = ["codec/kl-f8d4", "flow/mmdit-2b"]
ENCODER_BYTES = 2 * (123650304 + 694659840 + 4762310656)
"""CLIP L, CLIP G and T5 XXL in bf16, whole on every rank."""


@pytest.fixture
def shallow(tmp_path, monkeypatch):
    """The recipes as the catalogue finds them; two blocks deep, unless all is to be tried."""
    source = next(entry.path for entry in catalogue() if entry.name == "flow/mmdit-2b").parents[1]
    shutil.copytree(source, tmp_path / "recipes")
    for path in [] if FULL else (tmp_path / "recipes").rglob("*.yaml"):
        path.write_text(re.sub(r"\bdepth: \d\d+", "depth: 2", path.read_text()))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", FULL_SIZE if FULL else IN_SUITE)
def test_every_full_size_recipe_is_rehearsed_and_planned_on_512_ranks(name, shallow):
    recipe = load_recipe(name, []).recipe
    rehearsed = rehearse_recipe(recipe, RANKS)
    assert all(role.parameters > 0 for role in rehearsed.values())
    trace = trace_step(recipe, RANKS)
    assert trace.flops > 0
    assert trace.parameters == {
        role: found.parameters for role, found in rehearsed.items() if role in recipe.objective.trains
    }
    others = {role: found.parameter_bytes for role, found in rehearsed.items() if role not in recipe.objective.trains}
    assert trace.companion_bytes == sum(others.values())
    if name == "flow/mmdit-2b":
        assert set(others) == {"codec", "clip_l", "clip_g", "t5"}
        assert sum(others.values()) - others["codec"] == ENCODER_BYTES


def test_an_encoder_of_unknown_size_is_refused(tmp_path):
    config = HuggingFaceTextConfig(path=str(tmp_path / "nowhere"), text_tokens=8, text_width=16)
    with pytest.raises(RecipeError, match="how large the text encoder is"):
        SilentText(config)


def test_a_recipe_that_cannot_be_planned_leaves_the_others_their_lines(tmp_path, monkeypatch):
    smoke = next(entry.path for entry in catalogue() if entry.name == "flow/dit-smoke")
    (tmp_path / "good.yaml").write_text(f"base: {smoke}\nname: good\n")
    (tmp_path / "odd.yaml").write_text(f"base: {smoke}\nname: odd\ndata: {{lanes: 1}}\n")
    monkeypatch.setattr("sixfold.recipe.catalogue.recipe_folders", lambda: [Path(tmp_path)])
    planned = CliRunner().invoke(build_app(), ["plan", "--all", "--gpus-per-node", "4"], catch_exceptions=False)
    assert planned.exit_code == 0, planned.output
    assert "good" in planned.output
    assert "odd: no plan:" in planned.output
    assert "4 ranks cannot share 1 lanes" in planned.output
