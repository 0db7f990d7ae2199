"""Gradients seen two independent ways: by autograd on the bare network, and through an engine's canonical state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine_cases import GLOBAL_BATCH, toy_engine, toy_step, whole_state
from sixfold.engine.config import AdamWConfig, ConstantScheduleConfig, EngineConfig
from sixfold.models.network import initialize, parameter_tags
from toy_network import Toy, ToyConfig, toy_batch


def gradient_by_name() -> dict[str, Tensor]:
    """Gradient of the mean loss of the first global batch at the initial values, by plain autograd."""
    network = Toy(ToyConfig())
    initialize(network, parameter_tags(network), seed=5, role="toy")
    tokens, targets, weights = toy_batch(0, GLOBAL_BATCH, 7)
    losses = nn.functional.cross_entropy(network(tokens), targets, reduction="none")
    mean = (losses * weights).sum() / weights.sum()
    names, values = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(mean, values), strict=True))


def gradients_through_adam(config: EngineConfig, optimizer: AdamWConfig) -> dict[str, Tensor]:
    """First moments after one step with betas 0."""
    engine = toy_engine(config, optimizer, ConstantScheduleConfig())
    toy_step(engine, 0, 2)
    state = whole_state(engine)
    engine.close()
    prefix, suffix = "optimizer/", "/exp_avg"
    return {name[len(prefix) : -len(suffix)]: value for name, value in state.items() if name.endswith(suffix)}
