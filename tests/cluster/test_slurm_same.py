"""One recipe, here and on Slurm: the same losses, the same MLflow run."""

import pytest

from cluster_jobs import PATIENCE_S, REFERENCE, STEPS, attempts, losses, mirrored, wait_for

pytestmark = pytest.mark.timeout(1200)


def test_slurm_trains_what_this_machine_trains(slurm_cluster, submit, reference, workplace):
    job = submit("slurm", *REFERENCE, settings=("nodes=2",))
    job.wait_until_finished()
    here, there = losses(reference.run), losses(job.run)
    assert sorted(here) == sorted(there) == list(range(1, STEPS + 1))
    assert all(abs(there[step] - loss) <= 1e-5 * abs(loss) for step, loss in here.items())
    assert mirrored(job.run, workplace) == mirrored(reference.run, workplace)
    assert attempts(job.run) == [0]
    wait_for(lambda: job.state() == "finished", "Slurm did not end the job", PATIENCE_S, job)
    assert slurm_cluster("squeue", "--noheader", f"--jobs={job.cluster_id}", "--states=R") == ""
