"""The nodes' role on AWS: what it may do, how it is made and undone. What `make check` says of the user's keys."""

import fnmatch
import json
from pathlib import Path

import boto3
import pytest
import yaml

from clouds.providers import CLOUDS
from core.errors import ConfigError
from core.task import read_task
from launch import identity, role
from tests.later import Later

moto, access = Later("moto"), Later("moto.iam.access_control")
RUN, DATA = "arn:aws:s3:::my-bucket/runs/first/run.json", "arn:aws:s3:::my-bucket/data/words/manifest.json"
OURS = {"ec2:ResourceTag/project": "pretrain-launcher"}
MACHINE = "arn:aws:ec2:us-east-1:123456789012:instance/i-1"
OBJECTS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "BUCKET_ENDPOINT_URL", "AWS_PROFILE", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)


def allows(url: str, action: str, resource: str, **context: str) -> bool:
    """Whether a statement allows it. moto judges action and resource; it lets some unmet conditions pass."""
    given = {name.replace("__", ":"): value for name, value in context.items()}
    statements = [each for each in role.policy(url)["Statement"] if is_met(each.get("Condition", {}), given)]
    bare = [access.IAMPolicyStatement(each | {"Condition": None}) for each in statements]
    answers = [each.is_action_permitted(action, resource) for each in bare]
    return access.PermissionResult.PERMITTED in answers


def listed(values: str | list[str]) -> list[str]:
    return [values] if isinstance(values, str) else values


def is_met(condition: dict, given: dict[str, str]) -> bool:
    """IAM's rule for the operators in use: a key that the request lacks matches nothing; one of several values does."""
    match = {"StringEquals": str.__eq__, "StringLike": fnmatch.fnmatchcase}
    return all(
        any(key in given and match[operator](given[key], value) for value in listed(values))
        for operator, keys in condition.items()
        for key, values in keys.items()
    )


@pytest.mark.parametrize("resource", [RUN, DATA])
@pytest.mark.parametrize("action", OBJECTS)
def test_a_run_may_read_and_write_runs_and_data(action, resource):
    assert allows("s3://my-bucket", action, resource)


def test_a_run_may_list_names_without_a_condition():
    """S3 evaluates that right without a prefix where an object does not exist, and would answer 403 in place of 404."""
    assert allows("s3://my-bucket", "s3:ListBucket", "arn:aws:s3:::my-bucket")


def test_a_node_may_look_up_and_end_machines_of_this_project():
    """What SkyPilot 0.14.1's autodown asks (sky/provision/aws/instance.py:terminate_instances), and the spot price."""
    assert allows("s3://b", "ec2:TerminateInstances", MACHINE, **OURS)
    for name in ("Instances", "Vpcs", "SecurityGroups", "SpotPriceHistory"):
        assert allows("s3://b", f"ec2:Describe{name}", "*")


@pytest.mark.parametrize(
    ("action", "resource", "context"),
    [
        ("ec2:TerminateInstances", MACHINE, {}),
        ("ec2:TerminateInstances", MACHINE, {"ec2:ResourceTag/project": "other"}),
        ("ec2:StopInstances", MACHINE, OURS),
        ("ec2:RunInstances", "*", OURS),
        ("ec2:CreateTags", MACHINE, OURS),  # a label that it may give would be one that it may end
        ("ec2:ModifyInstanceAttribute", MACHINE, OURS),
        ("ec2:DeleteVolume", "*", OURS),
        ("iam:PassRole", "*", {}),
        ("iam:CreateAccessKey", "*", {}),
        ("sts:AssumeRole", "*", {}),
        ("secretsmanager:GetSecretValue", "*", {}),
        ("s3:ListAllMyBuckets", "*", {}),
        ("s3:CreateBucket", "arn:aws:s3:::new", {}),
        ("s3:DeleteBucket", "arn:aws:s3:::my-bucket", {}),
        ("s3:PutBucketPolicy", "arn:aws:s3:::my-bucket", {}),
        ("s3:ListBucket", "arn:aws:s3:::other-bucket", {}),
        *((action, "arn:aws:s3:::my-bucket/private/notes", {}) for action in OBJECTS),
        *((action, "arn:aws:s3:::other-bucket/runs/first/run.json", {}) for action in OBJECTS),
    ],
)
def test_nothing_more_is_allowed(action, resource, context):
    assert not allows("s3://my-bucket", action, resource, **context)


def test_of_a_folder_in_a_bucket_only_the_folder():
    inside, outside = "arn:aws:s3:::b/team/runs/first/x", "arn:aws:s3:::b/runs/first/x"
    assert allows("s3://b/team", "s3:GetObject", inside)
    assert not allows("s3://b/team", "s3:GetObject", outside)


@pytest.mark.parametrize("url", ["gs://b", "/data/b"])
def test_a_bucket_elsewhere_needs_keys(url):
    with pytest.raises(ConfigError, match="is not a bucket at AWS, so no role opens it"):
        role.policy(url)


def test_the_role_is_made_once_changed_and_undone(tmp_path):
    config = tmp_path / ".sky.yaml"
    with moto.mock_aws():
        iam = boto3.client("iam", region_name="us-east-1")
        role.make(iam, "s3://first", config)
        role.make(iam, "s3://second", config)
        profile = iam.get_instance_profile(InstanceProfileName=role.ROLE)["InstanceProfile"]
        assert [each["RoleName"] for each in profile["Roles"]] == [role.ROLE]
        found = iam.get_role_policy(RoleName=role.ROLE, PolicyName=role.ROLE)["PolicyDocument"]
        assert found == role.policy("s3://second")
        assert iam.get_role(RoleName=role.ROLE)["Role"]["AssumeRolePolicyDocument"] == role.TRUST
        assert role.node_role(config) == role.ROLE
        role.undo(iam, config)
        role.undo(iam, config)
        assert not config.exists()
        assert iam.list_roles()["Roles"] == iam.list_instance_profiles()["InstanceProfiles"] == []


def test_what_is_not_ours_is_left_alone(tmp_path):
    config = tmp_path / ".sky.yaml"
    with moto.mock_aws():
        iam = boto3.client("iam", region_name="us-east-1")
        config.write_text("jobs: {}\n")
        with pytest.raises(ConfigError, match="exists and was not written by `make role`"):
            role.make(iam, "s3://b", config)
        assert iam.list_roles()["Roles"] == []
        role.undo(iam, config)
        assert config.read_text() == "jobs: {}\n"
        iam.create_role(RoleName=role.ROLE, AssumeRolePolicyDocument=json.dumps(role.TRUST))
        for change in (lambda: role.make(iam, "s3://b", tmp_path / "new.yaml"), lambda: role.undo(iam)):
            with pytest.raises(ConfigError, match="exists and is not ours"):
                change()


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ("sky-jobs-controller-1a2b3c4d", "LOCAL_CREDENTIALS"),
        ("pretrain-8xa100", role.ROLE),
        ("sky-5e6f-ann", role.ROLE),
        ("pretrain-8xa100-spot-3", role.ROLE),
    ],
)
def test_all_clusters_but_the_controller_get_the_role(cluster, expected):
    """By SkyPilot's rule (sky/backends/backend_utils.py): the first pattern that fits the cluster's name."""
    pairs = [next(iter(pair.items())) for pair in role.IDENTITY]
    assert next(value for pattern, value in pairs if fnmatch.fnmatchcase(cluster, pattern)) == expected


# --- what a node gets ------------------------------------------------------------------------------------------


@pytest.fixture
def said(tmp_path, monkeypatch):
    """What the check says about a task, for a user with both files of keys in a folder without `.sky.yaml`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for cloud in CLOUDS.values():
        path = Path(cloud.key_file).expanduser()
        path.parent.mkdir()
        path.touch()
    root = Path(__file__).parent.parent

    def check(name: str, **settings: str) -> list[str]:
        task = read_task(str(root / f"sky/{name}.yaml"), {})
        return [str(finding) for finding in identity.check_identity(task, settings)]

    monkeypatch.chdir(tmp_path)
    return check


def test_what_a_node_gets_besides_the_buckets_keys_is_said(said, tmp_path):
    aws, ours = (CLOUDS[name].key_file for name in ("aws", "lambda"))
    on_lambda = f" !  identity: a node on lambda gets {ours}"
    skypilots = "SkyPilot's role, which may do anything on EC2 and S3"
    remedy = "; `make role` gives it a role for this project alone"
    assert said("pretrain-8xa100-spot") == [
        f" !  identity: a node on aws gets {skypilots} and {aws} and {ours}{remedy}"
    ]
    Path(tmp_path / ".sky.yaml").write_text(yaml.safe_dump({"aws": {"remote_identity": role.IDENTITY}}))
    assert said("pretrain-8xa100-spot") == [f" !  identity: a node on aws gets the role {role.ROLE} and {ours}"]
    assert said("pretrain-gh200") == [on_lambda]
    both = f" !  identity: a node on lambda gets {aws} and {ours}; to keep the file of AWS here, set AWS_ACCESS_KEY_ID"
    assert said("pretrain-8xa100")[1].startswith(both)
    assert said("pretrain-8xa100", AWS_ACCESS_KEY_ID="a")[1] == on_lambda
    Path(ours).expanduser().unlink()
    assert said("pretrain-8xa100-spot") == [f"ok  identity: a node on aws gets the role {role.ROLE}"]


def test_what_ends_a_node_without_a_job_is_said(tmp_path, monkeypatch):
    task = read_task(str(Path(__file__).parent.parent / "sky/pretrain-8xa100.yaml"), {})
    monkeypatch.chdir(tmp_path)

    def said() -> list[str]:
        return [str(finding) for finding in identity.check_switch(task, {})]

    nothing = " !  switch: nothing ends a node on {} if the launch dies before its first job; {}"
    on_lambda = nothing.format("lambda", "`make watch` ends it then")
    assert said() == [nothing.format("aws", "`make role` starts a switch at its boot"), on_lambda]
    config = {"aws": {"remote_identity": role.IDENTITY, "post_provision_runcmd": role.start_switch(12.0)}}
    Path(".sky.yaml").write_text(yaml.safe_dump(config))
    assert said() == ["ok  switch: a node on aws ends itself 12 minutes after the last sign of life", on_lambda]
