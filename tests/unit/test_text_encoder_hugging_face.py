"""Frozen CLIP and T5 encoders from a folder, against transformers itself on tiny random models."""

import json

import pytest
import torch

from sixfold.errors import RecipeError
from sixfold.models.mmdit.config import MMDiTConfig
from sixfold.models.text_encoder.config import END_OF_TEXT, HuggingFaceTextConfig
from sixfold.models.text_encoder.hugging_face import texts_of
from sixfold.objectives.conditioning.conditioning import Conditioning
from sixfold.objectives.conditioning.config import EncoderConfig
from text_encoders import save_clip, save_t5, save_tokenizer

transformers = pytest.importorskip("transformers")


def captions(*texts, length=40):
    rows = torch.full((len(texts), length), END_OF_TEXT)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text.encode())] = torch.tensor(list(text.encode()), dtype=torch.int64)
    return rows


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder)
    return folder


def clip_config(folder, **changes):
    settings = {"text_tokens": 8, "text_width": 16, "pooled_width": 12, "layer": -2} | changes
    return HuggingFaceTextConfig(
        path=str(folder), encoder_folder="text_encoder", tokenizer_folder="tokenizer", **settings
    )


def test_clip_gives_the_features_of_the_layer_before_the_last_and_the_projection(clip):
    config = clip_config(clip)
    text, pooled = config.load()(config)(captions("a red circle", "blue"))
    theirs = transformers.CLIPTextModelWithProjection.from_pretrained(clip / "text_encoder").eval()
    tokens = torch.tensor([[3, 4, 6, 1, 0, 0, 0, 0], [5, 1, 0, 0, 0, 0, 0, 0]])
    expected = theirs(tokens, output_hidden_states=True)
    torch.testing.assert_close(text, expected.hidden_states[-2])
    torch.testing.assert_close(pooled, expected.text_embeds)
    assert pooled.shape == (2, 12)


def test_t5_gives_its_last_features_and_nothing_pooled(t5):
    config = HuggingFaceTextConfig(path=str(t5), text_tokens=6, text_width=24)
    text, pooled = config.load()(config)(captions("a blue square"))
    theirs = transformers.T5EncoderModel.from_pretrained(t5).eval()
    torch.testing.assert_close(text, theirs(torch.tensor([[3, 5, 7, 1, 0, 0]])).last_hidden_state)
    assert pooled is None


def test_several_encoders_are_joined_as_in_stable_diffusion_3(clip, t5):
    configs = {
        "clip_l": clip_config(clip),
        "clip_g": clip_config(clip),
        "t5": HuggingFaceTextConfig(path=str(t5), text_tokens=6, text_width=24),
    }
    denoiser = MMDiTConfig(
        image_size=4,
        patch_size=2,
        channels=1,
        width=16,
        depth=1,
        heads=2,
        text_tokens=14,
        text_width=40,
        pooled_width=24,
    )
    encoders = {
        "clip_l": EncoderConfig(frozen=True),
        "clip_g": EncoderConfig(frozen=True, beside=True),
        "t5": EncoderConfig(frozen=True),
    }
    conditioning = Conditioning(encoders, configs, denoiser)
    nets = {name: config.load()(config) for name, config in configs.items()}
    caption = captions("a red circle above a blue square")
    made = conditioning.encode(nets, conditioning.inputs({"caption": caption}))
    assert made["text"].shape == (1, 14, 40)
    (first, pooled), (third, _) = nets["clip_l"](caption), nets["t5"](caption)
    torch.testing.assert_close(made["text"][:, :8, :16], first)
    torch.testing.assert_close(made["text"][:, :8, 16:32], first)
    torch.testing.assert_close(made["text"][:, 8:, :24], third)
    assert not made["text"][:, :8, 32:].any()
    assert not made["text"][:, 8:, 24:].any()
    torch.testing.assert_close(made["pooled"], torch.cat([pooled, pooled], dim=-1))
    assert conditioning.roles["t5"].kind == "frozen"


def test_an_encoder_in_bf16_keeps_its_weights_so_and_gives_nearly_the_same_features(clip):
    config, half = clip_config(clip), clip_config(clip, dtype="bf16")
    encoder, smaller = config.load()(config), half.load()(half)
    assert {value.dtype for value in smaller.parameters()} == {torch.bfloat16}
    (text, pooled), (near, nearly) = encoder(captions("a red circle")), smaller(captions("a red circle"))
    assert near.dtype == nearly.dtype == torch.float32
    torch.testing.assert_close(near, text, atol=0.05, rtol=0.05)
    torch.testing.assert_close(nearly, pooled, atol=0.05, rtol=0.05)
    assert not torch.equal(near, text)


def test_what_cannot_be_read_is_refused(clip, tmp_path):
    missing = HuggingFaceTextConfig(path=str(tmp_path / "nowhere"), text_tokens=8, text_width=16)
    with pytest.raises(RecipeError, match="cannot be read"):
        missing.load()(missing)
    wrong = clip_config(clip, text_width=20)
    with pytest.raises(RecipeError, match="the encoder has 16, 12"):
        wrong.load()(wrong)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_tokenizer(tmp_path / "bert")
    other = HuggingFaceTextConfig(path=str(tmp_path / "bert"), text_tokens=8, text_width=16)
    with pytest.raises(RecipeError, match="'bert' is not among clip"):
        other.load()(other)


def test_captions_end_at_their_first_end_of_text():
    assert texts_of(captions("a red circle", "grün", "")) == ["a red circle", "grün", ""]
    full = captions("0123456789", length=10)
    assert texts_of(full) == ["0123456789"]
