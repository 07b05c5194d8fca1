"""What is in `cluster/` for Ray's launcher, Kubernetes, Docker and MLflow: each by its own tool's or schema's word."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from finhpc import __version__

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
KUBERNETES = "1.32"
KUBERAY = ("kuberay-cluster.yaml", "kuberay-job.yaml", "kuberay-service.yaml")
SCHEMA = Draft202012Validator(yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text()))


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def test_the_page_says_when_to_take_which_file() -> None:
    page = (CLUSTER / "README.md").read_text()
    missing = [
        path.name for path in CLUSTER.iterdir() if path.name not in page and path.suffix not in (".md", ".dockerignore")
    ]
    assert not missing


# -- ray up ---------------------------------------------------------------------------------


def test_ray_up_takes_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read("ray-up.yaml"))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [line for line in commands if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)


def test_ray_up_would_refuse_a_mistyped_key() -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read("ray-up.yaml") | {"head_start_commands": []})
    with pytest.raises(ValidationError, match="head_start_commands"):
        validate_config(config)


# -- Kubernetes -----------------------------------------------------------------------------


def cluster_of(manifest: dict[str, Any]) -> Any:
    """The part of a RayCluster, RayJob or RayService that describes the cluster."""
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a RayCluster, RayJob or RayService: its own fields, and its pods by Kubernetes' schema."""
    found = [f"{error.json_path}: {error.message}" for error in SCHEMA.iter_errors(manifest)]
    spec = cluster_of(manifest)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        try:
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(str(error.message))
    return found


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_the_manifest(name: str) -> None:
    assert problems(read(name)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("headGroupSpec.rayStartParams.num-cpus", 0),  # KubeRay wants text
        ("headGroupSpec.replicas", 1),
        ("authOptions.mode", "on"),
        ("workerGroupSpecs.0.minreplicas", 1),
        ("workerGroupSpecs.0.template.spec.containers.0.images", "finhpc"),
        ("workerGroupSpecs.0.template.spec.volumes.0.persistentVolumeClaim", {"claim": "x"}),
    ],
)
def test_a_wrong_field_would_be_refused(path: str, value: object) -> None:
    manifest = copy.deepcopy(read(KUBERAY[0]))
    *where, last = path.split(".")
    at = manifest["spec"]
    for key in where:
        at = at[int(key)] if key.isdigit() else at[key]
    at[last] = value
    assert problems(manifest)


@pytest.mark.parametrize("name", KUBERAY)
def test_ray_on_kubernetes_asks_for_a_token_and_shares_a_volume(name: str) -> None:
    manifest = read(name)
    spec = cluster_of(manifest)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == version("ray")
    claim = read("kuberay-volume.yaml")
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {"name": "shared", "mountPath": "/shared"} in pod["containers"][0]["volumeMounts"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert pod["containers"][0]["image"] == f"finhpc:{__version__}"
        assert f"--uid {pod['securityContext']['fsGroup']} " in (CLUSTER / "Dockerfile").read_text()
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"]


def test_the_rayjobs_command_is_one_that_finhpc_takes(tmp_path: Path) -> None:
    from finhpc.cli import parse
    from finhpc.settings.base import load
    from finhpc.settings.pretrain import PretrainConfig

    words = read("kuberay-job.yaml")["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "/opt/finhpc/jobs/pretrain.py"]
    options, overrides, problems = parse(words[2:], PretrainConfig)
    assert not problems
    settings = load(PretrainConfig, options["config"], overrides)
    assert (
        settings.parallel.workers
        == read("kuberay-job.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    )


def test_serve_takes_the_rayservices_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    from finhpc.serving.token import VARIABLE
    from finhpc.settings.base import load
    from finhpc.settings.serve import ServeConfig

    manifest = read("kuberay-service.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, function = application.import_path.partition(":")
    assert callable(getattr(import_module(module), function))
    settings = load(ServeConfig, None, application.args)
    (workers,) = cluster_of(manifest)["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert settings.state is not None
    assert all(path.startswith("/shared/") for path in (settings.model, settings.state))
    assert settings.replicas == workers["replicas"]
    assert settings.resources.cpus_per_worker == float(container["resources"]["limits"]["cpu"])
    assert settings.drain_s < pod["terminationGracePeriodSeconds"]
    assert {"containerPort": config.http_options.port, "name": "serve"} in container["ports"]
    (token,) = (each for each in container["env"] if each["name"] == VARIABLE)
    comment = (CLUSTER / "kuberay-service.yaml").read_text().split("spec:")[0]
    assert token["valueFrom"]["secretKeyRef"]["name"] in comment
    assert "value" not in token, "no token in the file"


# -- containers -----------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_container_file() -> None:
    done = subprocess.run([BIN / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


def test_the_container_file_copies_what_is_there_and_sent() -> None:
    copied = [
        word
        for line in (CLUSTER / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "finhpc", "jobs"} <= set(copied)
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in sent, "the rest of the project is not sent to the builder"


def test_the_compose_file_follows_its_schema() -> None:
    words = ["--builtin-schema", "vendor.compose-spec", str(CLUSTER / "mlflow-compose.yaml")]
    done = subprocess.run([BIN / "check-jsonschema", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    compose = read("mlflow-compose.yaml")
    assert compose["services"]["mlflow"]["ports"] == ["${MLFLOW_ADDRESS:-127.0.0.1}:5000:5000"]
    assert f"mlflow=={version('mlflow')}" in compose["services"]["mlflow"]["build"]["dockerfile_inline"]
    assert not re.search(r"PASSWORD: ", (CLUSTER / "mlflow-compose.yaml").read_text()), "no password in the file"
