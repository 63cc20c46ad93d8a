"""The PyTorchJob manifests: fields that there are, ranks and paths that fit the config that they start."""

from pathlib import Path

import pytest
import yaml

from glm_rlhf.engine.cli import COMMANDS
from glm_rlhf.engine.config.load import load_config
from glm_rlhf.parallel.spec.layout import Layout

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
MANIFESTS = {path.stem: path for path in sorted(LAUNCH.glob("*.yaml"))}
RANKS = {"chatglm3_6b_8gpu": 8, "glm4_9b_64gpu": 64}

# Of kubeflow.org/v1 PyTorchJob and of a pod: the fields that are used, each with its kind.
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str}],
    "securityContext": {"capabilities": {"add": [str]}},
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
VOLUME = {
    "name": str,
    "persistentVolumeClaim": {"claimName": str},
    "emptyDir": {"medium": str, "sizeLimit": str},
}
POD = {
    "terminationGracePeriodSeconds": int,
    "securityContext": {"fsGroup": int},
    "containers": [CONTAINER],
    "volumes": [VOLUME],
}
FIELDS = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "nprocPerNode": str,
        "elasticPolicy": {
            "rdzvBackend": str,
            "minReplicas": int,
            "maxReplicas": int,
            "maxRestarts": int,
        },
        "runPolicy": {"cleanPodPolicy": str},
        "pytorchReplicaSpecs": {
            "Worker": {"replicas": int, "restartPolicy": str, "template": {"spec": POD}},
        },
    },
}


def faults(value: object, fields: object, place: str = "") -> list[str]:
    """What is of another kind than the field, or in no field."""
    if isinstance(fields, type):
        return [] if type(value) is fields else [f"{place} is {value!r}, a {fields.__name__} is required"]
    if isinstance(fields, list):
        if not isinstance(value, list):
            return [f"{place} is no list"]
        return [fault for one in value for fault in faults(one, fields[0], f"{place}[]")]
    if not isinstance(value, dict):
        return [f"{place} is no mapping"]
    found = [f"{place}.{name} is no field" for name in value.keys() - fields.keys()]
    for name in value.keys() & fields.keys():
        found += faults(value[name], fields[name], f"{place}.{name}")
    return found


def read(name: str) -> tuple[dict, dict, dict]:
    """A manifest's job, worker and container."""
    (job,) = yaml.safe_load_all(MANIFESTS[name].read_text(encoding="utf-8"))
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    return job, worker, container


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_one_of_the_kind(name):
    job, worker, container = read(name)
    assert faults(job, FIELDS) == []
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert container["name"] == "pytorch"  # the operator sets the environment of the container of this name
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert job["spec"]["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")


@pytest.mark.parametrize("name", MANIFESTS)
def test_ranks_fit_the_config_and_paths_are_mounted(name):
    job, worker, container = read(name)
    per_node, elastic = int(job["spec"]["nprocPerNode"]), job["spec"]["elasticPolicy"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == per_node
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    assert per_node * worker["replicas"] == RANKS[name]

    assert container["command"] == ["torchrun"]
    module, command, path, *overrides = container["args"][1:]
    assert (container["args"][0], module) == ("-m", "glm_rlhf.engine")
    (found,) = (one for one in COMMANDS if one.name == command)
    config = load_config(found.config, ROOT / path, overrides)
    axes = config.parallel
    layout = Layout(
        tp=axes.tp, pp=axes.pp, vpp=axes.vpp, cp=axes.cp, sequence_parallel=axes.sequence_parallel
    )
    assert layout.dp(RANKS[name]) >= 1

    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    places = [mount["mountPath"] for mount in mounts.values()]
    paths = (config.model.path, config.reward.path, config.data.path, config.data.sft_path, config.run.output)
    for path in paths:
        assert any(path.startswith(f"{place}/") for place in places), path
    written = [mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")]
    assert any(config.run.output.startswith(f"{place}/") for place in written)


def test_a_wrong_field_is_found():
    job, _, container = read("glm4_9b_64gpu")
    container["resource"] = container.pop("resources")
    job["spec"]["nprocPerNode"] = 8
    assert sorted(faults(job, FIELDS)) == [
        ".spec.nprocPerNode is 8, a str is required",
        ".spec.pytorchReplicaSpecs.Worker.template.spec.containers[].resource is no field",
    ]


def test_the_image_is_the_one_that_the_dockerfile_says_how_to_build():
    head = (LAUNCH / "Dockerfile").read_text(encoding="utf-8").partition("\nARG")[0]
    for name in MANIFESTS:
        assert f"-t {read(name)[2]['image']} ." in head
