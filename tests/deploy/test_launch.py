"""cluster.yaml launched by Ray itself, as `ray up` and the head would, into an account that moto keeps in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
import botocore.client
import pytest
import yaml
from iam_policies import FOLDER, allows, policy
from paths import ROOT
from ray_releases import uses_private_ray
from servers import aws_environment, use_aws

pytestmark = uses_private_ray

FILE = ROOT / "cluster.yaml"
ACCOUNT = "123456789012"  # moto's, and the placeholder of our files
Request = tuple[str, dict[str, Any]]


@dataclass
class Account:
    """What Ray made of the file: its own view of it, EC2's view by node type, and what the head asked of EC2."""

    config: dict[str, Any] = field(default_factory=dict)
    instances: dict[str, dict[str, Any]] = field(default_factory=dict)
    disks: dict[str, dict[str, Any]] = field(default_factory=dict)
    head_requests: list[Request] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    moto = pytest.importorskip("moto")
    from ray.autoscaler._private.aws import utils
    from ray.autoscaler._private.commands import _bootstrap_config, _get_node_provider
    from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    with pytest.MonkeyPatch.context() as patch:
        variables = aws_environment("")
        del variables["AWS_ENDPOINT_URL"]
        use_aws(patch, variables)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray puts the key pair in ~/.ssh
        patch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
        patch.setattr(boto3, "DEFAULT_SESSION", None)  # it would keep the credentials of this test for others
        utils.resource_cache.cache_clear()
        with moto.mock_aws():
            create_roles()
            found = Account()
            tree = yaml.safe_load(FILE.read_text())
            ec2 = boto3.client("ec2", region_name=tree["provider"]["region"])
            image = ec2.register_image(Name="image", RootDeviceName="/dev/sda1")["ImageId"]
            for kind in tree["available_node_types"].values():
                kind["node_config"]["ImageId"] = image
            found.config = _bootstrap_config(tree, no_config_cache=True)
            name, types = found.config["cluster_name"], found.config["available_node_types"]
            provider = _get_node_provider(found.config["provider"], name, use_cache=False)

            def create(kind: str) -> str:
                tags = {
                    TAG_RAY_NODE_KIND: "head" if kind == "head" else "worker",
                    TAG_RAY_USER_NODE_TYPE: kind,
                    TAG_RAY_LAUNCH_CONFIG: "as in cluster.yaml",
                }
                return next(iter(provider.create_node(types[kind]["node_config"], tags, 1)))

            ids = {"head": create("head")}
            record(patch, found.head_requests)  # from here on it is the head that asks
            ids |= {kind: create(kind) for kind in types if kind != "head"}
            provider.non_terminated_nodes({})
            provider.set_node_tags(ids["augment"], {"ray-node-status": "up-to-date"})
            asked = len(found.head_requests)
            found.instances = {kind: describe(ec2, instance) for kind, instance in ids.items()}
            found.disks = {kind: disk(ec2, instance) for kind, instance in found.instances.items()}
            del found.head_requests[asked:]
            provider.terminate_nodes([ids["augment"], ids["train"]])
            asked = len(found.head_requests)
            found.left = provider.non_terminated_nodes({})
            del found.head_requests[asked:]
            yield found
        utils.resource_cache.cache_clear()


def create_roles() -> None:
    """What deploy/iam/README.md says, from the files that it names. moto checks the documents as IAM does."""
    iam = boto3.client("iam")
    documents = {path.stem: path.read_text() for path in FOLDER.glob("*.json")}
    arns = {
        name: iam.create_policy(PolicyName=f"dinoray-{name}", PolicyDocument=documents[name])["Policy"]["Arn"]
        for name in ("head", "storage")
    }
    for role, policies in {"dinoray-head": ["head", "storage"], "dinoray-worker": ["storage"]}.items():
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=documents["trust"])
        for name in policies:
            iam.attach_role_policy(RoleName=role, PolicyArn=arns[name])
        iam.create_instance_profile(InstanceProfileName=role)
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)


def record(patch: pytest.MonkeyPatch, requests: list[Request]) -> None:
    """Note each request that any AWS client of this process makes."""
    call = botocore.client.BaseClient._make_api_call

    def noted(client: Any, operation: str, parameters: dict[str, Any]) -> Any:
        requests.append((operation, parameters))
        return call(client, operation, parameters)

    patch.setattr(botocore.client.BaseClient, "_make_api_call", noted)


def describe(ec2: Any, instance: str) -> dict[str, Any]:
    found: dict[str, Any] = ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
    return found


def disk(ec2: Any, instance: dict[str, Any]) -> dict[str, Any]:
    (mapping,) = instance["BlockDeviceMappings"]
    volume = ec2.describe_volumes(VolumeIds=[mapping["Ebs"]["VolumeId"]])["Volumes"][0]
    return volume | {"Goes": mapping["Ebs"]["DeleteOnTermination"]}


def test_augment_nodes_are_spot_and_no_others(account: Account) -> None:
    markets = {kind: instance.get("InstanceLifecycle") for kind, instance in account.instances.items()}
    assert markets == {"head": None, "augment": "spot", "train": None}


def test_ray_finds_the_cpus_and_gpus_that_jobs_ask_for(account: Account) -> None:
    resources = {kind: found["resources"] for kind, found in account.config["available_node_types"].items()}
    assert resources["head"] == {"CPU": 0}
    found = {kind: (resources[kind]["CPU"], resources[kind].get("GPU", 0)) for kind in ("augment", "train")}
    assert found == {"augment": (32, 0), "train": (48, 4)}


def test_the_head_has_its_role_and_the_others_have_theirs(account: Account) -> None:
    profiles = {kind: i["IamInstanceProfile"]["Arn"] for kind, i in account.instances.items()}
    arn = f"arn:aws:iam::{ACCOUNT}:instance-profile"
    assert profiles == {
        "head": f"{arn}/dinoray-head",
        "augment": f"{arn}/dinoray-worker",
        "train": f"{arn}/dinoray-worker",
    }


@pytest.mark.parametrize("kind", ["head", "augment", "train"])
def test_an_instance_has_the_tags_that_the_policies_look_at(account: Account, kind: str) -> None:
    tags = {tag["Key"]: tag["Value"] for tag in account.instances[kind]["Tags"]}
    assert tags["ray-cluster-name"] == "dinoray"
    assert tags["ray-user-node-type"] == kind


@pytest.mark.parametrize("kind", ["head", "augment", "train"])
def test_metadata_is_read_with_a_token_from_within_a_container_too(account: Account, kind: str) -> None:
    options = account.instances[kind]["MetadataOptions"]
    assert (options["HttpTokens"], options["HttpPutResponseHopLimit"]) == ("required", 2)


@pytest.mark.parametrize("kind", ["head", "augment", "train"])
def test_a_disk_is_large_enough_and_goes_with_its_node(account: Account, kind: str) -> None:
    volume = account.disks[kind]
    assert (volume["Size"], volume["VolumeType"], volume["Goes"]) == (200, "gp3", True)


def test_all_nodes_are_in_one_zone(account: Account) -> None:
    zones = {instance["Placement"]["AvailabilityZone"] for instance in account.instances.values()}
    assert zones == {account.config["provider"]["availability_zone"]}


def test_a_node_that_is_not_needed_is_ended_and_not_kept(account: Account) -> None:
    assert account.left == [account.instances["head"]["InstanceId"]]
    assert "StopInstances" not in {operation for operation, _ in account.head_requests}


# What the head asks for, and what its policy allows


def needed(request: Request, tags: dict[str, str]) -> list[tuple[str, str, dict[str, str]]]:
    """(action, resource, context) that IAM decides on for a request; `tags` are those of the instances in it."""
    operation, asked = request
    ec2 = f"arn:aws:ec2:us-east-1:{ACCOUNT}"
    if operation == "DescribeInstances":
        return [("ec2:DescribeInstances", "*", {})]
    if operation in ("CreateTags", "TerminateInstances"):
        ids = asked.get("Resources") or asked["InstanceIds"]
        context = {f"ResourceTag/{key}": value for key, value in tags.items()}
        return [(f"ec2:{operation}", f"{ec2}:instance/{i}", context) for i in ids]
    assert operation == "RunInstances", operation
    given = {f"RequestTag/{tag['Key']}": tag["Value"] for tag in asked["TagSpecifications"][0]["Tags"]}
    launch = given | {"MetadataHttpTokens": asked["MetadataOptions"]["HttpTokens"]}
    used = [
        f"{ec2}:subnet/{asked['SubnetId']}",
        f"{ec2}:security-group/{asked['SecurityGroupIds'][0]}",
        f"{ec2}:key-pair/{asked['KeyName']}",
        f"{ec2}:volume/*",
        f"{ec2}:network-interface/*",
        f"arn:aws:ec2:us-east-1::image/{asked['ImageId']}",
    ]
    used += [f"{ec2}:spot-instances-request/*"] * ("InstanceMarketOptions" in asked)
    role = asked["IamInstanceProfile"]["Arn"].replace("instance-profile", "role")
    return [
        ("ec2:RunInstances", f"{ec2}:instance/*", launch),
        ("ec2:CreateTags", f"{ec2}:instance/*", given | {"CreateAction": "RunInstances"}),
        ("iam:PassRole", role, {"PassedToService": "ec2.amazonaws.com"}),
        *(("ec2:RunInstances", resource, {}) for resource in used),
    ]


def test_the_head_may_do_all_that_ray_asks_of_ec2(account: Account) -> None:
    operations = [operation for operation, _ in account.head_requests]
    assert operations == [
        "RunInstances",
        "RunInstances",
        "DescribeInstances",
        "CreateTags",
        "TerminateInstances",
    ]
    decisions = [
        (action, resource)
        for request in account.head_requests
        for action, resource, context in needed(request, {"ray-cluster-name": "dinoray"})
        if not allows([policy("head")], action, resource, **context)
    ]
    assert decisions == []


def test_the_head_may_not_touch_the_instances_of_another_cluster(account: Account) -> None:
    touching = [r for r in account.head_requests if r[0] in ("CreateTags", "TerminateInstances")]
    for request in touching:
        for action, resource, context in needed(request, {"ray-cluster-name": "other"}):
            assert not allows([policy("head")], action, resource, **context)


def test_a_head_whose_nodes_bear_another_name_could_start_none(account: Account) -> None:
    for operation, asked in account.head_requests[:2]:
        renamed = asked | {"TagSpecifications": [{"Tags": [{"Key": "ray-cluster-name", "Value": "other"}]}]}
        (action, resource, context), *_ = needed((operation, renamed), {})
        assert not allows([policy("head")], action, resource, **context)
