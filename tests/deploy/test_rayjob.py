"""deploy/rayjob.yaml against the fields that KubeRay knows and our own rules; its command against our config."""

import importlib.util
import json
import shlex
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import cluster_lints as lints
import jsonschema
import pytest
import yaml
from paths import ROOT

from dinoray.jobs.cli.config import load_config

TEXT = (ROOT / "deploy" / "rayjob.yaml").read_text()
SCHEMA = json.loads((Path(__file__).parent / "kuberay_rayjob_schema.json").read_text())

Tree = dict[str, Any]
Change = Callable[[Tree], object]


@lru_cache
def parsed() -> str:
    return json.dumps(yaml.safe_load(TEXT))


def manifest(change: Change = lambda _: None) -> Tree:
    """The manifest with its anchors written out, and with this change made to it."""
    tree: Tree = json.loads(parsed())
    change(tree["spec"])
    return tree


def groups(tree: Tree) -> dict[str, Tree]:
    """The head and the worker groups by name."""
    cluster = tree["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"], **{g["groupName"]: g for g in cluster["workerGroupSpecs"]}}


def pod(group: Tree) -> Tree:
    return group["template"]["spec"]


def container(group: Tree) -> Tree:
    (only,) = pod(group)["containers"]
    return only


ALL = list(groups(manifest()))


def complaints(tree: Tree) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(tree)]


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_kuberay_knows_every_field() -> None:
    assert complaints(manifest()) == []


def rename(section: Tree, old: str, new: str) -> None:
    section[new] = section.pop(old)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: rename(s["rayClusterSpec"], "enableInTreeAutoscaling", "enableInTreeAutoscalling"),
            "'enableInTreeAutoscalling' was unexpected",
        ),
        (lambda s: s.update(backoffLimit="2"), "'2' is not of type 'integer'"),
        (lambda s: s["rayClusterSpec"]["headGroupSpec"].pop("template"), "'template' is a required property"),
        (lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].pop("template"), "'template' is a required"),
        (
            lambda s: s["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            "0 is not",
        ),
        (lambda s: s["rayClusterSpec"]["authOptions"].update(mode="tokens"), "'tokens' is not one of"),
        (lambda s: s["rayClusterSpec"]["autoscalerOptions"].update(version="v3"), "'v3' is not one of"),
        (lambda s: rename(pod(s["rayClusterSpec"]["headGroupSpec"]), "volumes", "volume"), "'volume' was"),
        (
            lambda s: container(s["rayClusterSpec"]["headGroupSpec"])["resources"]["limits"].update(
                memory="8GB"
            ),
            "'8GB' does not match",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_mistake_is_refused(change: Change, says: str) -> None:
    assert any(says in complaint for complaint in complaints(manifest(change)))


# What no schema knows


def test_the_head_takes_no_tasks() -> None:
    assert groups(manifest())["head"]["rayStartParams"]["num-cpus"] == "0"


def test_nothing_runs_while_nothing_is_asked_for() -> None:
    workers = [group for name, group in groups(manifest()).items() if name != "head"]
    assert [group["minReplicas"] for group in workers] == [0, 0]
    assert all(group["maxReplicas"] > 0 for group in workers)


def test_spot_nodes_take_what_can_be_made_again_and_nothing_else() -> None:
    spot = {
        name
        for name, group in groups(manifest()).items()
        if "SPOT" in pod(group).get("nodeSelector", {}).values()
        or any(t["key"] == "spot" for t in pod(group).get("tolerations", []))
    }
    assert spot == {"augment"}


def test_gpus_are_asked_for_where_training_runs_and_nowhere_else() -> None:
    limits = {name: container(group)["resources"]["limits"] for name, group in groups(manifest()).items()}
    assert {name for name, asked in limits.items() if "nvidia.com/gpu" in asked} == {"train"}


@pytest.mark.parametrize("name", ALL)
def test_a_pod_gets_what_it_asks_for_and_no_more(name: str) -> None:
    resources = container(groups(manifest())[name])["resources"]
    assert resources["requests"] == resources["limits"]


@pytest.mark.parametrize("name", ALL)
def test_objects_live_in_memory_and_spill_to_a_volume(name: str) -> None:
    group = groups(manifest())[name]
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod(group)["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(group)["volumeMounts"]}
    assert mounts["/dev/shm"]["medium"] == "Memory"
    assert "medium" not in mounts[group["rayStartParams"]["object-spilling-directory"]]
    assert all("sizeLimit" in volume for volume in volumes.values())


@pytest.mark.parametrize("name", ALL)
def test_every_pod_has_a_role_a_user_and_time_to_end(name: str) -> None:
    spec = pod(groups(manifest())[name])
    assert spec["serviceAccountName"] == "dinoray"
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["terminationGracePeriodSeconds"] >= 120
    assert spec["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", ALL)
def test_every_image_is_one_that_the_dockerfile_makes(name: str) -> None:
    commands = (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"-t {container(groups(manifest())[name])['image']} " in commands


def test_the_cluster_has_the_ray_of_its_images_and_lets_nobody_in_without_a_token() -> None:
    cluster = manifest()["spec"]["rayClusterSpec"]
    assert f"rayproject/ray:{cluster['rayVersion']}-" in (ROOT / "deploy" / "Dockerfile").read_text()
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"


def test_the_cluster_ends_with_the_job() -> None:
    assert manifest()["spec"]["shutdownAfterJobFinishes"] is True


def test_the_environment_is_that_of_submitted_jobs() -> None:
    submitted = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())
    here = yaml.safe_load(manifest()["spec"]["runtimeEnvYAML"])
    assert here == {"env_vars": submitted["env_vars"]}


def test_the_command_is_a_valid_config_that_the_cluster_can_hold() -> None:
    words = shlex.split(manifest()["spec"]["entrypoint"])
    assert words[:3] == ["dinoray", "pretrain", "--recipe"]
    resources = load_config(words[3], None, words[4:]).resources
    workers = groups(manifest())
    asked = {name: container(g)["resources"]["limits"] for name, g in workers.items()}
    gpus = asked["train"]["nvidia.com/gpu"] * workers["train"]["maxReplicas"]
    assert resources.train_workers == gpus
    assert resources.augment_actors[1] == int(asked["augment"]["cpu"]) * workers["augment"]["maxReplicas"]


def test_it_holds_no_secrets() -> None:
    assert lints.secrets(TEXT) == []


# The script that makes such a schema from a CRD

CRD = """
metadata: {name: rayjobs.ray.io}
spec:
  group: ray.io
  names: {kind: RayJob}
  versions:
    - name: v1
      schema:
        openAPIV3Schema:
          properties:
            status: {type: object}
            spec:
              description: A long story.
              required: [template]
              properties:
                backoffLimit: {type: integer, format: int32, default: 0}
                labels: {type: object, additionalProperties: {type: string}}
                template:
                  properties:
                    spec:
                      properties:
                        hostAliases: {type: array, items: {type: object}}
                        containers:
                          items:
                            properties:
                              resources:
                                properties:
                                  limits:
                                    additionalProperties:
                                      anyOf: [{type: integer}, {type: string}]
                                      x-kubernetes-int-or-string: true
"""


def pruned() -> Tree:
    path = ROOT / "deploy" / "prune_crd.py"
    spec = importlib.util.spec_from_file_location("prune_crd", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    schema: Tree = module.prune_crd(yaml.safe_load(CRD))
    return schema


def limits(**amounts: Any) -> Tree:
    return {"template": {"spec": {"containers": [{"resources": {"limits": amounts}}]}}}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"template": {}}, []),
        ({"template": {}, "backoffLimit": 2, "labels": {"any": "name"}}, []),
        (limits(cpu=4, memory="8Gi"), []),
        ({}, ["'template' is a required property"]),
        ({"template": {}, "backoffLimit": "2"}, ["'2' is not of type 'integer'"]),
        ({"template": {}, "backofLimit": 2}, ["('backofLimit' was unexpected)"]),
        ({"template": {"spec": {"hostAliases": []}}}, ["('hostAliases' was unexpected)"]),
        (limits(cpu=0.5), ["0.5 is not of type 'integer', 'string'"]),
    ],
    ids=str,
)
def test_a_pruned_crd_is_closed(spec: Tree, says: list[str]) -> None:
    tree = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {}, "spec": spec}
    found = [error.message for error in jsonschema.Draft7Validator(pruned()).iter_errors(tree)]
    assert [message.endswith(end) for message, end in zip(found, says, strict=True)] == [True] * len(says)


def test_a_pruned_crd_has_no_prose() -> None:
    assert "A long story." not in json.dumps(pruned())
