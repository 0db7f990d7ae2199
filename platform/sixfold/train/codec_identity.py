"""Which codec latents belong to: a hash of its weights, checked before anything trains on them or decodes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sixfold.errors import RecipeError
from sixfold.models.trained.network import NetworksConfig, TrainedNetwork
from sixfold.recipe.recipe import Recipe
from sixfold.train.fitting import latents_faults
from sixfold.train.roles import checkpoint_of, read_trained
from sixfold_data.describe import DataInfo


def codec_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_teachers(recipe: Recipe, networks: NetworksConfig) -> None:
    """Check that denoisers of other runs speak of the same latents as this one; a run that is only planned has none.

    Raises:
        RecipeError: one was trained on latents and this run is not, or the other way round; or on another codec's.
    """
    own_name = recipe.objective.latents_of
    own = None if own_name is None else networks[own_name]
    for name, capability in recipe.objective.needs.items():
        network = networks[name]
        if capability != "denoiser" or not isinstance(network, TrainedNetwork):
            continue
        if (network.codec is None) != (own is None):
            raise RecipeError.of(
                f"networks.{name} was trained on latents, and objective.codec names no codec"
                if own is None
                else f"networks.{name} was trained on images, and this run is on latents of networks.{own_name}",
                where=f"networks.{name}",
                fix="add networks.codec: {type: trained, run: <the codec's run>} and objective.codec: codec"
                if own is None
                else "name a run that was trained on latents of the same codec",
            )
        if isinstance(own, TrainedNetwork) and isinstance(network.codec, TrainedNetwork):
            _check_same_codec(f"networks.{name}", network.codec, f"networks.{own_name}", own)


def _check_same_codec(key: str, theirs: TrainedNetwork, own_key: str, own: TrainedNetwork) -> None:
    if own.run is None or theirs.run is None or checkpoint_of(own).uri == checkpoint_of(theirs).uri:
        return
    found, expected = codec_hash(read_trained(theirs)), codec_hash(read_trained(own))
    if found != expected:
        raise RecipeError.of(
            f"{key} was trained on latents of codec {found[:16]} ({theirs.run}), {own_key} is {expected[:16]}: "
            "it knows another latent space",
            where=key,
            allowed=f"a run on latents of {own.run}",
            fix=f"name such a run, or encode the data with the codec of {theirs.run} and name it under {own_key}.run",
        )


def check_codec(recipe: Recipe, networks: NetworksConfig, info: DataInfo) -> None:
    """Check that data and codec belong together.

    Raises:
        RecipeError: the data hold latents and the objective names no codec, or the other way round; or the latents are
            codes, or another codec's.
    """
    name = recipe.objective.latents_of
    if faults := [*latents_faults(recipe, info)]:
        raise RecipeError(*faults)
    if name is None or info.latents is None:
        return
    if info.latents.form == "codes":
        raise RecipeError.of(
            f"the data hold codes of a codebook of {info.latents.codebook_size}, and objective.type="
            f"{recipe.objective.type} adds noise to latents that are numbers",
            where=", ".join(recipe.data.paths),
            allowed="latents of a codec whose bottleneck.type is kl",
            fix="encode the images with such a codec",
        )
    network = networks[name]
    if not isinstance(network, TrainedNetwork) or network.run is None:
        raise RecipeError.of(
            f"networks.{name} must be a trained codec", where=f"networks.{name}", fix="set its type to trained"
        )
    found = codec_hash(read_trained(network))
    if found != info.latents.codec:
        raise RecipeError.of(
            f"the latents are of codec {info.latents.codec[:16]}, networks.{name} is {found[:16]}",
            where=f"networks.{name}",
            allowed=f"the codec that encoded {', '.join(recipe.data.paths)}",
            fix=f"name its run, and its step if it trained on (networks.{name}.step), or encode the images again",
        )
