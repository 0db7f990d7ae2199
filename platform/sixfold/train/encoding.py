"""``sixfold data encode``: a trained codec's latents of a data set, by one process or several.

Run as ``python -m sixfold.train.encoding STAGING_FOLDER`` by a launcher for each of several ranks; ranks share nothing
but the staging folder.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sixfold.errors import UserError, user_facing
from sixfold.models.codec.config import CodecConfig
from sixfold.models.network import reset_buffers
from sixfold.models.trained.network import TrainedNetwork
from sixfold.recipe.load import load_recipe
from sixfold.recipe.trained import network_of_run
from sixfold.train.codec_identity import codec_hash
from sixfold.train.roles import checkpoint_of, read_trained
from sixfold.train.run_folder import RunFolder
from sixfold_data.config import BucketsConfig, CacheConfig
from sixfold_data.decode import to_unit_range
from sixfold_data.encode import JOB_NAME, Encode, Encoded, EncodeJob, encode_pieces, stored_batch
from sixfold_data.index import LatentsEntry, Manifest, read_manifest
from sixfold_data.store import open_store


def plan_job(
    run: Path,
    data: str,
    *,
    batch: int,
    piece_samples: int,
    corrupt_budget: int,
    buckets: BucketsConfig | None = None,
) -> EncodeJob:
    """Describe the job of encoding a data set by the codec of a run, its newest checkpoint's.

    Images are brought to the size of nearest aspect ratio among ``buckets``, or all to one.

    Raises:
        UserError: the run trains no codec, or has no checkpoint; the data are no images, or of other channels; a side
            of a bucket is no multiple of the codec's factor.
    """
    source = codec_of(run)
    config = source.architecture
    assert isinstance(config, CodecConfig), "codec_of looked"
    manifest = read_manifest(open_store(data, CacheConfig()))
    if manifest.kind not in ("images", "image-text"):
        raise UserError.of(
            f"the data set holds {manifest.kind}", where=data, allowed="images, image-text", fix="name a set of images"
        )
    if manifest.channels != config.channels:
        raise UserError.of(
            f"the images have {manifest.channels} channels, the codec reads {config.channels}",
            where=data,
            fix="name images like those that the codec was trained on",
        )
    candidate = checkpoint_of(source)
    sizes = _sizes(config, manifest, buckets)
    cells = {(height // config.factor, width // config.factor) for height, width in sizes}
    entry = LatentsEntry(
        codec=codec_hash(read_trained(source)),
        source=manifest.fingerprint,
        form="codes" if config.codebook_size else "moments",
        channels=1 if config.codebook_size else config.latent_channels,
        size=next(iter(cells)) if len(cells) == 1 else None,
        codebook_size=config.codebook_size,
    )
    return EncodeJob(
        data=data if "://" in data else str(Path(data).resolve()),
        run=str(run.resolve()),
        step=candidate.step,
        latents=entry,
        sizes=sizes,
        factor=config.factor,
        channels=config.channels,
        batch=batch,
        piece_samples=piece_samples,
        corrupt_budget=corrupt_budget,
    )


def _sizes(config: CodecConfig, manifest: Manifest, buckets: BucketsConfig | None) -> tuple[tuple[int, int], ...]:
    """Return the heights and widths that images are brought to."""
    if buckets is None:
        size = manifest.image_size or (config.image_size, config.image_size)
        fits = not any(side % config.factor for side in size)
        return (size if fits else (config.image_size, config.image_size),)
    if any(side % config.factor for shape in buckets.shapes for side in shape):
        raise UserError.of(
            f"some side of the buckets {buckets.text} is no multiple of {config.factor}, the codec's factor",
            where="--bucket-step",
            fix=f"choose a multiple of {config.factor}",
        )
    return buckets.shapes


def codec_of(run: Path, step: int | None = None) -> TrainedNetwork:
    """Return a run's codec.

    Raises:
        UserError: the run trains none.
    """
    recipe = load_recipe(RunFolder(run).recipe).recipe
    trained = recipe.objective.trains
    roles = [role for role, name in trained.items() if isinstance(recipe.networks[name], CodecConfig)]
    if not roles:
        raise UserError.of(
            f"the run {recipe.name} trains no codec, but {', '.join(trained)}", where=str(run), fix="name a codec's run"
        )
    return network_of_run(run, roles[0], step)


def encoder_of(job: EncodeJob, device: torch.device) -> Encode:
    """Load a job's codec as a function of images."""
    source = codec_of(Path(job.run), job.step)
    config = source.architecture
    codec: nn.Module = config.load()(config)
    reset_buffers(codec)
    codec.load_state_dict(read_trained(source))
    return encode_with(codec.to(device).eval().requires_grad_(False), job, device)


def encode_with(codec: nn.Module, job: EncodeJob, device: torch.device) -> Encode:
    """Return a codec as a function of images, in the form that a job keeps."""

    @torch.no_grad()
    def encode(pixels: np.ndarray) -> Encoded:
        made: dict[str, Tensor] = codec(to_unit_range(pixels).to(device), task="encode")
        if job.latents.form == "codes":
            nothing = np.zeros(job.latents.channels)
            return Encoded(stored_batch(made["codes"].cpu().numpy(), job.latents), nothing, nothing)
        mean, log_variance = made["mean"].float(), made["log_variance"].float()
        expected_square = mean.double().square() + log_variance.double().exp()
        return Encoded(
            stored_batch(torch.cat([mean, log_variance], dim=1).cpu().numpy(), job.latents),
            mean.double().sum((0, 2, 3)).cpu().numpy(),
            expected_square.sum((0, 2, 3)).cpu().numpy(),
        )

    return encode


def encode_in(staging: Path, *, rank: int = 0, ranks: int = 1, progress: Callable[[int], None]) -> None:
    """Do a rank's share of the job in a staging folder."""
    job = EncodeJob.model_validate_json((staging / JOB_NAME).read_bytes())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    encode_pieces(job, staging, encoder_of(job, device), rank=rank, ranks=ranks, progress=progress)


def main() -> None:
    """Do this rank's share; leave any error where the launcher looks for it."""
    # Launchers start ranks with these blocked. A rank may end at any moment here: it loses the piece in hand.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    folder, rank = RunFolder(Path(sys.argv[1])), int(os.environ.get("RANK", "0"))
    try:
        encode_in(folder.path, rank=rank, ranks=int(os.environ.get("WORLD_SIZE", "1")), progress=lambda samples: None)
    except Exception as error:  # the one place that reports for the whole process
        known = user_facing(error)
        folder.leave_error(rank, traceback.format_exc() if known is None else str(known))
        sys.exit(1 if known is None else known.exit_code)


if __name__ == "__main__":
    main()
