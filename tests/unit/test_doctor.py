"""``sixfold doctor`` speaks where nothing else works: packages that are missing or of a wrong version, no programs."""

import json
import os
import subprocess
import sys

import pytest

from sixfold.train.doctor import within


def examine(*, without=(), path=(), programs=None):
    """Run the command in a process that lacks packages, sees more of them first, or has no programs."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({list(without)!r})); sys.path[:0] = {[*map(str, path)]!r}; "
        "from sixfold.cli.main import main; sys.argv = ['sixfold', 'doctor', '--json']; sys.exit(main())"
    )
    environment = {**os.environ, **({} if programs is None else {"PATH": programs})}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {finding["subject"]: finding for finding in json.loads(done.stdout)}


def test_a_machine_without_torch_is_told_what_to_install():
    code, found = examine(without=("torch", "psutil", "ray", "mlflow"), programs="")
    assert code == 3
    assert (found["torch"]["state"], found["torch"]["fix"]) == ("broken", "pip install 'torch<2.14,>=2.11'")
    assert found["psutil"]["state"] == "broken"
    assert "precision auto" not in found
    assert (found["ray"]["state"], found["ray"]["fix"]) == ("missing", "pip install 'sixfold[ray]'")
    assert found["mlflow"]["state"] == "missing"
    for name in ("C++ compiler", "sbatch", "squeue", "browser"):
        assert found[name]["state"] == "missing"
        assert found[name]["fix"]


def test_a_version_out_of_range_is_found(tmp_path):
    for name, version in (("torch", "2.10.1+cpu"), ("mlflow", "2.9.0")):
        (folder := tmp_path / f"{name}-{version}.dist-info").mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    code, found = examine(path=(tmp_path,))
    assert code == 3
    assert found["torch"]["detail"].startswith("2.10.1+cpu is installed, torch<2.14,>=2.11 is needed")
    assert (found["mlflow"]["state"], found["mlflow"]["fix"]) == ("missing", "pip install 'sixfold[mlflow]'")
    assert found["numpy"]["state"] == "ok"


@pytest.mark.parametrize(
    ("version", "allowed", "inside"),
    [
        ("2.13.0+cpu", "<2.14,>=2.11", True),
        ("2.14.0", "<2.14,>=2.11", False),
        ("2.9", ">=2.11", False),
        ("2.11", ">=2.11.0", True),
        ("1.10.0rc1", ">1.9", True),
        ("1", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version, allowed, inside):
    assert within(version, allowed) == inside
