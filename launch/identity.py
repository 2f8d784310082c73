"""Says which keys of the user's reach a rented node, besides the bucket's.

SkyPilot 0.14.1 copies the credential files of every cloud to each node, so that the node can end itself. On AWS it
leaves out its own cloud's if `aws.remote_identity` names a role; a node on Lambda gets those of AWS unless the launch
forbids it, which it can only if no candidate of the task is on AWS.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from clouds.base import Finding
from core.task import TaskSpec
from launch import role

AWS_FILE, LAMBDA_FILE = "~/.aws/credentials", "~/.lambda_cloud/lambda_keys"


def check_identity(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Names the files and roles that a node gets."""
    clouds = {request.cloud or "any" for request in task.requests}
    # With keys in the environment SkyPilot logs in by them, and copies no file.
    aws_file = Path(AWS_FILE).expanduser().exists() and not settings.get("AWS_ACCESS_KEY_ID")
    lambda_file = Path(LAMBDA_FILE).expanduser().exists()
    if clouds & {"aws", "any"}:
        name = role.node_role()
        gets = [f"the role {name}" if name else "SkyPilot's role, which may do anything on EC2 and S3"]
        gets += [AWS_FILE] * (aws_file and not name) + [LAMBDA_FILE] * lambda_file
        remedy = "" if name else "; `make role` gives it a role for this project alone"
        yield Finding(
            "!" if len(gets) > 1 or not name else "ok", f"identity: a node on AWS gets {_listed(gets)}{remedy}"
        )
    if clouds & {"lambda", "any"}:
        goes = aws_file and clouds != {"lambda"}
        remedy = f"; to keep {AWS_FILE} here, set AWS_ACCESS_KEY_ID and its secret in .env" if goes else ""
        gets = [f"{LAMBDA_FILE}, with which it ends itself", *[AWS_FILE] * goes]
        yield Finding("!", f"identity: a node on Lambda gets {_listed(gets)}{remedy}")


def _listed(things: list[str]) -> str:
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
