"""Samples as people look at them: a labelled grid of pictures, or texts; and as arrays for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sixfold.errors import SixfoldError, UserError
from sixfold.evaluation.grid import to_picture, write_sample_grid
from sixfold.models.text_encoder.config import CAPTION
from sixfold.models.trained.network import architecture_of
from sixfold.objectives.contract import Networks
from sixfold.recipe.recipe import Recipe
from sixfold.recipe.trained import resolve_networks
from sixfold.samplers.config import AutoregressiveConfig, ReconstructionConfig
from sixfold.samplers.contract import Sampler, SampleRequest
from sixfold_data.describe import DataInfo
from sixfold_data.evaluation import EvaluationReader
from sixfold_data.images import encode_caption
from sixfold_data.index import LatentsEntry
from sixfold_data.latents import denormalized


def conditions_of(
    recipe: Recipe, info: DataInfo, count: int, *, label: int | None = None, prompt: str | None = None
) -> dict[str, Tensor]:
    """One condition a sample: the label or prompt asked for, else all classes, or held-out captions, in turn.

    A language model gets the recipe's own prompt unless another is asked for.

    Raises:
        UserError: the label or prompt does not fit what the recipe generates.
    """
    if isinstance(recipe.sampling, ReconstructionConfig):
        if label is not None or prompt is not None:
            raise UserError.of(
                "a codec reconstructs held-out images, for no label or prompt", where=recipe.name, fix="leave it out"
            )
        return {"original": _held_out_images(recipe, count)}
    if isinstance(recipe.sampling, AutoregressiveConfig):
        if label is not None:
            raise UserError.of("--class is for images, this run generates text", where=recipe.name, fix="use --prompt")
        return _prompt(info, recipe.sampling.prompt if prompt is None else prompt, count)
    if "text_encoder" in recipe.objective.needs.values():
        if label is not None:
            raise UserError.of("--class names a class, this run reads captions", where=recipe.name, fix="use --prompt")
        return {CAPTION: _captions(recipe, info, count, prompt)}
    if prompt is not None:
        raise UserError.of("--prompt is for text, this run generates images", where=recipe.name, fix="use --class")
    if label is not None and label >= len(info.classes):
        raise no_such_class(str(label), info)
    if "label" not in conditions_read(recipe):
        if label is not None:
            raise UserError.of(
                "--class names a class, and this run's network is told none", where=recipe.name, fix="leave it out"
            )
        return {}
    if not info.classes:
        return {}
    return {"label": torch.arange(count) % len(info.classes) if label is None else torch.full((count,), label)}


def no_such_class(label: str, info: DataInfo) -> SixfoldError:
    """What is said of a class that the data have not."""
    names = ", ".join(f"{number} {name}" for number, name in enumerate(info.classes)) or "none: there are no classes"
    return UserError.of(f"there is no class {label}", where="--class", allowed=names, fix="choose one of these")


def conditions_read(recipe: Recipe) -> frozenset[str]:
    """The fields of a batch that the sampled network is told: labels, captions or none, whatever else the data have."""
    network = architecture_of(resolve_networks(recipe)[next(iter(recipe.objective.trains.values()))])
    captions = {CAPTION} if "text_encoder" in recipe.objective.needs.values() else set()
    return frozenset({*getattr(network, "null_values", ()), *captions})


def _captions(recipe: Recipe, info: DataInfo, count: int, prompt: str | None) -> Tensor:
    """The prompt's tokens for every sample, or those of the first held-out captions, round and round."""
    length = recipe.data.caption_length
    if prompt is None:
        held_out = EvaluationReader(recipe.data, batch=count, limit=count)
        captions = torch.cat([batch[CAPTION] for batch in held_out])
        return captions[torch.arange(count) % len(captions)]
    assert info.tokenizer is not None, "captions come with their tokenizer"
    return torch.from_numpy(encode_caption(info.tokenizer, prompt.encode(), length)).expand(count, -1)


def _held_out_images(recipe: Recipe, count: int) -> Tensor:
    """The first images of the held-out split, round and round."""
    images = torch.cat([batch["image"] for batch in EvaluationReader(recipe.data, batch=count, limit=count)])
    return images[torch.arange(count) % len(images)]


def _prompt(info: DataInfo, prompt: str, count: int) -> dict[str, Tensor]:
    """The prompt of every sample, after the token that ends the document before it."""
    assert info.tokenizer is not None, "text data come with their tokenizer"
    tokens = np.concatenate([[info.tokenizer.end_of_text], info.tokenizer.encode(prompt)]).astype(np.int64)
    return {"prompt": torch.from_numpy(tokens).expand(count, -1)}


@torch.no_grad()
def draw(
    sampler: Sampler,
    networks: Networks,
    request: SampleRequest,
    *,
    batch: int,
    device: torch.device,
    latents: LatentsEntry | None = None,
) -> dict[str, Tensor]:
    """Draw the requested samples in passes of at most ``batch`` on ``device``, and return their fields on the CPU.

    The request's conditions belong to its numbers, one by one. Latents are decoded by the role ``codec``; ``latents``
    says what they are.
    """
    parts = []
    for rows in torch.split(torch.arange(len(request.numbers)), batch):
        conditions = {name: value[rows].to(device) for name, value in request.conditions.items()}
        part = replace(request, numbers=request.numbers[rows].to(device), conditions=conditions)
        drawn = sampler(networks, part)
        if "latent" in drawn:
            assert latents is not None, "check_codec refused data that hold no latents"
            drawn = {"image": _decoded(networks, drawn["latent"], latents)}
        parts.append({name: value.cpu() for name, value in drawn.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _decoded(networks: Networks, drawn: Tensor, latents: LatentsEntry) -> Tensor:
    """Return the images that normalised latents stand for."""
    image: Tensor = networks["codec"](denormalized(drawn, latents), task="decode")["image"]
    return image.clamp(-1.0, 1.0)


_WRITTEN = ("grid.png", "texts.txt", f"sample-{'[0-9]' * 6}.png", "samples.jsonl", "samples.npz")
"""What :meth:`Samples.write` may leave in a folder."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Drawn fields (``image`` or ``tokens``), what they were drawn for, and the data that give both a meaning."""

    fields: Mapping[str, Tensor]
    conditions: Mapping[str, Tensor]
    info: DataInfo

    @property
    def are_images(self) -> bool:
        """Whether the samples are pictures."""
        return "image" in self.fields

    @property
    def texts(self) -> list[str]:
        """The samples as texts; the tokenizer's end-of-text tokens are left out."""
        assert self.info.tokenizer is not None, "tokens come with the tokenizer of the data they were trained on"
        tokenizer = self.info.tokenizer
        # A network's vocabulary may be rounded up beyond the tokenizer's.
        rows = (row[row < tokenizer.vocabulary_size] for row in self.fields["tokens"].cpu().numpy())
        return [tokenizer.decode(row) for row in rows]

    @property
    def captions(self) -> list[str] | None:
        """The class or the caption of each sample."""
        if CAPTION in self.conditions:
            assert self.info.tokenizer is not None, "captions come with their tokenizer"
            return [self.info.tokenizer.decode(row) for row in self.conditions[CAPTION].cpu().numpy()]
        labels = self.conditions.get("label")
        return None if labels is None else [self.info.classes[int(label)] for label in labels]

    def _pictures(self) -> Tensor:
        """The images of the overview: samples, each below what it is made of where that is an image too."""
        images, originals = self.fields["image"], self.conditions.get("original")
        return images if originals is None else torch.cat([originals, images], dim=2)

    def write_overview(self, folder: Path, name: str) -> Path:
        """Write one file to look at, ``<name>.png`` (a labelled grid) or ``<name>.txt``, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.are_images:
            path = folder / f"{name}.png"
            write_sample_grid(path, self._pictures(), self.captions)
            return path
        path = folder / f"{name}.txt"
        separator = "\n" + "-" * 40 + "\n"
        path.write_text(separator.join(self.texts), encoding="utf-8")
        return path

    def write(self, folder: Path, *, overview_only: bool = False) -> list[Path]:
        """Write an overview and, unless that is all, every sample (PNG files, or one JSONL) and ``samples.npz``.

        An earlier draw's files go: among fewer new samples the rest of them would pass for new.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in _WRITTEN:
            for earlier in folder.glob(pattern):
                earlier.unlink()
        written = [self.write_overview(folder, "grid" if self.are_images else "texts")]
        if overview_only:
            return written
        if self.are_images:
            for number, image in enumerate(self.fields["image"]):
                written.append(folder / f"sample-{number:06d}.png")
                to_picture(image).save(written[-1])
        else:
            written.append(folder / "samples.jsonl")
            lines = [json.dumps({"number": number, "text": text}) for number, text in enumerate(self.texts)]
            written[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
        written.append(folder / "samples.npz")
        arrays = {name: value.cpu().numpy() for name, value in {**self.fields, **self.conditions}.items()}
        np.savez(written[-1], **arrays)  # type: ignore[arg-type]  # numpy types its keyword arguments as its own flag
        return written
