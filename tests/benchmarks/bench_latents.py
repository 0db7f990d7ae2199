"""What a training step costs on latents and on the pixels they stand for, by the same network.

    python tests/benchmarks/bench_latents.py [--steps 12]

DiT of `flow/latent-dit-smoke` on 8x8x4 latents, and on 32x32x3 pixels with the same patches. CPU seconds of one thread,
the best of the steps, so that other programs on the machine matter little; batches are random numbers.
"""

from __future__ import annotations

import argparse
import time

import torch

from sixfold.distributed.randomness import PositionRandom
from sixfold.models.dit.config import DiTConfig
from sixfold.models.network import initialize, parameter_tags
from sixfold.objectives.contract import Batch, Phase
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.denoising.objective import Denoising

BATCH = 32
NETWORK = {"patch_size": 2, "width": 128, "depth": 4, "heads": 4, "qk_norm": True}
SHAPES = {"latents 8x8x4": (4, 8), "pixels 32x32x3": (3, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    seconds = {name: seconds_per_image(*shape, steps) for name, shape in SHAPES.items()}
    for name, value in seconds.items():
        print(f"{name:<16}{1e3 * value:8.2f} ms CPU an image")
    latents, pixels = seconds.values()
    print(f"{'ratio':<16}{pixels / latents:8.1f}")


def seconds_per_image(channels: int, size: int, steps: int) -> float:
    """Forward, backward and update on random images."""
    config = DiTConfig(channels=channels, image_size=size, **NETWORK)
    network = config.load()(config)
    initialize(network, parameter_tags(network), seed=0, role="denoiser")
    objective = Denoising(DenoisingConfig(), {"denoiser": config})
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    batch = Batch({"image": torch.randn(BATCH, channels, size, size)}, torch.arange(BATCH))
    phase = Phase(name="main", trains=("denoiser",))
    best = float("inf")
    for _ in range(steps):
        started = time.process_time()
        objective({"denoiser": network}, batch, phase, PositionRandom(0, batch.positions)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        best = min(best, time.process_time() - started)
    return best / BATCH


if __name__ == "__main__":
    main()
