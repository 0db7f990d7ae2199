"""What would be submitted to Ray, how many ranks a job gets, and what nodes are started with."""

import dataclasses
import json
import os
import subprocess
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold.errors import EnvironmentFault, RecipeError, UserError
from sixfold_launchers import ray_cluster, ray_server
from sixfold_launchers.contract import JobRecord, JobSpec, RunSpec, launcher_of
from sixfold_launchers.job_book import JobBook, reconcile
from sixfold_launchers.profile_files import load_profile
from sixfold_launchers.profiles import ElasticRanks, RayProfile
from sixfold_launchers.ray_cluster import RayCluster, RayNode, node_arguments
from sixfold_launchers.ray_jobs import room_faults
from sixfold_launchers.ray_node import Place, head_arguments, make_own_folder, worker_arguments
from sixfold_launchers.ray_order import Order, Requests, choose_ranks, rank_numbers
from sixfold_launchers.ray_server import RayServer, packed

GOLDEN = Path(__file__).parent / "golden"
SPEC = JobSpec(
    job_id="j1",
    folder=Path("/shared/runs/.jobs/j1"),
    runs=(RunSpec(folder=Path("/shared/runs/lm/moe-smoke/j1"), recipe="lm/moe-smoke"),),
    directory=Path("/shared"),
    python="/opt/python",
    code=Path("/shared/runs/.code/c-t"),
)
ELASTIC = ["ranks.minimum=2", "ranks.maximum=8", "secrets=[API_TOKEN]", "environment.NOTE=hello"]


@pytest.mark.parametrize("name", ["ray", "slurm-ray"])
def test_the_submission_is_the_golden_one(name):
    profile = load_profile(name, ELASTIC).profile
    submission = launcher_of(profile).render(SPEC)
    assert submission == launcher_of(profile).render(SPEC), "rendering is pure"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("SIXFOLD_REWRITE_GOLDEN"):
        golden.write_text(submission.text() + "\n")
    assert submission.text() + "\n" == golden.read_text()
    for file, text in submission.files.items():
        if file.endswith(".sbatch"):
            assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_slurm_ray_s_ranks_hear_of_a_limit_by_a_file_and_its_next_turn_forgets_it():
    script = (GOLDEN / "slurm-ray.txt").read_text()
    assert 'tell() { printf stop > "$run/request"; }' in script
    assert 'rm -f "$run/outcome" "$run/request"' in script


def test_secrets_stay_out_of_what_the_dashboard_shows():
    job = json.loads(launcher_of(load_profile("ray", ELASTIC).profile).render(SPEC).files["ray-job.json"])
    assert "API_TOKEN" not in json.dumps(job)
    assert job["runtime_env"]["env_vars"] == {"NOTE": "hello", "PYTHONPATH": "platform:launchers:data_pipelines"}


def test_an_order_comes_back_from_its_file(tmp_path):
    text = launcher_of(load_profile("slurm-ray", ELASTIC).profile).render(SPEC).files["ray.json"]
    (tmp_path / "ray.json").write_text(text)
    order = Order.read(tmp_path / "ray.json")
    assert order.dump() == text
    assert order.runs == (SPEC.runs[0].folder,)
    with pytest.raises(EnvironmentFault, match="cannot be read on this node"):
        Order.read(tmp_path / "elsewhere" / "ray.json")


@settings(deadline=None)
@given(lanes=st.integers(1, 96), bounds=st.tuples(st.integers(1, 20), st.integers(1, 20)), room=st.integers(0, 40))
def test_ranks_divide_the_lanes_and_fill_the_room(lanes, bounds, room):
    low, high = sorted(bounds)
    profile = RayProfile(type="ray", ranks=ElasticRanks(minimum=low, maximum=high))
    possible = [number for number in range(low, high + 1) if lanes % number == 0]
    if not possible:
        with pytest.raises(RecipeError, match=f"divides {lanes} lanes"):
            rank_numbers(profile, lanes)
        return
    ranks = choose_ranks(rank_numbers(profile, lanes), room)
    assert ranks in possible
    assert all(number > room or number <= ranks for number in possible)
    assert ranks <= room or ranks == possible[0], "too small a cluster is asked for the smallest group"


def test_twelve_lanes_on_shrinking_and_growing_clusters():
    numbers = rank_numbers(load_profile("ray", ["ranks.minimum=2", "ranks.maximum=6"]).profile, 12)
    assert numbers == (2, 3, 4, 6)
    assert [choose_ranks(numbers, room) for room in (9, 5, 3, 2, 1)] == [6, 4, 3, 2, 2]


def test_a_users_stop_outranks_the_launchers_regrouping(tmp_path):
    requests = Requests(tmp_path)
    assert requests.read() is None
    requests.make("regroup")
    requests.make("stop")
    requests.make("regroup")
    assert requests.read() == "stop"
    requests.clear("regroup")
    assert requests.read() == "stop"
    requests.clear("stop")
    assert requests.read() is None


def test_room_is_counted_by_whole_ranks_on_single_nodes():
    profile = load_profile("ray", ["ranks.minimum=4", "ranks.maximum=4", "cpus_per_rank=2", "gpus_per_rank=1"]).profile
    nodes = [{"resources_total": {"CPU": 7.0, "GPU": 2.0}}, {"resources_total": {"CPU": 8.0, "GPU": 1.0}}]
    (fault,) = room_faults(profile, nodes)
    assert "room for 3 ranks" in fault.what
    assert room_faults(profile, [*nodes, {"resources_total": {"CPU": 2.0, "GPU": 8.0}}]) == []
    assert "room for 0 ranks" in room_faults(profile, [{"resources_total": {"CPU": 64.0}}])[0].what


def test_jobs_and_nodes_of_one_host_share_no_port_and_no_folder():
    profile = load_profile("slurm-ray", []).profile
    places = [Place(job=job, attempt=0, node=node, nodes=3) for job in (17, 18) for node in range(3)]
    ports, folders = [], set()
    for place in places:
        arguments = (
            head_arguments(place, profile, "10.0.0.1")
            if place.node == 0
            else worker_arguments(place, profile, "10.0.0.1", "10.0.0.1:1")
        )
        options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
        ports += [int(value) for name, value in options.items() if name.endswith("port") and value != "0"]
        folders.add(options["temp-dir"])
    assert len(set(ports)) == len(ports) == 2 * (3 + 3)
    assert len(folders) == len(places)
    again = dataclasses.replace(places[0], attempt=1)
    assert {again.port(offset) for offset in range(16)}.isdisjoint(places[0].port(offset) for offset in range(16))
    assert len(str(places[0].temporary) + "/session_2026-11-22_01-21-09_832038_4194304/sockets/plasma_store") < 107


def test_users_and_clusters_on_one_host_share_no_folder(tmp_path, monkeypatch):
    place = Place(cluster="a", job=17, attempt=0, node=0, nodes=1)
    mine = place.temporary
    assert dataclasses.replace(place, cluster="b").temporary != mine
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert place.temporary != mine
    monkeypatch.undo()

    folder = tmp_path / "own"
    make_own_folder(folder)
    (folder / "left").touch()
    make_own_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []
    (tmp_path / "theirs").symlink_to(folder)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    for taken in (folder, tmp_path / "theirs"):
        with pytest.raises(EnvironmentFault, match="cannot be made"):
            make_own_folder(taken)


def test_an_attempt_removes_what_killed_ones_left_and_nothing_else():
    job = 10**9 + os.getpid()
    first = Place(cluster="a", job=job, attempt=0, node=1, nodes=2)
    again, another = dataclasses.replace(first, attempt=2), dataclasses.replace(first, job=job + 1)
    folders = [place.temporary for place in (first, again, another)]
    try:
        for folder in folders:
            make_own_folder(folder)
        dataclasses.replace(again, node=0).remove_left_behind()
        assert [folder.exists() for folder in folders] == [False, True, True]
    finally:
        for folder in folders[1:]:
            folder.rmdir()


def test_nodes_get_the_machine_s_variables_and_no_secret():
    shell = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": "http://m", "LC_ALL": "C"}
    hidden = {"AWS_SECRET_ACCESS_KEY": "x", "MLFLOW_TRACKING_PASSWORD": "x", "HF_TOKEN": "x", "MY_NOTES": "x"}
    assert ray_cluster.passed_on(shell | hidden) == shell


def test_nodes_of_a_local_cluster_have_addresses_of_their_own(tmp_path):
    cluster = RayCluster(
        folder=str(tmp_path), mark="m", temporary="/tmp/r", port=1, dashboard_port=2, client_port=3, cpus_per_node=4
    )
    head, other = (RayNode(number=n, pid=0, started_s=0.0, agent_port=9 + n) for n in range(2))
    assert "--head" in node_arguments(cluster, head)
    assert "--node-ip-address=127.0.0.2" in node_arguments(cluster, head)
    assert "--address=127.0.0.2:1" in node_arguments(cluster, other)
    assert "--node-ip-address=127.0.0.3" in node_arguments(cluster, other)
    assert ray_cluster.down(tmp_path) == 0


def test_equal_trees_make_equal_packages_whatever_their_times(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "platform").mkdir(parents=True)
        (tmp_path / name / "platform" / "code.py").write_text("x = 1\n")
        (tmp_path / name / "run").write_text("#!/bin/sh\n")
        (tmp_path / name / "run").chmod(0o755)
    os.utime(tmp_path / "b" / "run", (0, 0))
    assert packed(tmp_path / "a") == packed(tmp_path / "b")
    (tmp_path / "b" / "run").chmod(0o644)
    assert packed(tmp_path / "a") != packed(tmp_path / "b")
    assert zipfile.ZipFile(BytesIO(packed(tmp_path / "a"))).namelist() == ["platform/code.py", "run"]


def test_too_large_a_snapshot_is_refused_before_it_is_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_server, "MAX_PACKAGE_BYTES", 10)
    (tmp_path / "weights").write_bytes(b"0" * 11)
    with pytest.raises(UserError, match="keep large files out of git"):
        packed(tmp_path)


def unconfirmed_job(profile):
    """A job whose submission began, and of which no more is known."""
    return JobRecord(
        job_id="j1",
        key=None,
        digest="d",
        kind="ray",
        cluster_id=None,
        profile_name="ray",
        profile=profile,
        spec=SPEC,
        state="submitting",
        submitted_s=time.time(),
    )


def test_another_server_is_no_cluster_and_leaves_no_job(tmp_path, some_server):
    server = RayServer(some_server, None)
    for ask in (server.nodes, server.jobs, server.version, lambda: server.job("j1"), lambda: server.submit({})):
        with pytest.raises(EnvironmentFault, match=r"no Ray dashboard(.|\n)*check the host and port"):
            ask()
    job = unconfirmed_job(load_profile("ray", [f"address={some_server}"]).profile)
    book = JobBook(tmp_path)
    book.begin(job)
    [(now, fault)] = reconcile(book, book.jobs())
    assert now == job
    assert "no Ray dashboard" in str(fault)


def test_what_never_reached_the_cluster_cannot_be_cancelled_or_requeued(tmp_path):
    profile = load_profile("ray", ["address=http://127.0.0.1:9"]).profile
    job = unconfirmed_job(profile)
    launcher = launcher_of(profile)
    for act in (launcher.cancel, launcher.requeue, launcher.status):
        with pytest.raises(UserError, match="not known to have reached its cluster"):
            act(job)


@pytest.fixture
def some_server():
    """The address of a web server that is no dashboard: it answers 404 to everything."""
    handler = type("Handler", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        handler.do_GET = handler.do_POST = lambda self: self.send_error(404)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_dead_cluster_is_named_with_the_fix(tmp_path, monkeypatch):
    with pytest.raises(EnvironmentFault, match=r"does not answer(.|\n)*ray up"):
        RayServer("http://127.0.0.1:9", None).nodes()
    monkeypatch.setenv("SIXFOLD_STATE", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="none is up on this machine"):
        launcher_of(load_profile("ray", []).profile).check(SPEC)
