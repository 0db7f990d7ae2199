"""One recipe, submitted to every kind of cluster: the same losses and MLflow runs, and a secret that nobody sees."""

import json
import os
from pathlib import Path

import pytest

from cluster_jobs import (
    PATIENCE_S,
    REFERENCE,
    STEPS,
    attempts,
    files_holding,
    losses,
    mirrored,
    wait_for,
)

TWO = ("ranks.minimum=2", "ranks.maximum=2", "placement=SPREAD")
KINDS = {
    "local": ("ranks=2",),
    "slurm": ("nodes=2",),
    "ray": TWO,
    "slurm-ray": ("nodes=2", *TWO),
}


def test_one_recipe_trains_alike_on_every_kind(slurm_cluster, nodes, submit, reference, workplace, tmp_path_factory):
    planted = "planted-" + os.urandom(8).hex()
    secrets = tmp_path_factory.mktemp("secrets")
    (secrets / "STORE_PASSWORD").write_text(planted)
    (secrets / "STORE_PASSWORD").chmod(0o600)
    with_secret = ("secrets=[STORE_PASSWORD]", f"secrets_folder={secrets}")
    jobs = {kind: submit(kind, *REFERENCE, settings=(*own, *with_secret)) for kind, own in KINDS.items()}
    for rank in nodes.wait_for_ranks(jobs["ray"], 2):
        assert planted.encode() not in Path(f"/proc/{rank.pid}/environ").read_bytes()
    jobs["slurm-ray"].wait_for_step(1)
    (token,) = jobs["slurm-ray"].run.glob(".ray-*-token")
    assert token.stat().st_mode & 0o777 == 0o600
    for job in jobs.values():
        job.wait_until_finished()
        job.wait_until_gone()
    assert not token.exists()

    shape = mirrored(reference.run, workplace)
    assert sorted(shape["points"]["train/loss"]) == list(range(1, STEPS + 1))
    for kind, job in jobs.items():
        assert losses(job.run) == pytest.approx(losses(reference.run), rel=1e-5), kind
        assert mirrored(job.run, workplace) == shape, kind
        assert attempts(job.run) == [0], kind

    shown = [
        slurm_cluster("scontrol", "show", "job", "--details", jobs[kind].cluster_id) for kind in ("slurm", "slurm-ray")
    ]
    dashboard = json.dumps(nodes.cluster.server.job(jobs["ray"].cluster_id))
    assert [text for text in (*shown, dashboard) if planted in text] == []
    assert list((workplace / "runs/.code").iterdir()), "there are snapshots to look into"
    places = [workplace, slurm_cluster.state, os.environ["SIXFOLD_STATE"], nodes.cluster.temporary]
    assert files_holding([planted.encode()], places) == []
    wait_for(slurm_cluster.is_idle, "an allocation is held", PATIENCE_S)
