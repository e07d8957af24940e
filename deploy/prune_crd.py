"""Makes a small, closed JSON schema of a KubeRay CRD, to check a manifest against without a cluster.

    python deploy/prune_crd.py ray.io_rayjobs.yaml > rayjob_schema.json

A CRD is 1.4 MB, most of it pod templates and prose. Kept are the fields of Ray's own and, inside pod templates, what
Ray pods use. Objects are closed: the API server drops a misspelt field without a word, here it is an error.
"""

import json
import sys
from typing import Any

import yaml

TEMPLATES = {"template", "submitterPodTemplate"}
# fmt: off
POD_FIELDS = {
    "metadata", "labels", "annotations", "name", "spec", "serviceAccountName", "restartPolicy",
    "terminationGracePeriodSeconds", "nodeSelector", "tolerations", "key", "operator", "value", "effect",
    "securityContext", "runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "volumes", "emptyDir",
    "medium", "sizeLimit", "persistentVolumeClaim", "claimName", "containers", "initContainers", "image",
    "imagePullPolicy", "imagePullSecrets", "command", "args", "env", "valueFrom", "secretKeyRef", "ports",
    "containerPort", "resources", "limits", "requests", "volumeMounts", "mountPath",
}
# fmt: on
DROPPED = {"description", "format", "default", "status"}


def prune(schema: dict[str, Any], *, in_pod: bool = False) -> dict[str, Any]:
    """`schema` without prose and Kubernetes' own keywords, closed, and within pods cut down to POD_FIELDS."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {k: v for k, v in schema.items() if k not in DROPPED and not k.startswith("x-kubernetes-")}
    if "items" in kept:
        kept["items"] = prune(kept["items"], in_pod=in_pod)
    if isinstance(kept.get("additionalProperties"), dict):
        kept["additionalProperties"] = prune(kept["additionalProperties"], in_pod=in_pod)
    if "properties" in kept:
        kept["properties"] = {
            name: prune(field, in_pod=in_pod or name in TEMPLATES)
            for name, field in kept["properties"].items()
            if not in_pod or name in POD_FIELDS
        }
        kept["additionalProperties"] = False
    return kept


def prune_crd(crd: dict[str, Any]) -> dict[str, Any]:
    """The schema of version v1 of a custom resource: apiVersion, kind, any metadata, and a pruned spec."""
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    fields = version["schema"]["openAPIV3Schema"]["properties"]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "description": f"{crd['metadata']['name']}, v1, from its CRD by deploy/prune_crd.py",
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": f"{crd['spec']['group']}/v1"},
            "kind": {"const": crd["spec"]["names"]["kind"]},
            "metadata": {"type": "object"},
            "spec": prune(fields["spec"]),
        },
        "additionalProperties": False,
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(json.dumps(prune_crd(yaml.safe_load(file)), indent=1))
