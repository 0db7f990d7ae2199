"""Model FLOPs utilisation: the arithmetic a recipe needs over what the device can do."""

from __future__ import annotations

import torch

from sixfold.distributed.process_group import World
from sixfold.engine.precision import compute_dtype
from sixfold.models.network import Network
from sixfold.recipe.recipe import Recipe
from sixfold.train.loop import Training
from sixfold_data.describe import describe

BF16_PEAK_FLOPS_PER_SECOND = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
}
"""Dense bf16 peaks from the makers' data sheets, by the beginning of the device's name; the longest match counts."""


def peak_flops_per_second(world: World, recipe: Recipe) -> float:
    """The device's peak in the recipe's precision; 0 where it is unknown, for a guess would be a lie."""
    if world.device.type != "cuda":
        return 0.0
    precisions = {compute_dtype(recipe.engine_of(role).precision, world.device) for role in recipe.objective.role_names}
    if precisions != {torch.bfloat16}:
        return 0.0
    name = torch.cuda.get_device_name(world.device)
    matches = [known for known in BF16_PEAK_FLOPS_PER_SECOND if name.startswith(known)]
    return BF16_PEAK_FLOPS_PER_SECOND[max(matches, key=len)] if matches else 0.0


def training_flops_per_sample(recipe: Recipe, training: Training) -> float:
    """Model FLOPs of forward and backward (three forwards) of all trained networks on one sample.

    Buckets are of about one area: their plain mean is taken.
    """
    buckets = sample_shapes(recipe)
    forward = 0.0
    for engine in training.engines.values():
        assert isinstance(engine.network, Network)
        forward += sum(engine.network.forward_flops(shapes) for shapes in buckets) / len(buckets)
    return 3.0 * forward


def sample_shapes(recipe: Recipe) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of a batch of one sample, by field; of each bucket where there are some."""
    info = describe(recipe.data)
    shapes: dict[str, tuple[int, ...]] = {}
    if info.classes:
        shapes["label"] = (1,)
    if recipe.data.sequence_length is not None:
        shapes["tokens"] = (1, recipe.data.sequence_length + 1)
    sizes = info.buckets or ((info.image_size,) if info.image_size is not None else ())
    if info.channels is None or not sizes:
        return [shapes]
    return [{"image": (1, info.channels, *size), **shapes} for size in sizes]
