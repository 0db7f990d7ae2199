"""From places in a source to the fields of a batch, damaged samples replaced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sixfold.errors import DataError
from sixfold_data.members import Row, Unreadable
from sixfold_data.order import Places
from sixfold_data.quarantine import MAX_REPLACEMENTS, Damage, draw_replacement
from sixfold_data.sources import Source


def read_fields(
    source: Source, places: Places, positions: np.ndarray, *, seed: int
) -> tuple[dict[str, Tensor], list[Damage]]:
    """Read samples as batch fields; an unreadable one gives its position to another sample of the source.

    Args:
        source: where the samples are.
        places: the samples, ``[n]``.
        positions: their global positions, ``[n]``, which decide what replaces a damaged one.
        seed: the recipe's seed.

    Raises:
        DataError: a shard has changed, or replacements are unreadable over and over.
    """
    samples = places.sample.copy()
    rows: list[Row] = []
    damages: list[Damage] = []
    for slot, row in enumerate(source.rows(places)):
        if not isinstance(row, Unreadable):
            rows.append(row)
            continue
        place = Places(places.epoch[slot : slot + 1], samples[slot : slot + 1])  # a view: written below
        replacement, replaced = _replace(source, place, row, position=int(positions[slot]), seed=seed)
        rows.append(replacement)
        damages += replaced
    return source.fields(rows, Places(places.epoch, samples)), damages


def _replace(
    source: Source, place: Places, damage: Unreadable, *, position: int, seed: int
) -> tuple[Row, list[Damage]]:
    """Return another sample for a position, and write its number into ``place``."""
    damages = []
    for attempt in range(MAX_REPLACEMENTS):
        drawn = draw_replacement(seed=seed, position=position, attempt=attempt, samples=len(source.order))
        place.sample[0] = drawn
        damages.append(
            Damage(position=position, shard=damage.shard, key=damage.key, reason=damage.reason, replaced_by=drawn)
        )
        row = source.rows(place)[0]
        if not isinstance(row, Unreadable):
            return row, damages
        damage = row
    raise DataError.of(
        f"sample {damage.key} cannot be read ({damage.reason}), nor {MAX_REPLACEMENTS} others drawn in its place",
        where=damage.shard,
        fix="check the data set with `sixfold data verify` and restore it",
    )


def scatter(parts: Sequence[tuple[np.ndarray, dict[str, Tensor]]], samples: int) -> dict[str, Tensor]:
    """Merge fields of several sources, each with the slots ``[n_k]`` that it fills, into fields of ``samples`` rows."""
    if len(parts) == 1:
        return parts[0][1]
    merged = {name: value.new_empty((samples, *value.shape[1:])) for name, value in parts[0][1].items()}
    for slots, fields in parts:
        for name, value in fields.items():
            merged[name][torch.from_numpy(slots)] = value
    return merged
