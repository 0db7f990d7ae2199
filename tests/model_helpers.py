"""Small networks whose every weight is random, zero-initialised ones included."""

import torch

from sixfold.models.moe_transformer.config import MoETransformerConfig
from sixfold.models.network import Network, reset_buffers


def randomized(config, *, seed=0, scale=0.2) -> Network:
    """Build a network with weights from N(0, scale^2); vectors that start at one stay near one.

    It seeds torch, so that whatever a test draws next is the same every time, too.
    """
    torch.manual_seed(seed)
    network = config.load()(config)
    with torch.no_grad():
        for value in network.parameters():
            noise = scale * torch.randn(value.shape)
            value.copy_(noise + value.sixfold_tag.scale if value.sixfold_tag.init == "constant" else noise)
    reset_buffers(network)
    return network


def mixture(**changes) -> MoETransformerConfig:
    """Return a small mixture-of-experts configuration."""
    experts = {"count": 4, "top_k": 2, "hidden_width": 24} | changes.pop("experts", {})
    return MoETransformerConfig(
        **({"vocab_size": 31, "width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "experts": experts} | changes)
    )


def dense(**changes) -> MoETransformerConfig:
    """Return a small dense configuration."""
    return MoETransformerConfig(**({"vocab_size": 31, "width": 32, "depth": 2, "heads": 4, "kv_heads": 2} | changes))
