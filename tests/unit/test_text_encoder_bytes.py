"""The byte-level text encoder: padding changes nothing, every byte is seen, and captions are dropped one by one."""

import pytest
import torch

from model_helpers import randomized
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import DataError, RecipeError
from sixfold.models.mmdit.config import MMDiTConfig
from sixfold.models.text_encoder.config import END_OF_TEXT, ByteTextEncoderConfig
from sixfold.objectives.conditioning.conditioning import Conditioning
from sixfold.objectives.conditioning.config import EncoderConfig
from sixfold.objectives.contract import Batch, Progress
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.denoising.objective import Denoising

SMALL = ByteTextEncoderConfig(length=12, width=16, depth=2, heads=2)


def mmdit(**changes):
    settings = {"image_size": 4, "patch_size": 2, "channels": 1, "width": 16, "depth": 2, "heads": 2}
    return MMDiTConfig(**(settings | {"text_tokens": 12, "text_width": 16, "pooled_width": 16} | changes))


def captions(*texts, length=12):
    rows = torch.full((len(texts), length), END_OF_TEXT)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text.encode())] = torch.tensor(list(text.encode()), dtype=torch.int64)
    return rows


def test_what_follows_the_end_changes_nothing():
    encoder = randomized(SMALL)
    caption = captions("a red x")
    changed = caption.clone()
    changed[0, 9] = 7
    for one, other in zip(encoder(caption), encoder(changed), strict=True):
        torch.testing.assert_close(one, other)
    text, pooled = encoder(caption)
    assert not text[0, 8:].any()
    torch.testing.assert_close(pooled[0], text[0, :8].mean(0))


def test_each_byte_is_seen_by_all_before_and_after_it():
    encoder = randomized(SMALL)
    one, other = (encoder(captions(text))[0] for text in ("a red x", "a rid x"))
    assert ((one - other)[0, :8].abs().amax(-1) > 1e-6).all()


def test_the_empty_caption_has_features_of_its_own():
    encoder = randomized(SMALL)
    text, pooled = encoder(captions(""))
    assert torch.isfinite(pooled).all()
    assert text[0, 0].any()
    assert not text[0, 1:].any()


def test_neighbours_are_merged():
    """Without the convolution a token knows its bytes, not their order; other tokens know that they changed places."""
    merged = SMALL.model_copy(update={"merge": 3, "stem": 1})
    assert merged.text_tokens == 4
    encoder = randomized(merged)
    text, within, across = (encoder(captions(caption))[0] for caption in ("a red x", " ared x", "a erd x"))
    torch.testing.assert_close(text, within)
    assert ((text - across)[0, :3].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("merge", [2, 3])
def test_what_follows_the_end_changes_nothing_within_a_token(merge):
    encoder = randomized(SMALL.model_copy(update={"merge": merge}))
    caption = captions("a red x")
    changed = caption.clone()
    changed[0, 8:] = 7
    for one, other in zip(encoder(caption), encoder(changed), strict=True):
        torch.testing.assert_close(one, other)
    assert not encoder(caption)[0][0, -(-8 // merge) :].any()


def test_encoders_lose_their_captions_independently():
    networks = {"one": SMALL, "two": SMALL}
    encoders = {"one": EncoderConfig(drop=0.5), "two": EncoderConfig(drop=0.25)}
    conditioning = Conditioning(encoders, networks, mmdit(text_tokens=24, pooled_width=32))
    random = PositionRandom(0, torch.arange(4000))
    fields = {"caption": captions("a red x").expand(4000, -1)}
    dropped = conditioning.dropped(fields, random, 0.9)
    one, two = ((dropped[name] == END_OF_TEXT).all(1).float() for name in ("one", "two"))
    assert one.mean() == pytest.approx(0.5, abs=0.03)
    assert two.mean() == pytest.approx(0.25, abs=0.03)
    assert (one * two).mean() == pytest.approx(0.125, abs=0.03)
    kept = (dropped["one"] == fields["caption"]).all(1) | one.bool()
    assert kept.all()


def test_denoiser_and_encoder_train_in_one_phase():
    networks = {"denoiser": mmdit(), "text_encoder": SMALL}
    objective = Denoising(DenoisingConfig(encoders={"text_encoder": EncoderConfig()}), networks)
    (phase,) = objective.phases(Progress(samples=0, step=0, total_steps=1))
    assert set(phase.trains) == {"denoiser", "text_encoder"}
    nets = {name: randomized(config) for name, config in networks.items()}
    batch = Batch({"image": torch.randn(3, 1, 4, 4), "caption": captions("a", "red", "x")}, torch.arange(3))
    objective(nets, batch, phase, PositionRandom(0, batch.positions)).loss.backward()
    # The last block's text stream gives keys and values alone: its queries meet nothing, yet take part in every sum.
    untouched = [name for name, value in nets["denoiser"].named_parameters() if value.grad is None]
    assert untouched == []
    assert all(value.grad is not None for value in nets["text_encoder"].parameters())


def test_what_does_not_fit_is_refused():
    one = {"text_encoder": EncoderConfig()}
    with pytest.raises(RecipeError, match="names no text encoder"):
        Conditioning({}, {}, mmdit())
    with pytest.raises(RecipeError, match="text_tokens is 9, the encoders give 12"):
        Conditioning(one, {"text_encoder": SMALL}, mmdit(text_tokens=9))
    with pytest.raises(RecipeError, match="pooled_width is 8"):
        Conditioning(one, {"text_encoder": SMALL}, mmdit(pooled_width=8))
    objective = Denoising(DenoisingConfig(encoders=one), {"denoiser": mmdit(), "text_encoder": SMALL})
    batch = Batch({"image": torch.randn(3, 1, 4, 4)}, torch.arange(3))
    with pytest.raises(DataError, match="conditioned on caption"):
        objective.evaluate({}, batch, PositionRandom(0, batch.positions))
