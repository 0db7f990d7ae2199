"""From conditions as the data hold them (labels, captions) to what a denoiser reads (labels, encoded text).

Captions go through text encoders, which are roles of the objective. With several, each reads the caption and may lose
it independently of the others; their features are joined as Stable Diffusion 3 does (arXiv 2403.03206, section 4.2):
side by side or one after the other, filled up with zeros to one width, pooled features side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import DataError, RecipeError
from sixfold.models.text_encoder.config import CAPTION, END_OF_TEXT, CachedTextConfig
from sixfold.models.trained.network import architecture_of
from sixfold.objectives.conditioning.config import EncoderConfig
from sixfold.objectives.contract import Networks, Role

Conditions = dict[str, Tensor]


class Conditioning:
    """The conditions of one denoiser.

    Args:
        encoders: text encoders by name in ``networks``.
        networks_config: settings of all networks.
        denoiser: settings of the network that reads the conditions.

    Raises:
        RecipeError: the denoiser reads text that no encoder makes, or text of another shape.
    """

    def __init__(
        self, encoders: Mapping[str, EncoderConfig], networks_config: Mapping[str, Any], denoiser: Any
    ) -> None:
        self._encoders = encoders
        self._own: Mapping[str, int] = denoiser.null_values
        self._text_width: int = getattr(denoiser, "text_width", 0)
        settings = {name: architecture_of(networks_config[name]) for name in encoders if name in networks_config}
        self._cached = {name: one.field for name, one in settings.items() if isinstance(one, CachedTextConfig)}
        self._caption_length = max((getattr(encoder, "length", 1) for encoder in settings.values()), default=1)
        _check_text(encoders, settings, denoiser)

    @property
    def null_values(self) -> dict[str, int]:
        """The null value of each field of a batch that is a condition."""
        return {**self._own, **({CAPTION: END_OF_TEXT} if self._encoders else {})}

    @property
    def readable(self) -> frozenset[str]:
        """The fields of a batch that are conditions, or that hold what a frozen encoder made of one beforehand."""
        return frozenset(self.null_values) | frozenset(self._cached.values())

    @property
    def roles(self) -> dict[str, Role]:
        """The encoders' roles."""
        return {
            name: Role(kind="frozen" if encoder.frozen else "trainable", network=name)
            for name, encoder in self._encoders.items()
        }

    def fields_of(self, fields: Mapping[str, Tensor]) -> Conditions:
        """Return the fields of a batch that are conditions.

        Raises:
            DataError: the data lack one.
        """
        wanted = self.null_values
        missing = [name for name in wanted if name not in fields]
        if missing:
            raise DataError.of(
                f"the denoiser is conditioned on {', '.join(missing)}, which the data lack",
                where="networks",
                allowed=f"the data have {', '.join(fields)}",
                fix="use data with these fields (captions: kind image-text), or make the network unconditional (for a "
                "DiT: classes=0)",
            )
        return {name: fields[name] for name in (*wanted, *self._cached.values()) if name in fields}

    def absent(self, numbers: Int64[Tensor, " n"]) -> Conditions:
        """Return null conditions, as fields, for as many samples."""
        null = {name: torch.full_like(numbers, value) for name, value in self._own.items()}
        if self._encoders:
            null[CAPTION] = numbers.new_full((len(numbers), self._caption_length), END_OF_TEXT)
        return null

    def dropped(self, fields: Mapping[str, Tensor], random: PositionRandom, probability: float) -> Conditions:
        """Return inputs with each replaced by its null value at random: fields, and captions by encoder."""
        inputs = self.inputs(fields)
        for name in (*self._own, *self._encoders):
            value = inputs[name]
            encoder = self._encoders.get(name)
            own = probability if encoder is None or encoder.drop is None else encoder.drop
            lost = random.uniform(f"denoising/drop/{name}") < own
            null = END_OF_TEXT if encoder is not None else self._own[name]
            inputs[name] = value.masked_fill(lost.reshape(-1, *[1] * (value.ndim - 1)), null)
        return inputs

    def inputs(self, fields: Mapping[str, Tensor]) -> Conditions:
        """Return the denoiser's own conditions, one caption for each encoder, and features that were made of it."""
        inputs = {name: fields[name] for name in (*self._own, *self._cached.values()) if name in fields}
        for name in self._encoders:
            inputs[name] = fields[CAPTION]
        return inputs

    def encode(self, nets: Networks, inputs: Mapping[str, Tensor]) -> Conditions:
        """Return what the denoiser reads: its own conditions, ``text`` and ``pooled``."""
        conditions = {name: inputs[name] for name in self._own}
        if not self._encoders:
            return conditions
        groups: list[list[Tensor]] = []
        pooled: list[Tensor] = []
        for name, encoder in self._encoders.items():
            made = inputs.get(self._cached.get(name, ""))
            text, summary = nets[name](inputs[name]) if made is None else nets[name](inputs[name], made)
            if encoder.beside:
                groups[-1].append(text)
            else:
                groups.append([text])
            if summary is not None:
                pooled.append(summary)
        conditions["text"] = self._joined(groups)
        if pooled:
            conditions["pooled"] = torch.cat(pooled, dim=-1)
        return conditions

    def _joined(self, groups: list[list[Float[Tensor, "n _ _"]]]) -> Float[Tensor, "n length width"]:
        beside = [torch.cat(group, dim=-1) for group in groups]
        return torch.cat([pad(text, (0, self._text_width - text.shape[-1])) for text in beside], dim=1)


def _check_text(encoders: Mapping[str, EncoderConfig], settings: Mapping[str, Any], denoiser: Any) -> None:
    """Raise RecipeError unless the encoders make the text that the denoiser reads."""
    reads = getattr(denoiser, "reads_text", False)
    if reads != bool(encoders):
        raise RecipeError.of(
            "the denoiser reads text, and objective.encoders names no text encoder"
            if reads
            else f"objective.encoders names {', '.join(encoders)}, and the denoiser reads no text",
            where="objective.encoders",
            fix="add networks.text_encoder: {type: byte_text, ...} and objective.encoders: {text_encoder: {}}"
            if reads
            else "take a network that reads text (mmdit), or remove objective.encoders",
        )
    if len(settings) < len(encoders):  # the recipe's own checks name the missing ones
        return
    made = {"text_tokens": 0, "text_width": 0, "pooled_width": 0}
    width = 0
    for name, encoder in encoders.items():
        width = settings[name].text_width + (width if encoder.beside else 0)
        made["text_width"] = max(made["text_width"], width)
        made["text_tokens"] += 0 if encoder.beside else settings[name].text_tokens
        made["pooled_width"] += settings[name].pooled_width
        if getattr(settings[name], "pretrained", False) and not encoder.frozen:
            raise RecipeError.of(
                f"{name} comes with its weights and can only be frozen",
                where=f"objective.encoders.{name}",
                fix=f"set objective.encoders.{name}.frozen=true",
            )
    wrong = [
        f"{key} is {getattr(denoiser, key)}, the encoders give {value}"
        for key, value in made.items()
        if reads and getattr(denoiser, key) != value and not (key == "text_width" and getattr(denoiser, key) > value)
    ]
    if wrong:
        raise RecipeError.of(
            f"the text does not fit the denoiser: {'; '.join(wrong)}",
            where="objective.encoders",
            fix="set the denoiser's " + ", ".join(f"{key}={value}" for key, value in made.items()),
        )
