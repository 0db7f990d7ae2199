"""Which noise goes with which data: as drawn, or by optimal transport within fixed groups of positions."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.errors import RecipeError
from sixfold.paths.config import CouplingConfig, OptimalTransportCouplingConfig


def coupled(
    config: CouplingConfig,
    data: Float[Tensor, "n ..."],
    noise: Float[Tensor, "n ..."],
    positions: Int64[Tensor, " n"],
    *,
    whole_groups: bool = True,
) -> Float[Tensor, "n ..."]:
    """Return the noise in the order in which it belongs to the data.

    A group is ``group`` consecutive global positions from a multiple of ``group`` on, whatever rank or micro-batch
    they land on, so that pairs do not depend on how a step is cut up. Minibatch optimal transport is due to
    2302.00482 and 2304.14772. Within a group labels are not looked at.

    Raises:
        RecipeError: with ``whole_groups``, a group is not wholly among ``positions``.
    """
    if not isinstance(config, OptimalTransportCouplingConfig):
        return noise
    group = positions // config.group
    partner = torch.empty_like(positions)
    for number in torch.unique_consecutive(group).tolist():
        rows = (group == number).nonzero()[:, 0]
        if whole_groups and len(rows) != config.group:
            raise RecipeError.of(
                f"a micro-batch holds {len(rows)} of the {config.group} samples of a coupling group",
                where="objective.coupling.group",
                allowed="a divisor of the micro-batch, and of the global batch over the ranks",
                fix="lower objective.coupling.group, or raise engine.micro_batch to a multiple of it",
            )
        partner[rows] = rows[optimal_assignment(_squared_distances(data[rows], noise[rows]))]
    return noise[partner]


def _squared_distances(data: Float[Tensor, "k ..."], noise: Float[Tensor, "k ..."]) -> Float[Tensor, "k k"]:
    """Return |x0 - e|^2 up to terms that no assignment changes, in fp64, so that near ties fall alike everywhere."""
    return -(data.flatten(1).double() @ noise.flatten(1).double().T)


def optimal_assignment(cost: Float[Tensor, "k k"]) -> Int64[Tensor, " k"]:
    """Return the column of each row in the assignment of least total cost, exactly.

    Shortest augmenting paths on reduced costs, O(k^3) with vectorised inner loops (Jonker and Volgenant, Computing 38,
    1987): rows enter one by one, each by a Dijkstra search from it to the nearest free column.
    """
    matrix = cost.detach().cpu().double().numpy()
    size = len(matrix)
    row_potential, column_potential = np.zeros(size), np.zeros(size)
    row_of = np.full(size, -1)
    for entering in range(size):
        distance, previous = np.full(size, np.inf), np.full(size, -1)
        settled = np.zeros(size, dtype=bool)
        row, column, length = entering, -1, 0.0
        while True:
            reach = length + matrix[row] - row_potential[row] - column_potential
            nearer = ~settled & (reach < distance)
            distance[nearer], previous[nearer] = reach[nearer], column
            column = int(np.where(settled, np.inf, distance).argmin())
            settled[column], length = True, float(distance[column])
            if row_of[column] < 0:
                break
            row = row_of[column]
        inner = settled.copy()
        inner[column] = False
        row_potential[row_of[inner]] += length - distance[inner]
        row_potential[entering] += length
        column_potential[inner] -= length - distance[inner]
        while column >= 0:
            before = previous[column]
            row_of[column] = entering if before < 0 else row_of[before]
            column = before
    column_of = np.empty(size, dtype=np.int64)
    column_of[row_of] = np.arange(size)
    return torch.from_numpy(column_of).to(cost.device)
