"""How guidance and solver steps trade off: prompt alignment of a text-to-image run for each pair, as one table.

    python tests/benchmarks/bench_guidance.py runs/flow/mmdit-smoke/ID --scales 1 2 4 --steps 5 10 20 --samples 128

All cells draw the same captions of the held-out split from the same noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sixfold.samplers.config import CFGConfig
from sixfold.samplers.contract import SampleRequest
from sixfold.train.inference import Trained, load_trained
from sixfold.train.samples import Samples, conditions_of, draw
from sixfold_data.describe import describe
from sixfold_data.scene_reading import read_agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--samples", type=int, default=128)
    options = parser.parse_args()
    trained = load_trained(options.run)
    print(f"{trained.recipe.name}, step {trained.candidate.step}: held-out captions followed, of {options.samples}")
    print(f"{'guidance':>9}" + "".join(f"{f'{steps} steps':>10}" for steps in options.steps))
    for scale in options.scales:
        cells = [alignment(trained, scale, steps, options.samples) for steps in options.steps]
        print(f"{scale:>9g}" + "".join(f"{cell:>10.1%}" for cell in cells), flush=True)


def alignment(trained: Trained, scale: float, steps: int, count: int) -> float:
    """The share of samples whose colours, shapes and relation are the caption's."""
    recipe, info = trained.recipe, describe(trained.recipe.data)
    assert recipe.sampling is not None, "the run samples"
    config = recipe.sampling.model_copy(update={"guidance": CFGConfig(scale=scale), "steps": steps})
    sampler = config.load()(config, recipe.objective, trained.settings)
    conditions = conditions_of(recipe, info, count)
    request = SampleRequest(seed=0, numbers=torch.arange(count), conditions=conditions)
    fields = draw(sampler, trained.networks, request, batch=128, device=trained.device, latents=info.latents)
    captions = Samples(fields=fields, conditions=conditions, info=info).captions
    right = read_agreement(fields["image"].numpy(), captions)["aligned"]
    return sum(right) / count


if __name__ == "__main__":
    main()
