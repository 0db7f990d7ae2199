"""Ray inside a Slurm allocation: its token is the user's alone, and no part of it outlives its keeper."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cluster_jobs import PATIENCE_S, processes_naming, processes_of_sessions, session_of, wait_for


def test_a_ray_whose_keeper_is_killed_leaves_no_process(tmp_path):
    """What Slurm does in the end to a step that does not go by itself, and a power failure at once."""
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, tmp_path], env={**os.environ, "SLURM_JOB_ID": "1"})
    folder = Path(f"/tmp/sfray-test-{keeper.pid}")
    try:
        wait_for(lambda: processes_naming(f"{folder}/session"), "no raylet came up", PATIENCE_S)
        sessions = [session_of(process) for process in processes_naming(folder)]
        keeper.kill()
        keeper.wait()
        wait_for(lambda: not processes_of_sessions(sessions), "Ray outlives its keeper", PATIENCE_S)
    finally:
        keeper.kill()
        shutil.rmtree(folder, ignore_errors=True)


KEEPER = """
import os, sys, time
from pathlib import Path
from sixfold_launchers.profile_files import load_profile
from sixfold_launchers.ray_cluster import write_token
from sixfold_launchers.ray_node import Meeting, Place, Ray, head_arguments, own_address
place = Place(job=os.getpid(), attempt=0, node=0, nodes=1)
meeting = Meeting(Path(sys.argv[1]), place)
write_token(meeting.token)
arguments = head_arguments(place, load_profile("slurm-ray").profile, own_address())
Ray([f"--temp-dir=/tmp/sfray-test-{os.getpid()}" if "temp-dir" in each else each for each in arguments], meeting)
time.sleep(1000)
"""
