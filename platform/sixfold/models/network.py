"""What a network owes the platform: tagged parameters, named blocks, and its arithmetic cost.

A network is built on the meta device, sharded, and only then initialised. Each parameter therefore carries, from the
line that makes it, how it is initialised and how the optimizer treats it. Its initial value is a pure function of
(seed, role, fully qualified name), the same on every engine and world size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ParameterTag:
    """How one parameter starts and is trained.

    Attributes:
        init: ``normal`` with standard deviation ``scale``, ``uniform`` in [-scale, scale], or the constant ``scale``.
        matrix: a genuine 2-D weight of a hidden layer (or a 3-D stack, one matrix an expert): Muon may orthogonalise
            its update.
        weight_decay: whether decay applies (not to norms, biases, embeddings).
        lr_scale: factor on the role's learning rate.
    """

    init: Literal["normal", "uniform", "constant"]
    scale: float
    matrix: bool = False
    weight_decay: bool = False
    lr_scale: float = 1.0


def normal(scale: float) -> ParameterTag:
    """A hidden matrix drawn from N(0, scale^2), decayed."""
    return ParameterTag(init="normal", scale=scale, matrix=True, weight_decay=True)


def xavier_uniform(fan_in: int, fan_out: int) -> ParameterTag:
    """A hidden matrix drawn uniformly with variance 2 / (fan_in + fan_out), decayed (Glorot and Bengio, 2010)."""
    return ParameterTag(init="uniform", scale=math.sqrt(6.0 / (fan_in + fan_out)), matrix=True, weight_decay=True)


def constant(value: float) -> ParameterTag:
    """A vector (bias, norm weight) that starts at ``value`` and is not decayed."""
    return ParameterTag(init="constant", scale=value)


ZERO_MATRIX = ParameterTag(init="constant", scale=0.0, matrix=True, weight_decay=True)
"""A hidden matrix that starts at zero, so that its branch starts as the identity."""


def parameter(*shape: int, tag: ParameterTag) -> nn.Parameter:
    """Make an uninitialised, tagged fp32 parameter."""
    made = nn.Parameter(torch.empty(*shape))
    made.sixfold_tag = tag  # type: ignore[attr-defined]  # read back by parameter_tags before anything wraps the module
    return made


def parameter_tags(module: nn.Module) -> dict[str, ParameterTag]:
    """Return the tag of every parameter by fully qualified name; an untagged parameter is a programming error."""
    tags: dict[str, ParameterTag] = {}
    for name, value in module.named_parameters():
        tag = getattr(value, "sixfold_tag", None)
        assert isinstance(tag, ParameterTag), f"parameter {name} was not made by models.network.parameter"
        tags[name] = tag
    return tags


def initial_value(tag: ParameterTag, shape: Sequence[int], *, seed: int, role: str, name: str) -> Float[Tensor, "..."]:
    """Return a parameter's full initial value, fp32 on the CPU, as a function of (seed, role, name) alone."""
    if tag.init == "constant":
        return torch.full(tuple(shape), tag.scale)
    digest = hashlib.blake2b(f"{seed}/initial/{role}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if tag.init == "normal":
        return torch.randn(tuple(shape), generator=generator) * tag.scale
    return (torch.rand(tuple(shape), generator=generator) * 2.0 - 1.0) * tag.scale


def initialize(module: nn.Module, tags: dict[str, ParameterTag], *, seed: int, role: str) -> None:
    """Initialise an unsharded, materialised module in place, buffers too (sharded engines place the same values)."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(initial_value(tags[name], value.shape, seed=seed, role=role, name=name))
    reset_buffers(module)


def reset_buffers(module: nn.Module) -> None:
    """Recompute every buffer, since ``to_empty`` loses their values."""
    for part in module.modules():
        if isinstance(part, OwnsBuffers):
            part.reset_buffers()


class OwnsBuffers(nn.Module):
    """A module with buffers; ``reset_buffers`` writes their initial values in place on whatever device they are."""

    def reset_buffers(self) -> None:
        """Write the buffers' initial values in place."""
        raise NotImplementedError


class Linear(nn.Module):
    """y = x W^T + b with tagged parameters, weight ``[out, in]``."""

    def __init__(self, in_features: int, out_features: int, *, tag: ParameterTag, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, tag=tag)
        self.bias = parameter(out_features, tag=constant(0.0)) if bias else None

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Apply the affine map to the last dimension."""
        return nn.functional.linear(x, self.weight, self.bias)


class Network(nn.Module):
    """Base of all networks. Constructed as ``Network(config)``, on the meta device or not; nothing is drawn there."""

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated blocks in order: the units of sharding, activation checkpointing and per-block compilation.

        A block is always called as a module, and its outputs are tensors or plain tuples and dicts of tensors, so that
        hooks see them.
        """
        raise NotImplementedError

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """Model FLOPs of one forward pass over fields of these shapes, 2 a multiply-add; training costs thrice that."""
        raise NotImplementedError
