"""Weights of networks that no recipe trains: read from files, or made once a run from its own training split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from sixfold.distributed.collectives import broadcast_object, is_distributed
from sixfold.errors import DataError, Fault, SixfoldError
from sixfold.evaluation.features import keep_tensors
from sixfold.models.settings import NetworkSettings
from sixfold_data.config import DataConfig
from sixfold_data.describe import describe
from sixfold_data.evaluation import read_split_arrays

MakeWeights = Callable[[NetworkSettings, Callable[[], tuple[Tensor, Tensor]]], dict[str, Tensor]]
"""What :attr:`NetworkSettings.weights_from` names."""


def make_weights(settings: NetworkSettings, data: DataConfig, *, cache: Path | None) -> dict[str, Tensor]:
    """Return a network's weights, made on rank 0 and sent to the others; a collective.

    They are kept in ``cache`` by a hash of settings and data: a resumed run goes on with the very same weights.

    Raises:
        UserError: what the weights are made from is missing or unfit.
    """
    made: dict[str, Tensor] | _Failure | None = None
    if not is_distributed() or dist.get_rank() == 0:
        try:
            made = _read_or_make(settings, data, cache)
        except SixfoldError as error:  # all ranks raise it, for none may wait for weights that never come
            made = _Failure(type(error), tuple(error.faults))
    result: dict[str, Tensor] | _Failure = broadcast_object(made)  # type: ignore[assignment]  # rank 0 made one of both
    if isinstance(result, _Failure):
        raise result.kind(*result.faults)
    return result


class _Failure(NamedTuple):
    kind: type[SixfoldError]
    faults: tuple[Fault, ...]


def _read_or_make(settings: NetworkSettings, data: DataConfig, cache: Path | None) -> dict[str, Tensor]:
    key = f"{settings.weights_from}/{settings.model_dump_json()}/{describe(data).fingerprint}/{data.splits.train}"
    key += "" if data.filter is None else f"/{data.filter.text}"
    name = f"{settings.model_dump()['type']}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    path = None if cache is None else cache / name
    if path is not None and path.exists():
        return load_file(path)
    made = _maker(settings)(settings, lambda: _training_split(data))
    if path is not None:
        keep_tensors(path, {parameter: value.contiguous() for parameter, value in made.items()})
    return made


def _maker(settings: NetworkSettings) -> MakeWeights:
    assert settings.weights_from is not None
    module, attribute = settings.weights_from.split(":")
    maker: MakeWeights = getattr(import_module(module), attribute)
    return maker


def _training_split(data: DataConfig) -> tuple[Tensor, Tensor]:
    arrays = read_split_arrays(data, data.splits.train)
    if "label" not in arrays:
        raise DataError.of(
            "a classifier is to learn from these data, which have no labels",
            where=", ".join(data.paths),
            allowed=f"the data have {', '.join(arrays)}",
            fix="use labelled data, or another network for the perceptual loss",
        )
    return torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["label"])
