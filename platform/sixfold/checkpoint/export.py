"""Taking a network out of a checkpoint: full tensors in one process, without engines or process groups."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sixfold.checkpoint.ranks import Ranks
from sixfold.checkpoint.reading import fill, open_reader
from sixfold.checkpoint.verification import Candidate
from sixfold.errors import CheckpointError, EnvironmentFault


def read_parameters(candidate: Candidate, role: str, *, averaged: bool) -> dict[str, Tensor]:
    """Return a role's full parameters and buffers on the CPU, as ``load_state_dict`` takes them.

    Args:
        candidate: a verified checkpoint.
        role: whose network.
        averaged: the moving average of the parameters instead of the parameters.

    Raises:
        CheckpointError: the checkpoint has no such role, or no moving average of it.
    """
    return read_kind(candidate, role, "ema" if averaged else "parameters")


def read_kind(candidate: Candidate, role: str, kind: str, *, buffers: bool = True) -> dict[str, Tensor]:
    """As :func:`read_parameters`, for any kind of a role's parameters: ``parameters``, ``ema``, ``ema_0.1``."""
    saved = open_reader(candidate, Ranks(None)).tensors()
    chosen: dict[str, str] = {}
    for prefix in (f"roles/{role}/{kind}/", *([f"roles/{role}/buffers/"] if buffers else [])):
        chosen |= {name: name.removeprefix(prefix) for name in saved if name.startswith(prefix)}
    if not any(name.startswith(f"roles/{role}/{kind}/") for name in chosen):
        available = sorted({"/".join(name.split("/")[1:3]) for name in saved})
        raise CheckpointError.of(f"it holds no {role}/{kind}", where=candidate.uri, allowed=", ".join(available))
    state = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in chosen}
    fill(candidate, state, Ranks(None))
    return {short: state[name] for name, short in chosen.items()}


def read_updates(candidate: Candidate, role: str) -> int:
    """Return how many updates a role had taken."""
    name = f"roles/{role}/optimizer_step"
    state = {name: torch.zeros((), dtype=torch.int64)}
    fill(candidate, state, Ranks(None))
    return int(state[name].item())


def export_safetensors(candidate: Candidate, role: str, *, averaged: bool, out: Path) -> None:
    """Write a role's parameters and buffers to one safetensors file that says where it comes from.

    Raises:
        CheckpointError: the checkpoint has no such role, or no moving average of it.
        EnvironmentFault: the file cannot be written.
    """
    tensors = read_parameters(candidate, role, averaged=averaged)
    write_safetensors(tensors, candidate, role, out, averaged=str(averaged).lower())


def write_safetensors(tensors: dict[str, Tensor], candidate: Candidate, role: str, out: Path, **more: str) -> None:
    """Write what was made of a checkpoint's tensors; the file says which checkpoint, and whatever ``more`` says.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    manifest = candidate.manifest
    description = {
        **more,
        "format": "pt",
        "role": role,
        "step": str(candidate.step),
        "recipe_hash": manifest.identity.recipe_hash,
        "fingerprint": manifest.identity.fingerprint,
        "written_by": f"sixfold {manifest.versions['sixfold']}",
    }
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=description)
        partial.replace(out)
    except (OSError, SafetensorError) as error:  # the second is what its writer makes of the first
        with suppress(OSError):  # what led here matters more
            partial.unlink()
        raise EnvironmentFault.of(
            f"the weights cannot be written: {error}",
            where=str(out),
            fix="check the right to write there and the room on that disk, or name another file with --out",
        ) from error
