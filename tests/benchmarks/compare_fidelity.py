"""Frechet distance, kernel distance, precision and recall beside torch-fidelity's, on the same features.

    python tests/benchmarks/compare_fidelity.py [--peer-python .venv-fidelity/bin/python] [--samples 1000]

``--peer-python`` names an interpreter that has ``torch-fidelity``, which wants a torchvision for its own torch and is
never installed beside the platform. Features are those of the digits' pixels, real ones against noisy ones, and
Gaussian ones of another width. The largest relative difference is printed; exit code 1 beyond 1e-5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from sixfold.evaluation.frechet import frechet_distance, moments
from sixfold.evaluation.kernel_distance import kernel_distance
from sixfold.evaluation.manifolds import balls_around, balls_holding

TOLERANCE = 1e-5
NEIGHBOURS = 3

PEER = """
import json, sys, numpy as np, torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
drawn, real = (torch.from_numpy(np.load(path)) for path in sys.argv[1:3])
both = [fid_features_to_statistics(part) for part in (drawn, real)]
found = fid_statistics_to_metric(*both, False)
found |= kid_features_to_metric(drawn, real, kid_subsets=1, kid_subset_size=len(real), verbose=False)
found |= prc_features_to_metric(drawn, real, prc_neighborhood=int(sys.argv[3]), prc_batch_size=10000, verbose=False)
names = ("frechet_inception_distance", "kernel_inception_distance_mean", "precision", "recall")
print(json.dumps([found[name] for name in names]))
"""


def ours(drawn: Tensor, real: Tensor) -> list[float]:
    """FD, KID, precision and recall by the platform."""
    precise, _ = balls_holding(drawn, balls_around(real, neighbours=NEIGHBOURS))
    recalled, _ = balls_holding(real, balls_around(drawn, neighbours=NEIGHBOURS))
    return [
        frechet_distance(moments(drawn), moments(real)),
        kernel_distance(drawn, real),
        float((precise > 0).double().mean()),
        float((recalled > 0).double().mean()),
    ]


def theirs(drawn: Tensor, real: Tensor, interpreter: str, folder: Path) -> list[float]:
    """The same by torch-fidelity, whose kernel distance is asked for one subset of all samples."""
    paths = [folder / "drawn.npy", folder / "real.npy"]
    for path, features in zip(paths, (drawn, real), strict=True):
        np.save(path, features.numpy())
    command = [interpreter, "-c", PEER, *map(str, paths), str(NEIGHBOURS)]
    found: list[float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def cases(samples: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of drawn and real features, float64, as many of each."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.from_numpy(load_digits().data)[torch.randperm(1797, generator=generator)] / 16.0
    count = min(samples, len(digits) // 2)
    noise = 0.1 * torch.randn(count, 64, dtype=torch.float64, generator=generator)
    wide = torch.randn(2, samples, 256, dtype=torch.float64, generator=generator)
    return {
        "digits and other digits": (digits[:count], digits[count : 2 * count]),
        "digits and noisy digits": (digits[:count] + noise, digits[count : 2 * count]),
        "normal and wider normal": (1.2 * wide[0] + 0.1, wide[1]),
    }


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch-fidelity")
    parser.add_argument("--samples", type=int, default=1000, help="features of each kind")
    arguments = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, (drawn, real) in cases(arguments.samples).items():
            pairs = zip(ours(drawn, real), theirs(drawn, real, arguments.peer_python, Path(folder)), strict=True)
            for measure, (mine, other) in zip(("FD", "KID", "precision", "recall"), pairs, strict=True):
                difference = abs(mine - other) / max(abs(other), 1e-12)
                worst = max(worst, difference)
                print(f"{name:24} {measure:10} {mine:12.8f} {other:12.8f}   {difference:.1e}")
    print(f"largest relative difference: {worst:.1e}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
