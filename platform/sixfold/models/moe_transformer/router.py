"""Which experts a token goes to, and the terms that keep experts evenly used."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sixfold.models.moe_transformer.config import ExpertsConfig
from sixfold.models.network import OwnsBuffers, ParameterTag, parameter


class Routing(NamedTuple):
    """The router's decisions.

    Attributes:
        experts: the chosen experts of each token, ``[tokens, k]``.
        weights: their weights in the mixture, ``[tokens, k]`` fp32.
        logits: ``[tokens, experts]`` fp32.
        shares: the scores of all experts, each token's scaled to sum to one, ``[tokens, experts]`` fp32.
    """

    experts: Int64[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]
    logits: Float[Tensor, "tokens experts"]
    shares: Float[Tensor, "tokens experts"]


class Router(OwnsBuffers):
    """Linear router in fp32: softmax (Mixtral, arXiv 2401.04088) or sigmoid scores (DeepSeek-V3, arXiv 2412.19437).

    With ``bias_update_rate`` an expert bias takes part in the choice, never in the weights. It is moved between steps,
    from counts over the global batch, and by no forward pass: recomputation therefore cannot count a token twice.
    """

    def __init__(self, width: int, config: ExpertsConfig, *, scale: float) -> None:
        super().__init__()
        self.config = config
        self.weight = parameter(config.count, width, tag=ParameterTag(init="normal", scale=scale, weight_decay=True))
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.empty(config.count) if config.bias_update_rate else None)

    def reset_buffers(self) -> None:
        """Start without preference."""
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(self, tokens: Float[Tensor, "tokens width"]) -> Routing:
        """Choose the top-k experts of each token."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = nn.functional.linear(tokens.float(), self.weight.float())
        softmax = self.config.router == "softmax"
        scores = logits.softmax(-1) if softmax else logits.sigmoid()
        preference = scores.detach() if self.expert_bias is None else scores.detach() + self.expert_bias
        experts = preference.topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.config.normalize_top_k:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all underflow
        shares = scores if softmax else scores / scores.sum(-1, keepdim=True)
        return Routing(experts, weights * self.config.routed_scale, logits, shares)

    def update_bias(self, tokens_per_expert: Float[Tensor, "experts"]) -> None:
        """b += rate * sign(mean - count), centred on zero (loss-free balancing, arXiv 2408.15664)."""
        if self.expert_bias is None:
            return
        assert self.expert_bias.dtype == torch.float32, "the expert bias is too fine for less than fp32"
        counts = tokens_per_expert.to(self.expert_bias)
        self.expert_bias += self.config.bias_update_rate * torch.sign(counts.mean() - counts)
        self.expert_bias -= self.expert_bias.mean()


def routing_losses(routing: Routing, *, sequences: int) -> dict[str, Float[Tensor, "..."]]:
    """Return one layer's ``tokens_per_expert`` ``[experts]``, ``balance_loss`` and ``z_loss`` ``[sequences]``.

    Balance, of each sequence by itself: length * experts / k * sum_e f_e P_e, with f_e the fraction of its tokens that
    expert e takes and P_e the mean share it was given; ``length`` when all are used alike (DeepSeek-V3, eq. 17 to 20).
    Router z-loss: the sum over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).
    """
    experts, k = routing.shares.shape[-1], routing.experts.shape[-1]
    choices = routing.experts.view(sequences, -1)
    ones = torch.ones(choices.shape, device=choices.device, dtype=torch.float32)
    counts = torch.zeros(sequences, experts, device=choices.device).scatter_add_(1, choices, ones)
    shares = routing.shares.view(sequences, -1, experts)
    length = shares.shape[1]
    balance = (counts * shares.sum(1)).sum(-1) * (experts / (k * length))
    z = routing.logits.logsumexp(-1).square().view(sequences, -1).sum(-1)
    return {"tokens_per_expert": counts.sum(0), "balance_loss": balance, "z_loss": z}
