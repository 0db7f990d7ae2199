"""Reconstructions: what a codec makes of images that it is given."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sixfold.errors import RecipeError
from sixfold.models.trained.network import NetworksConfig
from sixfold.objectives.contract import Networks
from sixfold.samplers.config import ReconstructionConfig
from sixfold.samplers.contract import SampleRequest


class Reconstruction:
    """Encodes the images of the condition ``original`` and decodes them, from posterior means."""

    def __init__(self, config: ReconstructionConfig, objective: object, networks_config: NetworksConfig) -> None:
        self.config = config

    def __call__(self, nets: Networks, request: SampleRequest) -> Mapping[str, Tensor]:
        """Return ``image``, the reconstructions.

        Raises:
            RecipeError: no images are given to reconstruct.
        """
        if "original" not in request.conditions:
            raise RecipeError.of(
                "a codec draws nothing of its own: metrics of drawn samples do not apply to it",
                where="evaluation.metrics",
                allowed="loss, with which a codec's own measures of held-out images come",
                fix="set evaluation.metrics=[loss]",
            )
        return {"image": nets["codec"](request.conditions["original"])["image"].clamp(-1.0, 1.0)}
