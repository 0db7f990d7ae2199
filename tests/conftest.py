"""Shapes and types of the tensor code are checked at every call while tests run; demo data are built once a session."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before torch is imported, and for every process that tests start: two threads each on two cores that others use, too,
# spend their time in barriers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

install_import_hook(
    ["sixfold.models", "sixfold.paths", "sixfold.objectives", "sixfold.samplers", "sixfold.distributed.randomness"],
    "beartype.beartype",
)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo data sets ``digits``, ``stdlib`` and (small) ``scenes``, built once a session."""
    from sixfold_data.build import BuildOptions
    from sixfold_data.demo import build_digits, build_stdlib
    from sixfold_data.scenes import build_scenes

    root = tmp_path_factory.mktemp("demo")
    build_digits(BuildOptions(out=root / "digits"))
    build_stdlib(BuildOptions(out=root / "stdlib"))
    build_scenes(BuildOptions(out=root / "scenes"), 256, 16)
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes longest, so that two workers end together."""
    slow = ("test_quality.py", "test_kill.py", "test_recipes.py")
    items.sort(key=lambda item: item.path.name not in slow)
