"""Every manifest in infra/ parses, follows its schema, and agrees with the code and with itself."""

import copy
import importlib.metadata
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from sixfold_launchers.ray_order import DRIVER_MODULE

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERAY = jsonschema.Draft202012Validator(json.loads((INFRA / "ray" / "kuberay.schema.json").read_text()))
MANIFESTS = sorted((INFRA / "ray").glob("*.yaml"))


def cluster_of(manifest):
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]


def pods_of(cluster):
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kuberay_manifests_follow_their_schema_and_agree_with_themselves(path):
    manifest = yaml.safe_load(path.read_text())
    KUBERAY.validate(manifest)
    cluster = cluster_of(manifest)
    assert cluster["rayVersion"] == importlib.metadata.version("ray"), "the version that the launcher was proved on"
    pods = pods_of(cluster)
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert len(images) == 1, "Ray refuses nodes of another version"
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"], "never evicted for memory"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("damage", ["typo", "latest", "number", "missing"])
def test_the_schema_refuses_mistakes(path, damage):
    manifest = copy.deepcopy(yaml.safe_load(path.read_text()))
    worker = cluster_of(manifest)["workerGroupSpecs"][0]
    container = worker["template"]["spec"]["containers"][0]
    if damage == "typo":
        worker["minReplica"] = worker.pop("minReplicas")
    elif damage == "latest":
        container["image"] = "registry.example.org/sixfold:latest"
    elif damage == "number":
        cluster_of(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    else:
        del container["resources"]["limits"]
    assert not KUBERAY.is_valid(manifest)


def test_a_standing_cluster_asks_for_its_token_on_every_node_and_a_job_runs_the_driver():
    cluster = yaml.safe_load((INFRA / "ray" / "raycluster.yaml").read_text())["spec"]
    for pod in pods_of(cluster):
        (container,) = pod["containers"]
        variables = {each["name"]: each["value"] for each in container["env"]}
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert variables["RAY_AUTH_MODE"] == "token"
        assert str(Path(variables["RAY_AUTH_TOKEN_PATH"]).parent) in mounted
    job = yaml.safe_load((INFRA / "ray" / "rayjob.yaml").read_text())["spec"]
    assert job["entrypoint"].startswith(f"python -m {DRIVER_MODULE} /shared/")


def test_the_compose_file_hangs_together_and_holds_no_password():
    text = (INFRA / "mlflow" / "compose.yaml").read_text()
    compose = yaml.safe_load(text)
    services = compose["services"]
    assert {"database", "store", "server"} <= services.keys()
    for name, service in services.items():
        if "image" in service:
            tag = service["image"].partition(":")[2]
            assert re.search(r"\d", tag), f"{name}'s image is not pinned"
        else:
            build = service["build"]
            assert (INFRA / "mlflow" / build["context"] / build["dockerfile"]).resolve().is_file()
        assert set(service.get("secrets", [])) <= compose["secrets"].keys()
        assert {mount.partition(":")[0] for mount in service.get("volumes", [])} <= compose["volumes"].keys()
        for needed, condition in service.get("depends_on", {}).items():
            healthy = condition["condition"] == "service_healthy"
            assert not healthy or "healthcheck" in services[needed]
        for variable, value in service.get("environment", {}).items():
            assert "PASSWORD" not in variable or (variable.endswith("_FILE") and value.startswith("/run/secrets/"))
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert all(secret["file"].startswith("secrets/") for secret in compose["secrets"].values())
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", INFRA / "mlflow/secrets/store-password"], check=False, cwd=ROOT
    )
    assert ignored.returncode == 0, "password files must never be committed"


@pytest.mark.parametrize("path", sorted((INFRA / "containers").glob("*.Containerfile")), ids=lambda path: path.stem)
def test_container_files_are_pinned_unprivileged_and_copy_what_exists(path):
    lines = [line.strip() for line in path.read_text().replace("\\\n", " ").splitlines()]
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    instructions = [name for name, _ in steps]
    assert set(instructions) <= {"FROM", "RUN", "ENV", "COPY", "USER", "WORKDIR", "EXPOSE", "CMD", "ENTRYPOINT"}
    assert instructions[0] == "FROM"
    assert re.search(r":[^ ]*\d", steps[0][1])
    assert "USER" in instructions
    assert [argument for name, argument in steps if name == "USER"][-1] not in ("root", "0")
    for name, argument in steps:
        if name == "COPY":
            *sources, _ = argument.split()
            assert all((ROOT / source).exists() for source in sources)
        if name == "RUN" and "/src[" in argument:
            extras = re.search(r"/src\[([a-z,]+)\]", argument)[1].split(",")
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert set(extras) <= project["optional-dependencies"].keys()
        if name in ("CMD", "ENTRYPOINT"):
            assert isinstance(json.loads(argument), list), "a shell in between would keep signals from the process"


def test_systemd_takes_the_unit(tmp_path):
    text = (INFRA / "systemd" / "sixfold-mlflow.service").read_text()
    command = re.search(r"^ExecStart=(\S+)", text, re.MULTILINE)[1]
    assert (ROOT / Path(command).relative_to("/opt/sixfold")).stat().st_mode & 0o111
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd here to verify the unit")
    unit = tmp_path / "sixfold-mlflow.service"
    unit.write_text(text.replace("/opt/sixfold/infra", str(INFRA)))
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert complaints == []
    unit.write_text(text.replace("Type=exec", "Type=execute").replace("/opt/sixfold/infra", str(INFRA)))
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)
    assert unit.name in done.stderr, "a broken unit is noticed"
