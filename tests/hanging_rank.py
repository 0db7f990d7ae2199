"""A rank's entry in which rank 1 falls asleep in its third step, once a run folder."""

import os
import sys
import time
from pathlib import Path

from sixfold.train import rank


def sleep_in_the_third_step() -> None:
    """Make rank 1's objective sleep at its third call, unless an earlier attempt did."""
    from sixfold.objectives.denoising.objective import Denoising

    asleep, compute, calls = Path(sys.argv[1]) / "slept", Denoising.__call__, 0

    def call(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 3 and not asleep.exists():
            asleep.touch()
            fall_asleep()
        return compute(self, *arguments)

    if os.environ["RANK"] == "1":
        Denoising.__call__ = call


def fall_asleep() -> None:
    """Stand still, in a function that the stack shows by name."""
    time.sleep(1000.0)


if __name__ == "__main__":
    sleep_in_the_third_step()
    rank.main()
