"""Whether `sixfold data encode` is bound by the codec: samples/s of the job beside the codec's alone.

    python tests/benchmarks/bench_encode.py [--samples 4096] [--size 64] [--rounds 3]

The codec of `codec/kl-scenes-smoke` with random weights, in one process, on PNG pictures in shards; and the very same
function on batches that are in memory already. Best of the rounds, which take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sixfold.models.network import initialize, parameter_tags
from sixfold.recipe.load import load_recipe
from sixfold.train.encoding import encode_with
from sixfold_data.build import BuildOptions, building
from sixfold_data.build_images import encode_png
from sixfold_data.encode import Encode, EncodeJob, encode_pieces, open_job
from sixfold_data.index import LatentsEntry

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = load_recipe("codec/kl-scenes-smoke", [f"networks.codec.image_size={options.size}"]).recipe.networks[
        "codec"
    ]
    codec = config.load()(config)
    initialize(codec, parameter_tags(codec), seed=0, role="codec")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "images", options.samples, options.size)
        job = job_of(Path(folder) / "images", options.size, config)
        encode = encode_with(codec.eval(), job, torch.device("cpu"))
        rates = {"codec": 0.0, "job": 0.0}
        for number in range(options.rounds):
            rates["codec"] = max(rates["codec"], options.samples / alone(encode, options.samples, options.size))
            rates["job"] = max(rates["job"], options.samples / whole(job, Path(folder) / f"out-{number}", encode))
    for name, rate in rates.items():
        print(f"{name:<8}{rate:10,.0f} samples/s")
    print(f"{'ratio':<8}{rates['job'] / rates['codec']:10.2f}")


def build(out: Path, samples: int, size: int) -> None:
    """Write pictures of smooth noise, which PNG shortens about as much as photographs."""
    random = np.random.default_rng(0)
    with building(BuildOptions(out=out, val_fraction=0.0)) as work:
        for number in range(samples):
            coarse = random.integers(0, 256, (size // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1)
            pixels = (coarse + random.integers(0, 16, (size, size, 3))).clip(0, 255).astype(np.uint8)
            work.writers["train"].add(f"{number:08d}", {"png": encode_png(Image.fromarray(pixels))}, size=(size, size))
        work.finish("images", image_size=(size, size), channels=3)


def job_of(data: Path, size: int, config: object) -> EncodeJob:
    """Describe the job as the command does."""
    factor, channels = int(config.factor), int(config.latent_channels)  # type: ignore[attr-defined]
    entry = LatentsEntry(
        codec="0", source="0", form="moments", channels=channels, size=(size // factor, size // factor)
    )
    return EncodeJob(
        data=str(data),
        run="none",
        step=0,
        latents=entry,
        sizes=((size, size),),
        factor=factor,
        channels=3,
        batch=BATCH,
        piece_samples=4096,
        corrupt_budget=0,
    )


def alone(encode: Encode, samples: int, size: int) -> float:
    """Seconds of encoding batches that are in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
    started = time.perf_counter()
    for _ in range(samples // BATCH):
        encode(pixels)
    return time.perf_counter() - started


def whole(job: EncodeJob, out: Path, encode: Encode) -> float:
    """Seconds of the job, from shards to shards."""
    staging = open_job(job, out)
    started = time.perf_counter()
    encode_pieces(job, staging, encode, rank=0, ranks=1, progress=lambda samples: None)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
