"""Checks across the sections of a recipe before anything starts; faults are collected and name their keys' lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from sixfold.config.provenance import Provenance
from sixfold.config.schema import nearest, spell_plain
from sixfold.engine.config import DeepSpeedConfig, FSDPConfig
from sixfold.errors import Fault, RecipeError
from sixfold.evaluation.config import metric_types
from sixfold.models.text_encoder.config import ByteTextEncoderConfig
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.distillation.settings import FewStepSettings
from sixfold.recipe.recipe import NetworkConfig, Recipe


@dataclass(frozen=True)
class _Checked:
    """The recipe under check, how many ranks it is to run on if that is known, and where its settings were written."""

    recipe: Recipe
    world_size: int | None
    provenance: Provenance

    def say(self, *keys: str) -> str:
        """Spell keys with their values and places: ``data.lanes = 48 (my.yaml:7) and train.steps = 9 (default)``."""
        return " and ".join(f"{key} = {self.say_value(key)} ({self.provenance.where(key)})" for key in keys)

    def fault(self, what: str, *, at: str, fix: str, allowed: str | None = None) -> Fault:
        """A fault whose place is the line of the key ``at``."""
        return Fault(what=what, where=self.provenance.nearest(tuple(at.split("."))), allowed=allowed, fix=fix)

    def say_value(self, key: str) -> str:
        node: Any = self.recipe
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else getattr(node, part)
        return spell_plain(node)

    def role_key(self, role: str, section: str) -> str:
        """The dotted key of a role's section: its own where the role overrides it."""
        override = self.recipe.roles.get(role)
        own = override is not None and getattr(override, section) is not None
        return f"roles.{role}.{section}" if own else section


def check_recipe(recipe: Recipe, world_size: int | None = None, *, provenance: Provenance | None = None) -> None:
    """Check that a recipe's sections fit together, and fit the number of ranks if that is given.

    Raises:
        RecipeError: with every fault.
    """
    checked = _Checked(recipe, world_size, provenance or Provenance(f"recipe {recipe.name}"))
    # the same section serves many roles: dict.fromkeys drops what would be said once for each
    faults = list(dict.fromkeys(fault for check in _CHECKS for fault in check(checked)))
    if faults:
        raise RecipeError(*faults)


def _batches_divide(checked: _Checked) -> Iterator[Fault]:
    """Ranks divide lanes (which divide the global batch), so that a rank's slots are whole lanes."""
    data, ranks = checked.recipe.data, checked.world_size
    if ranks is None or data.lane_count % ranks == 0:
        yield from _micro_batches_divide(checked, data.global_batch // (ranks or 1))
        return
    lanes = math.lcm(data.lane_count, ranks)
    may_be = [str(n) for n in range(1, data.lane_count + 1) if data.lane_count % n == 0]
    yield checked.fault(
        f"{checked.say('data.lanes', 'data.global_batch')}: {ranks} ranks cannot share {data.lane_count} lanes evenly",
        at="data.lanes" if data.lanes is not None else "data.global_batch",
        allowed=f"ranks that divide {data.lane_count}: {', '.join(may_be)}",
        fix=f"set data.lanes={lanes} (this changes the order of samples), or run on another number of ranks"
        if data.global_batch % lanes == 0
        else f"set data.global_batch to a multiple of {ranks}, or run on another number of ranks",
    )


def _micro_batches_divide(checked: _Checked, rank_batch: int) -> Iterator[Fault]:
    """A micro-batch divides the rank's batch, or is larger and then never reached."""
    for role in checked.recipe.objective.role_names:
        micro_batch = checked.recipe.engine_of(role).micro_batch
        if micro_batch is None or micro_batch >= rank_batch or rank_batch % micro_batch == 0:
            continue
        key = f"{checked.role_key(role, 'engine')}.micro_batch"
        smaller = max(n for n in range(1, micro_batch + 1) if rank_batch % n == 0)
        on_ranks = f" on {checked.world_size} ranks" if checked.world_size else ""
        yield checked.fault(
            f"{checked.say(key, 'data.global_batch')}{on_ranks}: a rank's {rank_batch} are not whole micro-batches",
            at=key,
            allowed=f"a divisor of {rank_batch}",
            fix=f"set {key}={smaller}",
        )


def _discriminators_see_several(checked: _Checked) -> Iterator[Fault]:
    """Heads that are taught by one sample a device collapse onto few modes (ADD's and LADD's experience)."""
    recipe, role = checked.recipe, "discriminator"
    if not isinstance(recipe.objective, FewStepSettings) or role not in recipe.objective.trains:
        return
    rank_batch = recipe.data.global_batch // (checked.world_size or 1)
    if rank_batch < 2:
        yield checked.fault(
            f"{checked.say('data.global_batch')} on {checked.world_size or 1} ranks: the discriminator would see one "
            "sample on each, and the student collapse",
            at="data.global_batch",
            allowed="two samples a rank and more",
            fix=f"set data.global_batch={2 * (checked.world_size or 1)}, or run on fewer ranks",
        )
    elif recipe.engine_of(role).micro_batch == 1:
        key = f"{checked.role_key(role, 'engine')}.micro_batch"
        yield checked.fault(
            f"{checked.say(key)}: the discriminator would see one sample at a time, and the student collapse",
            at=key,
            allowed="2 and more",
            fix=f"set {key}=2",
        )


def _coupling_groups_divide(checked: _Checked) -> Iterator[Fault]:
    """Noise is dealt out within whole groups of consecutive positions, each inside one micro-batch."""
    recipe = checked.recipe
    if not isinstance(recipe.objective, DenoisingConfig) or recipe.objective.coupling.type == "independent":
        return
    rank_batch = recipe.data.global_batch // (checked.world_size or 1)
    for role in recipe.objective.role_names:
        micro_batch = min(recipe.engine_of(role).micro_batch or rank_batch, rank_batch)
        group = recipe.objective.coupling.group
        if micro_batch % group:
            smaller = math.gcd(micro_batch, group)
            yield checked.fault(
                f"{checked.say('objective.coupling.group')}: micro-batches of {micro_batch} are not whole groups",
                at="objective.coupling.group",
                allowed=f"a divisor of {micro_batch}",
                fix=f"set objective.coupling.group={smaller}"
                if smaller > 1
                else f"set {checked.role_key(role, 'engine')}.micro_batch to a multiple of {group}",
            )


def _data_fit(checked: _Checked) -> Iterator[Fault]:
    """Text is cut into sequences; pictures come in the size that the network takes."""
    recipe, size = checked.recipe, checked.recipe.data.image_size
    if recipe.objective.fit.modality == "text" and recipe.data.sequence_length is None:
        yield checked.fault(
            f"data.sequence_length is missing: objective {recipe.objective.type} trains on sequences of tokens",
            at="data",
            allowed="an integer from 1",
            fix="set data.sequence_length=256",
        )
    for name in recipe.objective.network_names:
        network = recipe.networks.get(name)
        if size is not None and size != getattr(network, "image_size", size):
            yield checked.fault(
                f"{checked.say('data.image_size', f'networks.{name}.image_size')}: pictures do not fit the network",
                at="data.image_size",
                allowed=(fitting := checked.say_value(f"networks.{name}.image_size")),
                fix=f"set data.image_size={fitting}, or change networks.{name}.image_size",
            )


def _networks_exist(checked: _Checked) -> Iterator[Fault]:
    """Every network the objective names is there and of a kind it can train; none is left over."""
    recipe, used = checked.recipe, checked.recipe.objective.needs
    for name, capability in used.items():
        network = recipe.networks.get(name)
        if network is None:
            setting = next((field for field, value in recipe.objective if value == name), "network")
            field = type(recipe.objective).model_fields.get(setting)
            optional = field is not None and type(None) in get_args(field.annotation)
            suggestion = nearest(name, list(recipe.networks)) or ("null" if optional else next(iter(recipe.networks)))
            yield checked.fault(
                f"objective {recipe.objective.type} needs a network {name!r}, which networks does not have",
                at="networks",
                allowed=", ".join(recipe.networks),
                fix=f"name it networks.{name}, or set objective.{setting}={suggestion}",
            )
        elif network.type != "trained" and capability not in network.provides:
            able = _types_that_provide(capability)
            yield checked.fault(
                f"{checked.say(f'networks.{name}.type')}: objective {recipe.objective.type} cannot train this type",
                at=f"networks.{name}.type",
                allowed=", ".join(able),
                fix=f"set networks.{name}.type={able[0]} with its settings, or choose another objective",
            )
    for name in recipe.networks:
        if name not in used and all(other in recipe.networks for other in used):
            yield checked.fault(
                f"networks.{name} is used by nothing: objective {recipe.objective.type} uses {', '.join(used)}",
                at=f"networks.{name}",
                fix=f"remove it (networks.{name}=null)",
            )


def _types_that_provide(capability: str) -> list[str]:
    """The types of networks that an objective may use so."""
    union, *_ = get_args(NetworkConfig)
    return [kind.model_fields["type"].default for kind in get_args(union) if capability in kind.provides]


def _roles_exist(checked: _Checked) -> Iterator[Fault]:
    known = checked.recipe.objective.role_names
    for role in checked.recipe.roles:
        if role not in known:
            yield checked.fault(
                f"roles.{role}: objective {checked.recipe.objective.type} has no such role",
                at=f"roles.{role}",
                allowed=", ".join(known),
                fix=f"did you mean roles.{nearest(role, known) or known[0]}?",
            )


def _sampler_fits(checked: _Checked) -> Iterator[Fault]:
    recipe, fit = checked.recipe, checked.recipe.objective.fit
    if recipe.sampling is not None and recipe.sampling.type not in fit.samplers:
        yield checked.fault(
            f"{checked.say('sampling.type')} cannot draw from what {checked.say('objective.type')} trains",
            at="sampling.type",
            allowed=", ".join(fit.samplers),
            fix=f"set sampling.type={fit.samplers[0]}",
        )


def _guidance_has_null(checked: _Checked) -> Iterator[Fault]:
    """Label drop and guidance need labels, and guidance needs a network that saw their absence."""
    recipe = checked.recipe
    if not isinstance(recipe.objective, DenoisingConfig):
        return
    network = recipe.networks.get(recipe.objective.network)
    labelled = getattr(network, "classes", None) != 0
    guidance = getattr(recipe.sampling, "guidance", None)
    if recipe.objective.label_drop > 0 and not labelled:
        yield checked.fault(
            f"{checked.say('objective.label_drop')}, but networks.{recipe.objective.network} has no classes to drop",
            at="objective.label_drop",
            fix=f"set networks.{recipe.objective.network}.classes, or objective.label_drop=0.0",
        )
    if guidance is not None and guidance.needs_null and (not labelled or recipe.objective.label_drop == 0):
        yield checked.fault(
            f"{checked.say('sampling.guidance.type', 'objective.label_drop')}: guidance needs a network that was also "
            "trained without its condition",
            at="sampling.guidance",
            fix="set objective.label_drop=0.1 (and classes), or sampling.guidance.type=none",
        )


def _metrics_fit(checked: _Checked) -> Iterator[Fault]:
    """Metrics of held-out data are the objective's own; those of samples fit whatever draws samples of their kind."""
    recipe = checked.recipe
    if recipe.evaluation is None:
        return
    fit = recipe.objective.fit
    drawn = tuple(metric_types(needing_samples_of=fit.modality))
    for metric in recipe.evaluation.metrics:
        if metric.type not in (*fit.metrics, *drawn):
            yield checked.fault(
                f"evaluation.metrics: {metric.type} does not apply to objective {recipe.objective.type}",
                at="evaluation.metrics",
                allowed=", ".join(dict.fromkeys((*fit.metrics, *drawn))),
                fix=f"remove {metric.type} from the list",
            )
    if recipe.sampling is None and recipe.evaluation.sample_metrics:
        needing = ", ".join(metric.type for metric in recipe.evaluation.sample_metrics)
        yield checked.fault(
            f"evaluation.metrics has {needing}, which score samples, and there is no sampling section",
            at="evaluation.metrics",
            fix="add a sampling section, or remove these metrics",
        )
    yield from _labels_for_metrics(checked)


def _labels_for_metrics(checked: _Checked) -> Iterator[Fault]:
    """The feature classifier, and accuracy by class, need labels."""
    recipe, evaluation = checked.recipe, checked.recipe.evaluation
    networks = [recipe.networks[name] for name in recipe.objective.network_names if name in recipe.networks]
    if evaluation is None or not all(getattr(network, "classes", None) == 0 for network in networks):
        return
    for metric in evaluation.metrics:
        if "labels" in metric.needs:
            yield checked.fault(
                f"evaluation.metrics: {metric.type} needs labels, and no network has classes",
                at="evaluation.metrics",
                fix=f"set classes on the network, or remove {metric.type}",
            )


def _captions_fit(checked: _Checked) -> Iterator[Fault]:
    """Metrics of captions need text encoders, and encoders of bytes have positions for whole captions."""
    recipe = checked.recipe
    reads = "text_encoder" in recipe.objective.needs.values()
    for metric in recipe.evaluation.metrics if recipe.evaluation is not None else ():
        if "captions" in metric.needs and not reads:
            yield checked.fault(
                f"evaluation.metrics: {metric.type} needs captions, and the objective has no text encoder",
                at="evaluation.metrics",
                fix=f"add objective.encoders, or remove {metric.type}",
            )
    for name, network in recipe.networks.items():
        if isinstance(network, ByteTextEncoderConfig) and network.length != recipe.data.caption_length:
            yield checked.fault(
                f"{checked.say('data.caption_length', f'networks.{name}.length')}: captions do not fit the encoder",
                at=f"networks.{name}.length",
                allowed=str(recipe.data.caption_length),
                fix=f"set networks.{name}.length={recipe.data.caption_length}, or change data.caption_length",
            )


def _reference_images(checked: _Checked) -> Iterator[Fault]:
    """Latents are no pictures to compare samples with, and samples are of one size."""
    recipe, evaluation = checked.recipe, checked.recipe.evaluation
    if evaluation is None or evaluation.reference is not None:
        return
    if recipe.objective.latents_of is not None:
        what = "latents"
    elif recipe.data.buckets is not None:
        what = "of several sizes (data.buckets)"
    else:
        return
    comparing = [metric.type for metric in evaluation.sample_metrics if "captions" not in metric.needs]
    if comparing:
        yield checked.fault(
            f"evaluation.metrics has {', '.join(comparing)}, which compare images, and the data are {what}",
            at="evaluation.metrics",
            fix="name images of the samples' size under evaluation.reference, or remove these metrics",
        )


def _engines_fit(checked: _Checked) -> Iterator[Fault]:
    """Partitioned parameters have no forward-mode derivative; HSDP replicas divide the ranks."""
    for role in checked.recipe.objective.role_names:
        engine, key = checked.recipe.engine_of(role), checked.role_key(role, "engine")
        if isinstance(engine, DeepSpeedConfig) and engine.zero_stage == 3 and checked.recipe.objective.forward_mode:
            yield checked.fault(
                f"{checked.say(f'{key}.zero_stage', 'objective.type')}: partitioned parameters have no forward-mode "
                "derivative, which this objective takes",
                at=f"{key}.zero_stage",
                allowed="ddp, fsdp, or deepspeed with zero_stage 1 or 2",
                fix=f"set {key}.type=fsdp to shard parameters, or {key}.zero_stage=2",
            )
        if isinstance(engine, FSDPConfig) and checked.world_size and checked.world_size % engine.replicate:
            yield checked.fault(
                f"{checked.say(f'{key}.replicate')} on {checked.world_size} ranks: replicas must divide the ranks",
                at=f"{key}.replicate",
                allowed=f"a divisor of {checked.world_size}",
                fix=f"set {key}.replicate=1, or run on a multiple of {engine.replicate} ranks",
            )


def _budgets_agree(checked: _Checked) -> Iterator[Fault]:
    """What the compiler may keep is one setting of the process, read by whichever role is compiled."""
    recipe = checked.recipe
    compiled = [role for role in recipe.objective.role_names if recipe.engine_of(role).compile]
    shares = {role: recipe.engine_of(role).activation_memory_budget for role in compiled}
    if len(set(shares.values())) > 1:
        told = ", ".join(f"{role}: {'none' if share is None else f'{share:g}'}" for role, share in shares.items())
        key = checked.role_key(next(role for role in compiled if shares[role] is not None), "engine")
        yield checked.fault(
            f"compiled roles differ in activation_memory_budget ({told}): the compiler has one for all",
            at=f"{key}.activation_memory_budget",
            allowed="one budget for all roles with compile: true",
            fix="give these roles the same budget, or compile: false to those without",
        )


def _milestones_are_saved(checked: _Checked) -> Iterator[Fault]:
    checkpoint = checked.recipe.checkpoint
    if checkpoint.keep_every is not None and checkpoint.keep_every % checkpoint.every_steps:
        yield checked.fault(
            f"{checked.say('checkpoint.keep_every', 'checkpoint.every_steps')}: most milestones would never be saved",
            at="checkpoint.keep_every",
            allowed=f"a multiple of {checkpoint.every_steps}",
            fix=f"set checkpoint.keep_every={_next_multiple(checkpoint.keep_every, checkpoint.every_steps)}",
        )


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


_CHECKS: tuple[Callable[[_Checked], Iterator[Fault]], ...] = (
    _batches_divide,
    _discriminators_see_several,
    _coupling_groups_divide,
    _data_fit,
    _networks_exist,
    _roles_exist,
    _sampler_fits,
    _guidance_has_null,
    _metrics_fit,
    _captions_fit,
    _reference_images,
    _engines_fit,
    _budgets_agree,
    _milestones_are_saved,
)
