"""deploy/iam: what the nodes may do and what they may not, as IAM would decide it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import cluster_lints as lints
import pytest
import yaml
from iam_policies import FOLDER, Policy, allows, excesses, policy
from paths import ROOT

CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
README = (FOLDER / "README.md").read_text()
HEAD = [policy("head"), policy("storage")]
WORKER = [policy("storage")]

EC2 = "arn:aws:ec2:us-east-1:123456789012"
ROLE = "arn:aws:iam::123456789012:role"
S3 = "arn:aws:s3:::BUCKET"
OURS = {"ResourceTag/ray-cluster-name": "dinoray"}
LAUNCH = {"RequestTag/ray-cluster-name": "dinoray", "MetadataHttpTokens": "required"}
TO_EC2 = {"PassedToService": "ec2.amazonaws.com"}


@pytest.mark.parametrize(
    ("action", "resource", "context"),
    [
        ("ec2:DescribeInstances", "*", {}),
        ("ec2:RunInstances", f"{EC2}:instance/*", LAUNCH),
        ("ec2:RunInstances", f"{EC2}:subnet/subnet-1", {}),
        ("ec2:RunInstances", "arn:aws:ec2:us-east-1::image/ami-1", {}),
        ("ec2:TerminateInstances", f"{EC2}:instance/i-1", OURS),
        ("ec2:CreateTags", f"{EC2}:instance/i-1", OURS),
        ("iam:PassRole", f"{ROLE}/dinoray-worker", TO_EC2),
    ],
)
def test_the_head_may_and_the_others_may_not(action: str, resource: str, context: dict[str, str]) -> None:
    assert allows(HEAD, action, resource, **context)
    assert not allows(WORKER, action, resource, **context)


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        ("s3:ListBucket", S3),
        ("s3:GetObject", f"{S3}/images/cat.jpg"),
        ("s3:GetObject", f"{S3}/runs/first/config.yaml"),
        ("s3:PutObject", f"{S3}/runs/first/config.yaml"),
        ("s3:PutObject", f"{S3}/runs/"),  # the marker of a folder, as pyarrow makes it
        ("s3:DeleteObject", f"{S3}/runs/first/checkpoints/step_00001000/meta.json"),
        ("s3:AbortMultipartUpload", f"{S3}/runs/first/checkpoints/step_00001000/student.safetensors"),
    ],
)
def test_every_node_may(action: str, resource: str) -> None:
    assert allows(HEAD, action, resource)
    assert allows(WORKER, action, resource)


@pytest.mark.parametrize(
    ("action", "resource", "context"),
    [
        ("ec2:RunInstances", f"{EC2}:instance/*", {}),
        ("ec2:RunInstances", f"{EC2}:instance/*", LAUNCH | {"RequestTag/ray-cluster-name": "other"}),
        ("ec2:RunInstances", f"{EC2}:instance/*", LAUNCH | {"MetadataHttpTokens": "optional"}),
        ("ec2:TerminateInstances", f"{EC2}:instance/i-1", {}),
        ("ec2:TerminateInstances", f"{EC2}:instance/i-1", {"ResourceTag/ray-cluster-name": "other"}),
        ("ec2:CreateTags", f"{EC2}:instance/i-1", {"RequestTag/ray-cluster-name": "dinoray"}),
        ("ec2:CreateTags", f"{EC2}:vpc/vpc-1", OURS),
        ("ec2:CreateSecurityGroup", f"{EC2}:security-group/*", {}),
        ("iam:PassRole", f"{ROLE}/dinoray-head", TO_EC2),
        ("iam:PassRole", f"{ROLE}/admin", TO_EC2),
        ("iam:PassRole", f"{ROLE}/dinoray-worker", {"PassedToService": "lambda.amazonaws.com"}),
        ("iam:CreateRole", f"{ROLE}/any", {}),
        ("s3:PutObject", f"{S3}/images/cat.jpg", {}),
        ("s3:DeleteObject", f"{S3}/images/cat.jpg", {}),
        ("s3:GetObject", f"{S3}/other/cat.jpg", {}),
        ("s3:GetObject", "arn:aws:s3:::OTHER/images/cat.jpg", {}),
        ("s3:DeleteBucket", S3, {}),
    ],
)
def test_no_node_may(action: str, resource: str, context: dict[str, str]) -> None:
    assert not allows(HEAD, action, resource, **context)
    assert not allows(WORKER, action, resource, **context)


@pytest.mark.parametrize("name", ["head", "storage"])
def test_a_policy_goes_no_further_than_it_must(name: str) -> None:
    assert excesses(policy(name), passed_role=f"{ROLE}/dinoray-worker") == []


def statement(sid: str, **values: object) -> Callable[[Policy], None]:
    """Set keys of the statement of this name."""
    return lambda read: next(s for s in read["Statement"] if s["Sid"] == sid).update(values)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("storage", statement("KeepRuns", Action="s3:*")),
        ("storage", statement("KeepRuns", Resource="*")),
        ("storage", statement("KeepRuns", Resource="arn:aws:s3:::*")),
        ("head", statement("SeeInstances", Action="*")),
        ("head", statement("SeeInstances", Action=["ec2:DescribeInstances", "ec2:TerminateInstances"])),
        ("head", statement("GiveWorkersTheirRole", Action="iam:*")),
        ("head", statement("GiveWorkersTheirRole", Resource=f"{ROLE}/*")),
        ("head", statement("GiveWorkersTheirRole", Resource=f"{ROLE}/dinoray-head")),
        ("head", statement("GiveWorkersTheirRole", Condition={})),
        ("head", statement("LaunchInstancesOfThisCluster", Condition={})),
        ("head", statement("TagAndEndInstancesOfThisCluster", Condition={})),
        (
            "head",
            statement("TagThemAtLaunch", Condition={"StringLike": {"aws:RequestTag/ray-cluster-name": "*"}}),
        ),
    ],
)
def test_an_excess_is_found(name: str, change: Callable[[Policy], None]) -> None:
    read = policy(name)
    change(read)
    assert excesses(read, passed_role=f"{ROLE}/dinoray-worker") != []


def test_instances_alone_take_the_roles() -> None:
    (only,) = policy("trust")["Statement"]
    assert only == {
        "Effect": "Allow",
        "Principal": {"Service": "ec2.amazonaws.com"},
        "Action": "sts:AssumeRole",
    }


def test_policies_and_cluster_speak_of_one_cluster_one_region_and_one_role() -> None:
    text = json.dumps(policy("head"))
    assert set(re.findall(r'Tag/ray-cluster-name": "(.*?)"', text)) == {CLUSTER["cluster_name"]}
    assert set(re.findall(r"arn:aws:ec2:(.*?):", text)) == {CLUSTER["provider"]["region"]}
    types = CLUSTER["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Arn"] for name, kind in types.items()}
    names = {name: arn.rpartition("/")[2] for name, arn in profiles.items()}
    assert names == {"head": "dinoray-head", "augment": "dinoray-worker", "train": "dinoray-worker"}


def test_the_readme_creates_what_there_is() -> None:
    files = set(re.findall(r"file://(\S+)", README))
    assert files == {path.name for path in FOLDER.glob("*.json")}
    assert all(f"`{name}`" in README for name in files)
    assert "for role in dinoray-head dinoray-worker; do" in README


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_nothing_secret_is_in_it(path: Path) -> None:
    assert lints.secrets(path.read_text()) == []
