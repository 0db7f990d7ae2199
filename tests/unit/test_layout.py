"""The tree's own rules: source roots are no packages, and the top level holds nothing else."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "LICENSE",
    "Makefile",
    "README.md",
    "data_pipelines",
    "infra",
    "launchers",
    "platform",
    "pyproject.toml",
    "recipes",
    "tests",
}


def test_source_roots_are_not_packages():
    """A package named platform would shadow the standard library's and break uuid and pytest."""
    for root in ("platform", "launchers", "data_pipelines"):
        assert (ROOT / root).is_dir()
        assert not (ROOT / root / "__init__.py").exists()


def test_top_level_holds_only_what_the_layout_names():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {Path(line).parts[0] for line in listed if (ROOT / line).exists()}
    assert {name for name in names if not name.startswith(".")} <= ALLOWED


def test_every_package_below_a_source_root_is_named_sixfold():
    packages = {
        p.parent.name
        for root in ("platform", "launchers", "data_pipelines")
        for p in ROOT.glob(f"{root}/*/__init__.py")
    }
    assert packages == {"sixfold", "sixfold_launchers", "sixfold_data"}
