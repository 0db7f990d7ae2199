"""The entry of a rank's process: ``python -m sixfold.train.rank RUN_FOLDER``, which a launcher starts.

It listens for requests to stop before it imports what takes seconds to import: a preemption may come at any moment, and
a rank that dies of one in its first seconds would look like a crash.
"""

from __future__ import annotations

import signal

from sixfold.distributed.stop_signals import STOP_SIGNALS


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that the loop reads at step boundaries.

    A launcher may start the process with these signals blocked; those that came meanwhile are heard now.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._request)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True

    def __call__(self) -> bool:
        """Whether to save and end at the next step boundary."""
        return self.requested


def main() -> None:
    """Listen, then work on the run folder named on the command line."""
    stop_requested = StopRequest()
    from sixfold.train import worker

    worker.main(stop_requested)


if __name__ == "__main__":
    main()
