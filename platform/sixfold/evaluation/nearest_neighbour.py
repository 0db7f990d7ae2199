"""Memorisation: how near samples lie to training images, compared with held-out images.

A generator that copies its training set has a perfect Frechet distance; its distance to the nearest training image
betrays it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def nearest_distances(
    queries: Float[Tensor, "n ..."], references: Float[Tensor, "m ..."], *, block: int = 1024
) -> Float[Tensor, " n"]:
    """Return each query's Euclidean distance to the nearest reference."""
    flat = references.flatten(1)
    return torch.cat([torch.cdist(rows, flat).amin(1) for rows in torch.split(queries.flatten(1), block)])


def nearest_neighbour_ratio(
    samples: Float[Tensor, "n ..."], held_out: Float[Tensor, "k ..."], training: Float[Tensor, "m ..."]
) -> float:
    """Return the mean distance of samples to the nearest training example over that of held-out examples.

    About 1 for a generator that generalises, 0 for one that copies; above 1 where samples stray from the data.
    """
    held_out_distance = nearest_distances(held_out, training).mean()
    return float(nearest_distances(samples, training).mean() / held_out_distance)
