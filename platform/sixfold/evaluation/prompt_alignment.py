"""How often a picture shows what its caption says, by a function that reads pictures exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.errors import DataError, RecipeError
from sixfold.evaluation.bootstrap import mean_margin
from sixfold.evaluation.config import PromptAlignmentConfig
from sixfold.evaluation.contract import Drawn, Estimate
from sixfold.evaluation.references import References

Reader = Callable[[np.ndarray, Sequence[str]], Mapping[str, Sequence[bool]]]
"""Images ``[n, c, h, w]`` in [-1, 1] and captions to what is right in each, by name; ``aligned`` is all of it."""

ALIGNED = "aligned"


class PromptAlignmentMetric:
    """``prompt_alignment``: the share of samples that show all that counts, and ``prompt_<attribute>`` of each part."""

    view = "prompt_alignment"

    def __init__(self, config: PromptAlignmentConfig, references: References) -> None:
        self._config = config
        self._read = _load(config.reader)
        self._resamples = references.resamples

    def rows(self, drawn: Drawn) -> Float[Tensor, "n attributes"]:
        """Return what is right in each sample, 1 or 0 an attribute.

        Raises:
            DataError: the data have no captions, or such as the reader does not understand.
        """
        if drawn.captions is None:
            raise DataError.of(
                "prompt_alignment needs captions, and the data have none",
                where="evaluation.metrics",
                fix="use data of kind image-text, or latents of them, or remove the metric",
            )
        try:
            right = self._read(drawn.images.float().cpu().numpy(), drawn.captions)
        except ValueError as error:
            raise DataError.of(
                f"{self._config.reader} cannot judge these samples: {error}",
                where="evaluation.metrics",
                fix="name another reader for this data set, or remove prompt_alignment",
            ) from error
        return torch.tensor([right[name] for name in right], dtype=torch.float32).T

    def estimates(self, rows: Float[Tensor, "n attributes"]) -> list[Estimate]:
        """Return the share of samples with each attribute right."""
        return [
            Estimate(
                name="prompt_alignment" if name == ALIGNED else f"prompt_{name}",
                value=float(rows[:, column].mean()),
                margin=mean_margin(rows[:, column], self._resamples),
                better="higher",
                samples=len(rows),
            )
            for column, name in enumerate(self._attributes())
        ]

    def _attributes(self) -> list[str]:
        """The names of the columns: the reader gives them in one order, for no samples, too."""
        nothing = np.zeros((0, 3, 1, 1), dtype=np.float32)
        return list(self._read(nothing, []))


def _load(reader: str) -> Reader:
    module, name = reader.split(":")
    try:
        found: Reader = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError.of(
            f"there is no function {reader}: {error}", where="evaluation.metrics", fix="name it as module:function"
        ) from error
    return found
