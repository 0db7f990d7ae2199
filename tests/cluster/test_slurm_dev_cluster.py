"""The one-command Slurm: several beside each other, mended when a part ends, and gone without a trace."""

import os
import signal
import subprocess

from cluster_jobs import processes_naming, wait_for


def test_a_second_cluster_stands_beside_the_first_and_leaves_nothing(slurm_cluster, tmp_path):
    command, state = slurm_cluster.command, tmp_path / "second"
    up = subprocess.run([command, "up", "--nodes", "1", "--state", state], capture_output=True, text=True, check=True)
    assert f"export SLURM_CONF={state}/slurm.conf" in up.stdout
    second = type(slurm_cluster)(state)
    environment = {**os.environ, "SLURM_CONF": f"{state}/slurm.conf"}
    ran = subprocess.run(["srun", "printenv", "SLURMD_NODENAME", "SLURM_CLUSTER_NAME"], env=environment,
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert ran.stdout.split() == ["n1", "dev-second"]

    os.kill(second.daemon("n1"), signal.SIGKILL)
    wait_for(lambda: "n1         pid" in status(command, state) and "ENDED" in status(command, state), "n1 lives", 10)
    mended = subprocess.run([command, "up", "--state", state], capture_output=True, text=True, check=True)
    assert "started again: n1" in mended.stdout
    assert "ENDED" not in status(command, state)

    sleeping = subprocess.Popen(["srun", "sleep", "1000"], env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: "sleep" in subprocess.run(["squeue", "--noheader", "--format=%j"], env=environment,
             capture_output=True, text=True, check=True).stdout, "no job began", 20)  # fmt: skip
    subprocess.run([command, "down", "--state", state], check=True)
    assert sleeping.wait(timeout=30) != 0
    assert processes_naming(state) == []
    assert subprocess.run([command, "status", "--state", state], capture_output=True, check=False).returncode == 3
    assert "ENDED" not in status(command, slurm_cluster.state), "the first is as it was"


def status(command, state):
    return subprocess.run([command, "status", "--state", state], capture_output=True, text=True, check=True).stdout
