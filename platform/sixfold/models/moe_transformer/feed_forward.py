"""Feed-forward layers: SwiGLU, and a dropless mixture of SwiGLU experts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn

from sixfold.models.moe_transformer.config import ExpertsConfig, MoETransformerConfig
from sixfold.models.moe_transformer.dispatch import gather_rows, sum_rows
from sixfold.models.moe_transformer.router import Router, Routing, routing_losses
from sixfold.models.network import Linear, ParameterTag, normal, parameter


def swiglu(gate_and_up: Float[Tensor, "*batch two_hidden"]) -> Float[Tensor, "*batch hidden"]:
    """silu(gate) * up, the halves of the last dimension (Shazeer, arXiv 2002.05202)."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases."""

    def __init__(self, width: int, hidden: int, *, tag: ParameterTag, output_tag: ParameterTag) -> None:
        super().__init__()
        self.gate_and_up = Linear(width, 2 * hidden, tag=tag)
        self.down = Linear(hidden, width, tag=output_tag)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply the layer to each token."""
        mapped: Tensor = self.down(swiglu(self.gate_and_up(x)))
        return mapped


class Experts(nn.Module):
    """SwiGLU experts over rows sorted by expert, with stacked weights ``[experts, out, in]``."""

    def __init__(self, count: int, width: int, hidden: int, *, tag: ParameterTag, output_tag: ParameterTag) -> None:
        super().__init__()
        self.gate_and_up = parameter(count, 2 * hidden, width, tag=tag)
        self.down = parameter(count, width, hidden, tag=output_tag)

    def forward(
        self, rows: Float[Tensor, "rows width"], row_weights: Float[Tensor, "rows"], ends: Int32[Tensor, "experts"]
    ) -> Float[Tensor, "rows width"]:
        """Expert e maps rows ``ends[e-1]:ends[e]``, each result times its row's weight; an expert may have no rows."""
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down.dtype
        gate_and_up, down = self.gate_and_up.to(dtype), self.down.to(dtype)  # autocast does not know grouped products
        hidden = swiglu(nn.functional.grouped_mm(rows.to(dtype), gate_and_up.transpose(-2, -1), offs=ends))
        weighted = hidden * row_weights[:, None].to(dtype)
        return nn.functional.grouped_mm(weighted, down.transpose(-2, -1), offs=ends)


class MixtureOfExperts(nn.Module):
    """Each token passes its top-k routed experts, and all shared ones; no token is dropped."""

    def __init__(self, config: MoETransformerConfig, experts: ExpertsConfig, *, output_tag: ParameterTag) -> None:
        super().__init__()
        tag, hidden = normal(config.init_scale), config.expert_hidden_width
        self.router = Router(config.width, experts, scale=config.init_scale)
        self.experts = Experts(experts.count, config.width, hidden, tag=tag, output_tag=output_tag)
        self.shared = (
            SwiGLU(config.width, experts.shared * hidden, tag=tag, output_tag=output_tag) if experts.shared else None
        )

    def forward(
        self, x: Float[Tensor, "n length width"]
    ) -> tuple[Float[Tensor, "n length width"], dict[str, Float[Tensor, "..."]]]:
        """Return the mixture, and the terms of :func:`~sixfold.models.moe_transformer.router.routing_losses`."""
        tokens = x.flatten(0, 1)
        routing: Routing = self.router(tokens)
        losses = routing_losses(routing, sequences=len(x))
        ends = losses["tokens_per_expert"].cumsum(0).to(torch.int32)
        mixed = self._routed(tokens, routing, ends).view_as(x)
        if self.shared is not None:
            mixed = mixed + self.shared(x)
        return mixed, losses

    def _routed(
        self, tokens: Float[Tensor, "tokens width"], routing: Routing, ends: Int32[Tensor, "experts"]
    ) -> Float[Tensor, "tokens width"]:
        """Sort the (token, choice) pairs by expert, apply the experts, and add each token's results."""
        order: Int64[Tensor, "rows"] = routing.experts.flatten().argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        places = places.view_as(routing.experts)
        rows = gather_rows(tokens, order // routing.experts.shape[1], places)
        row_weights = routing.weights.flatten()[order]
        return sum_rows(self.experts(rows, row_weights, ends), order // routing.experts.shape[1], places)
