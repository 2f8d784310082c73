"""Names the user's credentials that a node gets in addition to the bucket's keys.

This module also says what ends a node whose job never begins. SkyPilot 0.14.1 copies the credential files of every
cloud to each node, so that the node can end itself. A node on AWS does not get the files of AWS if
`aws.remote_identity` names a role. A launch can keep the files of AWS from nodes on Lambda, but only if the task
requests no machine on AWS.
"""

from collections.abc import Iterator, Mapping

from clouds.base import Finding
from clouds.providers import CLOUDS
from core.task import TaskSpec
from launch import role


def check_identity(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Yields findings that name, for each cloud of the task, the files and the role that a node gets."""
    wanted = {request.cloud for request in task.requests}
    candidates = [cloud for name, cloud in CLOUDS.items() if None in wanted or name in wanted]
    for cloud in candidates:
        own = role.node_role() if cloud.default_role else None
        gets = [f"the role {own}" if own else cloud.default_role] if cloud.default_role else []
        # A node that has a role needs no key file of its cloud. Key files of another cloud with roles are not copied
        # either, unless a candidate machine of the task is on that cloud: the launch forbids it.
        copied = [
            each
            for each in CLOUDS.values()
            if each.copies_key_file(settings)
            and (each is not cloud or not own)
            and (each is cloud or not each.default_role or each in candidates)
        ]
        gets += [each.key_file for each in copied]
        remedies = ["`make role` gives it a role for this project alone"] if cloud.default_role and not own else []
        if any(each.default_role and each is not cloud for each in copied):
            remedies.append("to keep the file of AWS here, set AWS_ACCESS_KEY_ID and its secret in .env")
        mark = "ok" if own and len(gets) == 1 else "!"
        said = f"identity: a node on {cloud.name} gets {' and '.join(gets) or 'nothing'}"
        yield Finding(mark, "; ".join([said, *remedies]))


def check_switch(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Says for each cloud of the task whether a node ends itself if the launch dies before the node's first job."""
    wanted = {request.cloud for request in task.requests}
    minutes = role.switch_minutes()
    for name, cloud in CLOUDS.items():
        if not (None in wanted or name in wanted):
            continue
        if cloud.default_role and minutes:
            yield Finding("ok", f"switch: a node on {name} ends itself {minutes:g} minutes after the last sign of life")
        else:
            remedy = "`make role` starts a switch at its boot" if cloud.default_role else "`make watch` ends it then"
            yield Finding(
                "!", f"switch: nothing ends a node on {name} if the launch dies before its first job; {remedy}"
            )
