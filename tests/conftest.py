"""Shapes and types of the tensor code are checked at every call while tests run."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from jaxtyping import install_import_hook

install_import_hook(
    ["sixfold.models", "sixfold.paths", "sixfold.objectives", "sixfold.samplers", "sixfold.distributed.randomness"],
    "beartype.beartype",
)
