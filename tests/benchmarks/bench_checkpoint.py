"""How much a training step waits for checkpoints: the recipe's own loop, saving and not saving, in turn.

    python tests/benchmarks/bench_checkpoint.py --recipe lm/moe-smoke --data data/stdlib [KEY=VALUE ...]

Prints the median step while nothing is written, while a save is in flight, the stall of each save, and the share of
training time that saving every ``--every`` steps costs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from sixfold.distributed.process_group import World
from sixfold.recipe.load import load_recipe
from sixfold.train.assembly import assemble, open_checkpointer
from sixfold.train.hooks import SavedExtra
from sixfold.train.loop import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lm/moe-smoke")
    parser.add_argument("--data", default="data/stdlib")
    parser.add_argument("--every", type=int, default=20, help="steps between saves")
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, [f"data.path={options.data}", *options.overrides]).recipe
    training = assemble(recipe, World())
    idle, busy, stalls = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = open_checkpointer(recipe, World(), Path(folder))
        for step in range(1, options.every * (options.saves + 1) + 1):
            in_flight = checkpointer._thread is not None and checkpointer._thread.is_alive()
            started = time.perf_counter()
            training.progress = train_step(training, next(training.stream)).progress
            (busy if in_flight else idle).append(time.perf_counter() - started)
            if step % options.every == 0:
                states = {role: engine.checkpoint_state() for role, engine in training.engines.items()}
                extra = SavedExtra(samples=training.progress.samples, data=training.stream.state())
                stalls.append(checkpointer.save(step, states, extra.model_dump(mode="json")).stall_s)
            checkpointer.poll()
        checkpointer.close()
    median, stall = statistics.median(idle[5:]), statistics.median(stalls[1:])
    print(f"step, nothing in flight: {1e3 * median:.1f} ms (median of {len(idle) - 5})")
    if busy:
        print(f"step, save in flight:    {1e3 * statistics.median(busy):.1f} ms (median of {len(busy)})")
    print(f"stall of one save:       {1e3 * stall:.1f} ms (first {1e3 * stalls[0]:.1f} ms)")
    print(f"cost of saving every {options.every} steps: {100 * stall / (options.every * median):.2f}% of training time")


if __name__ == "__main__":
    main()
