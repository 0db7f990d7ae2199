"""Next-token prediction: summed cross-entropy over tokens, plus what keeps a mixture of experts balanced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.objectives.contract import Batch, LossTerms, Networks, Phase, Progress, Role, Sum
from sixfold.objectives.next_token.config import NextTokenConfig
from sixfold.objectives.next_token.cross_entropy import HeadLoss, chunked_cross_entropy


class BalancesExperts(Protocol):
    """A network that evens out its experts' loads by a bias instead of a loss."""

    def update_expert_bias(self, tokens_per_expert: Float[Tensor, "layers experts"]) -> None:
        """Move each expert's bias against its surplus of tokens."""
        ...


class NextToken:
    """Cross-entropy of every token given those before it in its own document.

    The network is called as ``network(tokens [n, s], documents [n, s] | None, readout=...)`` and applies the readout
    to its final activations and head weight, where sharding has gathered that weight; it returns the readout's result
    and its routing record.
    """

    def __init__(self, config: NextTokenConfig, networks_config: Mapping[str, object]) -> None:
        self.config = config
        self.roles: Mapping[str, Role] = {"lm": Role(kind="trainable", network=config.network)}

    def phases(self, progress: Progress) -> Sequence[Phase]:
        """One phase: the language model trains at every step."""
        return (Phase(name="main", trains=("lm",)),)

    def __call__(self, nets: Networks, batch: Batch, phase: Phase, random: PositionRandom) -> LossTerms:
        """Return the summed loss over predicted tokens; nothing in it is random."""
        head, routing, mask = self._forward(nets, batch)
        count = mask.sum()
        metrics = {
            "cross_entropy": Sum(head.cross_entropy, count),
            "accuracy": Sum(head.correct, count),
        }
        if not routing:
            return LossTerms(head.loss, count, metrics)
        balance, router_z = routing["balance_loss"].sum(), routing["z_loss"].sum()
        loss = head.loss + self.config.balance_weight * balance + self.config.router_z_weight * router_z
        tokens_per_expert = routing["tokens_per_expert"].detach()
        metrics |= {
            "balance_loss": Sum(balance.detach(), count),
            "router_z_loss": Sum(router_z.detach(), count),
            "expert_peak_load": _peak_load(tokens_per_expert),
        }
        return LossTerms(loss, count, metrics, statistics={"tokens_per_expert": tokens_per_expert})

    @torch.no_grad()
    def evaluate(self, nets: Networks, batch: Batch, random: PositionRandom) -> Mapping[str, Sum]:
        """Return cross-entropy (as ``loss``, in nats a token), accuracy and, where bytes are known, bits per byte."""
        head, _, mask = self._forward(nets, batch)
        count = mask.sum()
        measures = {"loss": Sum(head.cross_entropy, count), "accuracy": Sum(head.correct, count)}
        if "token_bytes" in batch.fields:
            predicted_bytes = (batch["token_bytes"][:, 1:] * mask).sum()
            measures["bits_per_byte"] = Sum(head.cross_entropy / math.log(2.0), predicted_bytes)
        return measures

    def after_step(self, nets: Networks, statistics: Mapping[str, Tensor], progress: Progress) -> None:
        """Move the expert bias towards even loads, once a step, from counts of the whole global batch."""
        if "tokens_per_expert" in statistics:
            network = cast(BalancesExperts, nets["lm"])
            network.update_expert_bias(statistics["tokens_per_expert"])

    def _forward(self, nets: Networks, batch: Batch) -> tuple[HeadLoss, Mapping[str, Tensor], Float[Tensor, "n s"]]:
        """Return the head's sums, the routing record, and which predictions count: those within one document."""
        tokens, documents = batch["tokens"], batch.fields.get("documents")
        targets = tokens[:, 1:]
        mask = torch.ones_like(targets, dtype=torch.float32)
        if documents is not None:
            mask = (documents[:, 1:] == documents[:, :-1]).float()

        def readout(hidden: Float[Tensor, "n s d"], weight: Float[Tensor, "v d"]) -> HeadLoss:
            return chunked_cross_entropy(
                hidden, weight, targets, mask, z_weight=self.config.z_weight, chunk_tokens=self.config.chunk_tokens
            )

        head, routing = nets["lm"](tokens[:, :-1], None if documents is None else documents[:, :-1], readout=readout)
        return HeadLoss(*head), routing, mask


def _peak_load(tokens_per_expert: Float[Tensor, "layers experts"]) -> Sum:
    """Return the busiest expert's load over the mean load, averaged over layers: 1 is perfect balance."""
    ratio = tokens_per_expert.amax(1) / tokens_per_expert.mean(1).clamp(min=1.0)
    return Sum(ratio.sum(), torch.tensor(float(len(ratio)), device=ratio.device))
