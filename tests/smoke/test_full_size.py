"""Full-size recipes are shown, and rehearse a step on 512 fake ranks, on this machine and without their memory."""

import json
import os
import subprocess
import sys

import pytest

RANKS = 512


def output_of(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sixfold.cli.main", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# 12 s of CPU time each, of which the real step on fake tensors is most.
@pytest.mark.parametrize(
    ("name", "role", "parameters", "shards", "averaged"),
    [("lm/moe-16b-a3b", "lm", 16.4e9, 64, False), ("flow/dit-xl-2-imagenet256", "denoiser", 675e6, 512, True)],
)
def test_a_full_size_recipe_rehearses_a_step(name, role, parameters, shards, averaged):
    assert json.loads(output_of("show", name, "--json"))
    found = json.loads(output_of("run", name, "--dry-run", "--world-size", str(RANKS), "--json"))["roles"][role]
    assert found["parameters"] == pytest.approx(parameters, rel=0.01)
    # fp32, and what does not divide by the ranks rounded up
    assert found["parameter_bytes"] == pytest.approx(4 * found["parameters"] / shards, rel=0.2)
    assert found["gradient_bytes"] == found["parameter_bytes"]
    assert found["optimizer_bytes"] == pytest.approx(2 * found["parameter_bytes"], rel=0.01)
    assert found["average_bytes"] == (found["parameter_bytes"] if averaged else 0)
