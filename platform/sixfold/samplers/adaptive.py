"""The probability-flow ODE by an adaptive Runge-Kutta method, each sample with steps of its own.

Divided by sqrt(alpha^2 + sigma^2), every affine path becomes the same one: y = cos(u) x0 + sin(u) e, where tan(u) is
the noise-to-signal ratio. Its ODE, dy/du = cos(u) ehat - sin(u) x0hat, has no infinite rates and needs none of the
path's derivatives, so that one solver with one notion of error serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sixfold.distributed.collectives import any_rank
from sixfold.errors import TrainingError, UserError
from sixfold.paths.affine import AffinePath
from sixfold.samplers.config import RK45Config
from sixfold.samplers.denoising import DenoisingSampler, NoiseSource, PredictEndpoints, everywhere
from sixfold.samplers.grids import first_time

State = tuple[Tensor, ...]
"""Tensors with the sample as first dimension; the error of each is judged by its own root mean square."""

Field = Callable[[State, Tensor], State]
"""``(state, u [n] fp64) -> d state / du``."""

_STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
"""Dormand and Prince, J. Comp. Appl. Math. 6 (1980), RK5(4)7M; the last stage is the next step's first."""
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Fifth order minus fourth."""
_SAFETY, _LEAST_CHANGE, _LARGEST_CHANGE, _FIRST_STEP = 0.9, 0.2, 5.0, 0.01


def integrate(
    field: Field,
    state: State,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
) -> State:
    """Carry every sample from ``start`` to ``end`` by steps whose estimated error is below atol + rtol |state|.

    A sample's steps depend on it alone, not on its batch. Ranks go on together until the last sample has arrived, since
    sharded networks need all of them.

    Raises:
        TrainingError: some sample has not arrived after ``max_steps``.
    """
    place = torch.full((len(state[0]),), start, dtype=torch.float64, device=state[0].device)
    step = torch.full_like(place, _FIRST_STEP * (end - start))
    slope = field(state, place)
    for _ in range(max_steps):
        remaining = end - place
        if not any_rank(bool((remaining != 0).any())):
            return state
        step = torch.where(step.abs() < remaining.abs(), step, remaining)
        slopes = [slope]
        for fraction, weights in _STAGES:
            reached = _advanced(state, step, slopes, weights)
            slopes.append(field(reached, place + fraction * step))
        error = _error_norm(state, reached, _combined(slopes, _ERROR), step, rtol, atol)
        accepted = (error <= 1.0) & (remaining != 0)
        state = _chosen(accepted, reached, state)
        slope = _chosen(accepted, slopes[-1], slope)
        place = torch.where(accepted, torch.where(step == remaining, end, place + step), place)
        step = step * (_SAFETY * error.clamp(min=1e-10) ** -0.2).clamp(_LEAST_CHANGE, _LARGEST_CHANGE)
    raise TrainingError.of(
        f"the adaptive solver took {max_steps} steps without arriving",
        where="sampling.max_steps",
        fix="raise rtol and atol, or max_steps; a network that is not smooth at this tolerance needs the former",
    )


def _combined(slopes: Sequence[State], weights: Sequence[float]) -> State:
    return tuple(
        sum(weight * part for weight, part in zip(weights, parts, strict=True) if weight != 0.0)
        for parts in zip(*slopes, strict=True)
    )


def _advanced(state: State, step: Tensor, slopes: Sequence[State], weights: Sequence[float]) -> State:
    change = _combined(slopes, weights)
    return tuple(value + _wide(step, value) * part for value, part in zip(state, change, strict=True))


def _error_norm(before: State, after: State, slope: State, step: Tensor, rtol: float, atol: float) -> Tensor:
    """Return the largest, over the state's tensors, root mean square of the error over what is tolerated."""
    norms = []
    for old, new, part in zip(before, after, slope, strict=True):
        tolerated = atol + rtol * torch.maximum(old.abs(), new.abs())
        norms.append((_wide(step, part) * part / tolerated).double().square().reshape(len(part), -1).mean(1).sqrt())
    return torch.stack(norms).amax(0)


def _chosen(condition: Tensor, yes: State, no: State) -> State:
    return tuple(
        torch.where(condition.reshape(-1, *[1] * (new.ndim - 1)), new, old) for new, old in zip(yes, no, strict=True)
    )


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def angle_at(path: AffinePath, time: Float64[Tensor, ""]) -> float:
    """Return u, with tan(u) = sigma / alpha."""
    at = path.coefficients(time)
    return math.atan2(at.sigma.item(), at.alpha.item())


def flow_field(
    predict: PredictEndpoints, path: AffinePath
) -> Callable[[Float[Tensor, "n ..."], Float64[Tensor, " n"]], Float[Tensor, "n ..."]]:
    """Return dy/du as a function of y and u."""

    def field(y: Tensor, u: Tensor) -> Tensor:
        time = path.time_at(torch.cos(u), torch.sin(u))
        at = path.coefficients(time)
        believed = predict(_wide(torch.hypot(at.alpha, at.sigma), y) * y, time.to(y.dtype))
        return _wide(torch.cos(u), y) * believed.noise - _wide(torch.sin(u), y) * believed.data

    return field


class RK45Sampler(DenoisingSampler):
    """Adaptive steps down to ``end_ratio``, then the data that are believed in."""

    config: RK45Config

    def interval(self) -> tuple[float, float]:
        """Return the angles between which the ODE is solved: near data, near noise."""
        needs_signal = self.objective.prediction == "noise"
        first = angle_at(self.path, torch.tensor(self.path.time_data, dtype=torch.float64))
        return (
            max(first, math.atan(self.config.end_ratio)),
            angle_at(self.path, first_time(self.path, needs_signal=needs_signal)),
        )

    def scale(self, angle: float) -> tuple[float, float]:
        """Return (time, sqrt(alpha^2 + sigma^2)) at an angle."""
        time = self.path.time_at(*torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64))
        at = self.path.coefficients(time)
        return time.item(), math.hypot(at.alpha.item(), at.sigma.item())

    def integrate(self, predict: PredictEndpoints, noise: NoiseSource, steps: int | None) -> Float[Tensor, "n ..."]:
        """Return clean samples.

        Raises:
            UserError: a number of steps was asked for.
        """
        if steps is not None:
            raise UserError.of(
                "rk45 chooses its own steps", where="--steps", fix="set sampling.rtol, or take another sampler"
            )
        near_data, near_noise = self.interval()
        field = flow_field(predict, self.path)
        (y,) = integrate(
            lambda state, u: (field(state[0], u),),
            (math.sin(near_noise) * noise("noise"),),
            near_noise,
            near_data,
            rtol=self.config.rtol,
            atol=self.config.atol,
            max_steps=self.config.max_steps,
        )
        time, scale = self.scale(near_data)
        return predict(scale * y, everywhere(time, y)).data
