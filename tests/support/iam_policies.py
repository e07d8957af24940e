"""The policies of deploy/iam: read, decided as IAM decides for what they use of it, and searched for too much power."""

import json
from fnmatch import fnmatchcase
from typing import Any

from paths import ROOT

FOLDER = ROOT / "deploy" / "iam"
Policy = dict[str, Any]

ACTIONS = {
    "ec2:CreateTags",
    "ec2:DescribeInstances",
    "ec2:RunInstances",
    "ec2:TerminateInstances",
    "iam:PassRole",
    "s3:AbortMultipartUpload",
    "s3:DeleteObject",
    "s3:GetObject",
    "s3:ListBucket",
    "s3:PutObject",
}
"""All that any node may do."""
WITHOUT_RESOURCES = {"ec2:DescribeInstances"}
"""Actions for which IAM knows no resource but `*`."""


def policy(name: str) -> Policy:
    read: Policy = json.loads((FOLDER / f"{name}.json").read_text())
    return read


def allows(policies: list[Policy], action: str, resource: str, **context: str) -> bool:
    """Whether a role with these policies may do `action` to `resource`; keys of `context` are IAM's, without prefix."""
    return any(
        action in _list(statement["Action"])
        and any(fnmatchcase(resource, pattern) for pattern in _list(statement["Resource"]))
        and all(
            context.get(key.partition(":")[2]) == value
            for key, value in statement.get("Condition", {}).get("StringEquals", {}).items()
        )
        for read in policies
        for statement in read["Statement"]
    )


def excesses(read: Policy, *, passed_role: str) -> list[str]:
    """What a policy allows beyond what a node of ours needs, or says in words that `allows` does not know."""
    found = []
    for statement in read["Statement"]:
        actions, resources = _list(statement["Action"]), _list(statement["Resource"])
        found += [f"action {action}" for action in actions if action not in ACTIONS]
        if statement["Effect"] != "Allow" or not set(statement.get("Condition", {})) <= {"StringEquals"}:
            found.append(f"unknown words in {statement['Sid']}")
        if not set(actions) <= WITHOUT_RESOURCES:
            found += [f"{actions} on {r}" for r in resources if r == "*" or r.split(":", 5)[5] == "*"]
        condition = statement.get("Condition", {}).get("StringEquals", {})
        if "iam:PassRole" in actions and (
            resources != [passed_role] or condition != {"iam:PassedToService": "ec2.amazonaws.com"}
        ):
            found.append(f"passes {resources} under {condition}")
        on_instances = any(":instance/" in resource for resource in resources)
        if on_instances and not any(key.endswith("Tag/ray-cluster-name") for key in condition):
            found.append(f"{actions} on instances of anybody")
    return found


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]
