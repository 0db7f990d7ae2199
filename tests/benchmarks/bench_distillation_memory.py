"""What a step of distillation holds at its peak, over the sum of what its roles need alone.

    python tests/benchmarks/bench_distillation_memory.py [--recipe distill/dmd2-smoke] [--data data/digits] [K=V ...]

A teacher of the recipe's size is trained for one step first, since its weights do not matter here. What a role needs is
said in ``tests/role_memory.py``: parameters, optimizer state and averages, and the peak of its own forward and backward
passes with the gradients of its parameters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from latent_cases import train_run
from role_memory import measure_memory
from sixfold.recipe.load import load_recipe

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="distill/dmd2-smoke")
    parser.add_argument("--data", default="data/digits")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    data = f"data.path={options.data}"
    with tempfile.TemporaryDirectory() as folder:
        teacher = load_recipe("distill/teacher-smoke", [data, "tracking.type=jsonl"]).recipe
        run = train_run(teacher, Path(folder) / "teacher", steps=1)
        runs = [f"networks.{name}.run={run}" for name in ("teacher", "denoiser")]
        found = measure_memory(load_recipe(options.recipe, [data, *runs, *options.overrides]).recipe)
    print(f"{'role':<16}{'held MiB':>10}{'computing MiB':>15}")
    for role, need in found.needs.items():
        print(f"{role:<16}{need.held_bytes / MIB:>10.2f}{need.computing_bytes / MIB:>15.2f}")
    print(f"peak of the step {found.peak_bytes / MIB:.2f} MiB, {found.ratio:.2f} of the sum of needs")


if __name__ == "__main__":
    main()
