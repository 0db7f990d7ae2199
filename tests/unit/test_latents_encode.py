"""Encoding a data set: what is written is what the codec says, in any number of processes and after any stop."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from latent_cases import codec_run, make_scenes
from sixfold.cli.main import build_app
from sixfold.errors import DataError, RecipeError, UserError
from sixfold.models.network import reset_buffers
from sixfold.recipe.load import load_recipe
from sixfold.recipe.trained import resolve_networks
from sixfold.train.codec_identity import check_codec
from sixfold.train.encoding import codec_of, encode_in, encoder_of, plan_job
from sixfold.train.roles import read_trained
from sixfold_data.build import BuildOptions
from sixfold_data.build_images import build_image_text
from sixfold_data.config import BucketsConfig, DataConfig
from sixfold_data.describe import describe
from sixfold_data.encode import encode_pieces, finish_job, finished_samples, open_job, pieces_of
from sixfold_data.evaluation import EvaluationReader
from sixfold_data.index import open_split, read_manifest
from sixfold_data.latents import denormalized
from sixfold_data.store import open_store
from sixfold_data.verify import verify


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    return codec_run(scenes, tmp_path_factory.mktemp("runs") / "codec")


def plan(run, scenes, **changes):
    return plan_job(run, str(scenes), **({"batch": 8, "piece_samples": 16, "corrupt_budget": 0} | changes))


def encode(run, scenes, out, *, ranks=1, **changes):
    job = plan(run, scenes, **changes)
    staging = open_job(job, out)
    for rank in range(ranks):
        encode_in(staging, rank=rank, ranks=ranks, progress=lambda samples: None)
    return finish_job(job, staging, out)


def read(path, split="train", **settings):
    config = DataConfig(path=str(path), global_batch=1, caption_length=56, **settings)
    batches = list(EvaluationReader(config, split=split, batch=8))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0].fields}


def test_latents_are_the_codecs_and_captions_come_along(run, scenes, tmp_path):
    report = encode(run, scenes, tmp_path / "latents")
    assert report.samples == {"train": 36, "val": 4}
    source = codec_of(run)
    codec = source.architecture.load()(source.architecture)
    reset_buffers(codec)
    codec.load_state_dict(read_trained(source))
    images, latents = read(scenes), read(tmp_path / "latents")
    assert torch.equal(images["caption"], latents["caption"])
    with torch.no_grad():
        made = codec.eval()(images["image"], task="encode")
    entry = describe(DataConfig(path=str(tmp_path / "latents"), global_batch=1)).latents
    mean, log_variance = latents["latent"].chunk(2, dim=1)
    assert (denormalized(mean, entry) - made["mean"]).abs().max() < 2e-3 * made["mean"].abs().max()
    expected = made["log_variance"] - 2 * torch.tensor(entry.std).log()[:, None, None]
    assert (log_variance - expected).abs().max() < 1e-2
    # Normalised: samples of the posterior have mean 0 and standard deviation 1 in every channel.
    second = mean.square() + log_variance.exp()
    assert mean.mean((0, 2, 3)).abs().max() < 1e-2
    assert (second.mean((0, 2, 3)) - 1).abs().max() < 1e-2
    assert not verify(open_store(str(tmp_path / "latents")), lambda done, total: None).faults


def test_any_number_of_processes_writes_the_same_data_set(run, scenes, tmp_path):
    one = encode(run, scenes, tmp_path / "one")
    three = encode(run, scenes, tmp_path / "three", ranks=3)
    assert one.fingerprint == three.fingerprint


def test_a_stopped_job_goes_on_and_encodes_nothing_twice(run, scenes, tmp_path, monkeypatch):
    whole = encode(run, scenes, tmp_path / "whole")
    job = plan(run, scenes)
    staging = open_job(job, tmp_path / "stopped")

    class StoppedError(Exception):
        pass

    seen = 0

    def stop_late(samples):
        nonlocal seen
        seen += samples
        if seen > 20:
            raise StoppedError

    with pytest.raises(StoppedError):
        encode_in(staging, progress=stop_late)
    assert finished_samples(job, staging) == 16
    staging, again = open_job(job, tmp_path / "stopped"), []
    encode_in(staging, progress=again.append)
    assert sum(again) == 40 - 16
    assert finish_job(job, staging, tmp_path / "stopped").fingerprint == whole.fingerprint
    assert not staging.exists()


def test_pieces_of_another_job_are_refused(run, scenes, tmp_path):
    open_job(plan(run, scenes), tmp_path / "out")
    with pytest.raises(DataError, match="unfinished job"):
        open_job(plan(run, scenes, piece_samples=8), tmp_path / "out")


def test_damaged_images_are_left_out_within_a_budget(run, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    shard = next((tmp_path / "scenes" / "train").glob("shard-*.tar"))
    index = np.load(tmp_path / "scenes" / "train" / "index" / "offset.png.npy")
    content = bytearray(shard.read_bytes())
    content[int(index[3]) + 40] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        encode(run, tmp_path / "scenes", tmp_path / "none")
    report = encode(run, tmp_path / "scenes", tmp_path / "some", corrupt_budget=1)
    assert report.samples["train"] == 35
    assert "checksum" in report.remarks[0]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Captioned pictures of several sizes."""
    pictures, random = tmp_path_factory.mktemp("mixed") / "pictures", np.random.default_rng(0)
    pictures.mkdir()
    for number in range(15):
        size = ((40, 40), (36, 50), (60, 33))[number % 3]
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(pictures / f"p{number:02d}.png")
        (pictures / f"p{number:02d}.txt").write_text(f"picture {number}")
    build_image_text(pictures, BuildOptions(out=pictures.parent / "set", val_fraction=0.2))
    return pictures.parent / "set"


PIXELS = BucketsConfig(sizes=((32, 32), (48, 32), (32, 48)))
CELLS = BucketsConfig(sizes=((8, 8), (12, 8), (8, 12)))


def test_latents_of_several_aspect_ratios_are_encoded_and_read_in_buckets(run, mixed, tmp_path):
    one = encode(run, mixed, tmp_path / "one", buckets=PIXELS)
    two = encode(run, mixed, tmp_path / "two", buckets=PIXELS, ranks=2)
    assert one.fingerprint == two.fingerprint
    source = codec_of(run)
    codec = source.architecture.load()(source.architecture)
    reset_buffers(codec)
    codec.load_state_dict(read_trained(source))
    entry = describe(DataConfig(path=str(tmp_path / "one"), global_batch=1, buckets=CELLS)).latents
    assert entry.size is None
    shapes = set()
    for images, latents in zip(batches_of(mixed, PIXELS), batches_of(tmp_path / "one", CELLS), strict=True):
        assert torch.equal(images["caption"], latents["caption"])
        mean, _ = latents["latent"].chunk(2, dim=1)
        with torch.no_grad():
            made = codec.eval()(images["image"], task="encode")["mean"]
        assert (denormalized(mean, entry) - made).abs().max() < 2e-3 * made.abs().max()
        shapes.add(tuple(mean.shape[2:]))
    assert shapes == {(8, 8), (8, 12), (12, 8)}
    assert not verify(open_store(str(tmp_path / "one")), lambda done, total: None).faults
    with pytest.raises(DataError, match="latents of 12x8 cells are of none"):
        list(batches_of(tmp_path / "one", BucketsConfig(sizes=((8, 8), (10, 8), (8, 12)))))
    with pytest.raises(DataError, match=r"latents differ in size.*\n.*set data\.buckets"):
        read(tmp_path / "one")
    with pytest.raises(UserError, match="no multiple of 4"):
        plan(run, mixed, buckets=BucketsConfig(sizes=((30, 32),)))


def batches_of(path, buckets):
    config = DataConfig(path=str(path), global_batch=1, caption_length=16, buckets=buckets)
    return EvaluationReader(config, split="train", batch=8)


@pytest.mark.parametrize(("value", "told"), [(np.inf, "beyond 65504"), (np.nan, "not numbers")])
def test_latents_that_cannot_be_kept_are_named(run, scenes, tmp_path, value, told):
    job = plan(run, scenes)
    staging = open_job(job, tmp_path / "out")
    codec = encoder_of(job, torch.device("cpu"))

    def broken(pixels):
        encoded = codec(pixels)
        encoded.stored[1, 0, 0, 0] = value
        return encoded

    with pytest.raises(DataError, match=rf"latents of sample \S+ are {told}") as raised:
        encode_pieces(job, staging, broken, rank=0, ranks=1, progress=lambda samples: None)
    manifest = read_manifest(open_store(str(scenes)))
    assert open_split(open_store(str(scenes)), manifest, "train").key(1) in str(raised.value)
    assert not finished_samples(job, staging)


def test_codes_are_written_as_integers(scenes, tmp_path):
    run = codec_run(scenes, tmp_path / "fsq", "networks.codec.bottleneck={type: fsq, levels: [5, 5]}")
    encode(run, scenes, tmp_path / "codes")
    codes = read(tmp_path / "codes")["codes"]
    assert codes.dtype == torch.int64
    assert codes.shape == (36, 8, 8)
    assert 0 <= codes.min() <= codes.max() < 25
    settings = [f"data.path={tmp_path}/codes", f"networks.codec.run={run}", "evaluation=null", "data.global_batch=8"]
    recipe = load_recipe("flow/mmdit-smoke", settings).recipe
    with pytest.raises(RecipeError, match="codes of a codebook of 25"):
        check_codec(recipe, resolve_networks(recipe), describe(recipe.data))


def test_what_is_no_codec_or_no_image_is_refused(run, scenes, tmp_path):
    encode(run, scenes, tmp_path / "latents")
    with pytest.raises(UserError, match="holds latents"):
        plan(run, tmp_path / "latents")
    small = make_scenes(tmp_path / "small", image_size=16)
    assert plan(run, small).latents.size == (4, 4)
    assert {piece.split for piece in pieces_of(plan(run, small))} == {"train", "val"}


def test_the_command_shares_the_work_among_processes(run, scenes, tmp_path):
    arguments = ["data", "encode", str(run), str(scenes), "--out", str(tmp_path / "out"), "--nproc", "2"]
    done = CliRunner().invoke(build_app(), [*arguments, "--piece-samples", "16", "--batch", "8", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["samples"] == {"train": 36, "val": 4}
    encode(run, scenes, tmp_path / "here")
    there, here = read(tmp_path / "out"), read(tmp_path / "here")
    assert torch.equal(there["caption"], here["caption"])
    # Another number of threads may round the codec's convolutions otherwise.
    torch.testing.assert_close(there["latent"], here["latent"], rtol=1e-2, atol=1e-2)


def test_latents_can_be_looked_at(run, scenes, tmp_path):
    encode(run, scenes, tmp_path / "latents")
    arguments = ["data", "inspect", str(tmp_path / "latents"), "--out", str(tmp_path / "grid.png"), "--count", "4"]
    done = CliRunner().invoke(build_app(), arguments)
    assert done.exit_code == 0, done.output
    assert "latents" in done.output
    assert (tmp_path / "grid.png").exists()
