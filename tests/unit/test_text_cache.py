"""Features of captions in shards: the same training as with the encoders, and those of another encoder refused."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from latent_cases import make_scenes
from sixfold.cli.main import build_app
from sixfold.distributed.process_group import World
from sixfold.errors import DataError, RecipeError
from sixfold.models.text_encoder.config import END_OF_TEXT
from sixfold.recipe.load import load_recipe
from sixfold.train.assembly import assemble
from sixfold.train.loop import train_step
from sixfold_data.config import DataConfig
from sixfold_data.describe import describe
from sixfold_data.encode_text import write_text_features
from sixfold_data.store import open_store
from sixfold_data.verify import verify
from text_encoders import save_clip, save_t5

pytest.importorskip("transformers")

RECIPE = """
name: flow/frozen-text
seed: 0
data: {{path: {data}, global_batch: 8, caption_length: 56}}
networks:
  denoiser:
    {{type: mmdit, image_size: 16, patch_size: 4, channels: 3, width: 16, depth: 1, heads: 2, text_tokens: 14,
      text_width: 24, pooled_width: 12}}
  clip:
    {{type: huggingface_text, path: {clip}, encoder_folder: text_encoder, tokenizer_folder: tokenizer,
      text_tokens: 8, text_width: 16, pooled_width: 12, layer: -2}}
  t5: {{type: huggingface_text, path: {t5}, text_tokens: 6, text_width: 24, dtype: bf16}}
objective:
  type: denoising
  encoders: {{clip: {{frozen: true, drop: 0.3}}, t5: {{frozen: true, drop: 0.6}}}}
  path: {{type: rectified_flow}}
  time: {{type: logit_normal}}
  prediction: velocity
optimizer: {{type: adamw, lr: 0.05}}
schedule: {{type: constant}}
engine: {{type: ddp, precision: fp32}}
train: {{steps: 10}}
checkpoint: {{every_steps: 10}}
tracking: {{type: jsonl}}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text-cache")
    make_scenes(folder / "scenes", image_size=16)
    save_clip(folder / "clip")
    save_t5(folder / "t5")
    return folder


def recipe_on(folder, data, **changes):
    paths = {"data": folder / data, "clip": folder / "clip", "t5": folder / "t5"} | changes
    file = folder / f"{data}.yaml"
    file.write_text(RECIPE.format(**paths))
    return file


@pytest.fixture(scope="module")
def encoded(here):
    file = recipe_on(here, "scenes")
    words = ["data", "encode-text", str(file), str(here / "scenes"), "--out", str(here / "encoded"), "--json"]
    done = CliRunner().invoke(build_app(), words, catch_exceptions=False)
    assert json.loads(done.stdout)["samples"] == {"train": 36, "val": 4}
    return here / "encoded"


def losses(file, steps=6):
    training = assemble(load_recipe(str(file)).recipe, World())
    found = []
    for _ in range(steps):
        stepped = train_step(training, next(training.stream))
        training.progress = stepped.progress
        found.append(stepped.metrics["loss"])
    return training, torch.tensor(found, dtype=torch.float64)


def test_training_is_the_same_with_features_as_with_encoders(here, encoded):
    live, expected = losses(recipe_on(here, "scenes"))
    cached, found = losses(recipe_on(here, "encoded"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    networks = {name: part.network for name, part in cached.companions.items()}
    assert set(networks) == {"clip", "t5"}
    assert not any(network._live for network in networks.values()), "no encoder was read"
    assert not any(list(network.parameters()) for network in networks.values())
    # A caption that no sample had is encoded by the encoder itself.
    caption = torch.full((1, 56), END_OF_TEXT)
    caption[0, :5] = torch.tensor(list(b"a red"))
    text, pooled = networks["clip"](caption)
    own = live.companions["clip"].network(caption)
    torch.testing.assert_close((text, pooled), own)
    assert networks["clip"]._live


def test_features_lie_in_verified_shards_with_all_that_was_there(here, encoded):
    assert not verify(open_store(str(encoded)), lambda done, total: None).faults
    before, after = (describe(DataConfig(path=str(here / name), global_batch=1)) for name in ("scenes", "encoded"))
    assert (before.kind, before.samples, before.classes) == (after.kind, after.samples, after.classes)
    assert [entry.values for entry in after.text.values()] == [8 * 16 + 12, 6 * 24]
    assert [entry.dtype for entry in after.text.values()] == ["fp32", "bf16"]
    assert not before.text


def test_features_of_another_encoder_are_refused(here, encoded, tmp_path):
    shutil.copytree(here / "t5", tmp_path / "t5")
    save_t5(tmp_path / "t5", seed=7)
    with pytest.raises(RecipeError, match=r"networks\.t5 is [0-9a-f]{16}"):
        assemble(load_recipe(str(recipe_on(here, "encoded", t5=tmp_path / "t5"))).recipe, World())
    other = load_recipe(str(recipe_on(here, "encoded")), ["networks.clip.layer=-1"]).recipe
    with pytest.raises(RecipeError, match=r"networks\.clip is"):
        assemble(other, World())


def test_what_cannot_be_encoded_is_refused(here, tmp_path):
    def broken(captions):
        return torch.full((len(captions), 3), float("nan"))

    settings = {"caption_length": 56, "batch": 8, "progress": lambda done, total: None}
    with pytest.raises(DataError, match="features of the empty caption are not finite"):
        write_text_features(str(here / "scenes"), tmp_path / "out", {"0" * 16: broken}, **settings)
    assert not list(tmp_path.iterdir())
    trained = ["data", "encode-text", "flow/mmdit-smoke", str(here / "scenes"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(build_app(), trained)
    assert "has no frozen text encoder" in str(done.exception)
