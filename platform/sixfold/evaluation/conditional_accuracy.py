"""How often a classifier of the training split finds the class that a sample was drawn for."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sixfold.evaluation.bootstrap import mean_margin
from sixfold.evaluation.config import ConditionalAccuracyConfig
from sixfold.evaluation.contract import Drawn, Estimate
from sixfold.evaluation.references import References


class ConditionalAccuracyMetric:
    """``conditional_accuracy``."""

    view = "conditional_accuracy"

    def __init__(self, config: ConditionalAccuracyConfig, references: References) -> None:
        self._classifier = references.classifier()
        self._resamples = references.resamples

    def rows(self, drawn: Drawn) -> Float[Tensor, " n"]:
        """1 where the classifier agrees with the label, else 0."""
        predicted = self._classifier.predict(drawn.images)
        return (predicted == drawn.conditions["label"].to(predicted.device)).float()

    def estimates(self, rows: Float[Tensor, " n"]) -> list[Estimate]:
        """Return the share of samples in their class."""
        return [
            Estimate(
                name="conditional_accuracy",
                value=float(rows.mean()),
                margin=mean_margin(rows, self._resamples),
                better="higher",
                samples=len(rows),
            )
        ]
