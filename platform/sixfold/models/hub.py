"""Where models in the format of the Hugging Face hub are read from: a folder, or the hub where it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

HUB = "hf://"
"""What a name on the hub begins with, as in ``hf://google/t5-v1_1-xxl``; anything else is a folder."""


class ModelSource(NamedTuple):
    """What ``from_pretrained`` of transformers takes: the first argument, and whether the network may be asked."""

    name: str
    local_files_only: bool


def model_source(path: str) -> ModelSource:
    """Return where a model is read from.

    Raises:
        FileNotFoundError: it is said to be a folder, and there is none.
    """
    if path.startswith(HUB):
        return ModelSource(path.removeprefix(HUB), local_files_only=False)  # offline, its cache answers or says so
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    return ModelSource(str(folder), local_files_only=True)
