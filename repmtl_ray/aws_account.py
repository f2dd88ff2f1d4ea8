"""What a cluster needs in an AWS account, made where it is missing: by `ray up`, or beforehand.

Owns the bucket, the roles and instance profiles of head and workers, and the security group that
accepts SSH from one address alone; and the values that the cluster file leaves open (`filled`). Only
the contents of the bucket cost money. Nothing here starts a machine. `aws_provider.py` calls it at
`ray up`, `deploy/prepare_aws.py` by itself. Imports neither torch nor Ray.
"""

from __future__ import annotations

import ipaddress
import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

GROUP, HEAD, WORKER = "repmtl-ray", "repmtl-ray-head", "repmtl-ray-worker"
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
SPOT_GPU_QUOTA = ("ec2", "L-3819A6DF")  # "All G and VT Spot Instance Requests", in vCPUs
SMALLEST_GPU_MACHINE = 8  # vCPUs of a g5.2xlarge
TAGS = [{"Key": "project", "Value": "repmtl_ray"}]
OPEN_IMAGE = f"resolve:ssm:{IMAGE}"
OPEN_BUCKET = "BUCKET-OF-THIS-ACCOUNT"
"""What the cluster file says in place of values that are of an account."""
HINTS = {
    "no credentials": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
    "denied": "these credentials may not do this; ask for EC2, S3 and IAM rights, or let someone who has them run it.",
}


def _assume(service: str) -> str:
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": service},
        "Action": "sts:AssumeRole",
    }
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def policy(bucket: str, account: str | None) -> dict[str, Any]:
    """What a machine may do: its bucket; with an account, also start and end machines there."""
    statements: list[dict[str, Any]] = [
        {
            "Effect": "Allow",
            "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
        }
    ]
    if account is not None:
        statements += [
            {
                "Effect": "Allow",
                "Action": ["ec2:RunInstances", "ec2:CreateTags", "ec2:Describe*"],
                "Resource": "*",
            },
            {
                "Effect": "Allow",
                "Action": ["ec2:TerminateInstances", "ec2:StopInstances"],
                "Resource": "*",
                "Condition": {"StringEquals": {"ec2:ResourceTag/project": "repmtl_ray"}},
            },
            {
                "Effect": "Allow",
                "Action": "iam:PassRole",
                "Resource": f"arn:aws:iam::{account}:role/{WORKER}",
            },
        ]
    return {"Version": "2012-10-17", "Statement": statements}


def make_bucket(session: boto3.Session, bucket: str) -> None:
    """A private bucket of this account; one that exists is left as it is."""
    s3 = session.client("s3")
    try:
        s3.head_bucket(Bucket=bucket)
        print(f"bucket          s3://{bucket} is there")
        return
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise ValueError(
                f"bucket {bucket}: {error.response['Error']['Message']}; it belongs to another account, take another name."
            ) from error
    elsewhere = {"LocationConstraint": session.region_name}
    s3.create_bucket(
        Bucket=bucket,
        **({} if session.region_name == "us-east-1" else {"CreateBucketConfiguration": elsewhere}),
    )
    blocked = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    s3.put_public_access_block(
        Bucket=bucket, PublicAccessBlockConfiguration=dict.fromkeys(blocked, True)
    )
    print(f"bucket          s3://{bucket} made, private")


def make_role(session: boto3.Session, name: str, document: dict[str, Any]) -> None:
    """A role with this policy, and an instance profile of the same name."""
    iam = session.client("iam")
    try:
        iam.create_role(
            RoleName=name, AssumeRolePolicyDocument=_assume("ec2.amazonaws.com"), Tags=TAGS
        )
        iam.create_instance_profile(InstanceProfileName=name, Tags=TAGS)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        state = "made"
    except iam.exceptions.EntityAlreadyExistsException:
        state = "is there; its policy is up to date"
    iam.put_role_policy(RoleName=name, PolicyName=GROUP, PolicyDocument=json.dumps(document))
    print(f"role            {name} {state}")


def allow_spot(session: boto3.Session) -> None:
    """The role by which EC2 hands out spot machines; an account's first use of them makes it."""
    iam = session.client("iam")
    try:
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")
    except (iam.exceptions.InvalidInputException, iam.exceptions.EntityAlreadyExistsException):
        return  # it is there


def make_group(session: boto3.Session, ssh_from: str | None) -> None:
    """All traffic among the machines, SSH from one address (None: this machine's), in the account's
    default network."""
    ec2 = session.client("ec2")
    networks = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not networks:
        raise ValueError(
            f"region {session.region_name} has no default network; make one: aws ec2 create-default-vpc."
        )
    network = networks[0]["VpcId"]
    here = [{"Name": "group-name", "Values": [GROUP]}, {"Name": "vpc-id", "Values": [network]}]
    if ec2.describe_security_groups(Filters=here)["SecurityGroups"]:
        print(f"security group  {GROUP} is there; its rules are left as they are")
        return
    address = str(ipaddress.ip_network(ssh_from or own_address()))
    group = ec2.create_security_group(
        GroupName=GROUP,
        Description="repmtl_ray: traffic among its machines, SSH from one address",
        VpcId=network,
        TagSpecifications=[{"ResourceType": "security-group", "Tags": TAGS}],
    )["GroupId"]
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
            {
                "IpProtocol": "tcp",
                "FromPort": 22,
                "ToPort": 22,
                "IpRanges": [{"CidrIp": address}],
            },
        ],
    )
    print(f"security group  {GROUP} made: SSH from {address}, all else from its own machines only")


def spot_quota(session: boto3.Session) -> str:
    """A sentence about how many GPU machines at spot price the account may have."""
    service, code = SPOT_GPU_QUOTA
    try:
        found = session.client("service-quotas").get_service_quota(
            ServiceCode=service, QuotaCode=code
        )
        allowed = int(found["Quota"]["Value"])
    except (ClientError, BotoCoreError) as error:
        return (
            f"not known ({error}); look at Service Quotas, EC2, All G and VT Spot Instance Requests"
        )
    machines = allowed // SMALLEST_GPU_MACHINE
    if machines == 0:
        return (
            f"{allowed} vCPUs: no GPU machine will come. Ask for more before `ray up` (minutes to days): aws service-quotas "
            f"request-service-quota-increase --service-code {service} --quota-code {code} --desired-value 64"
        )
    return f"{allowed} vCPUs: up to {machines} g5.2xlarge at once"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What an account has after `prepare`.

    Args:
        account: its number.
        bucket: its name.
        image: of the machines.
        zones: of the region.
    """

    account: str
    bucket: str
    image: str
    zones: tuple[str, ...]


def filled(value: Any, prepared: Prepared) -> Any:
    """A cluster file's text, or any part of its content, with the values of an account."""
    if isinstance(value, str):
        return value.replace(OPEN_IMAGE, prepared.image).replace(OPEN_BUCKET, prepared.bucket)
    if isinstance(value, Mapping):
        return {name: filled(inside, prepared) for name, inside in value.items()}
    return [filled(inside, prepared) for inside in value] if isinstance(value, list) else value


def own_address() -> str:
    """This machine's address as AWS sees it, as a network of one."""
    with urllib.request.urlopen("https://checkip.amazonaws.com", timeout=10) as answer:
        return f"{answer.read().decode().strip()}/32"


def prepare(
    region: str, *, bucket: str | None = None, ssh_from: str | None = None, image: str | None = None
) -> Prepared:
    """Makes what is missing, and prints what there is.

    Args:
        region: of the cluster.
        bucket: for the results; None takes a name from the account's number.
        ssh_from: network that SSH is open to; None: this machine's address alone.
        image: public parameter of AWS that names the machines' image; None: `IMAGE`.

    Raises:
        ValueError: no credentials, rights that they lack, or a bucket of somebody else.
    """
    try:
        return _prepare(region, bucket, ssh_from, image or IMAGE)
    except BotoCoreError as error:
        hint = HINTS["no credentials"] if "redential" in str(error) else "check the region."
        raise ValueError(f"{error}; {hint}") from error
    except ClientError as error:
        raise ValueError(f"{error}; {HINTS['denied']}") from error


def _prepare(region: str, bucket: str | None, ssh_from: str | None, image: str) -> Prepared:
    session = boto3.Session(region_name=region)
    account = session.client("sts").get_caller_identity()["Account"]
    print(f"account         {account}, region {region}")
    bucket = bucket or f"repmtl-ray-{account}-{region}"
    make_bucket(session, bucket)
    make_role(session, HEAD, policy(bucket, account))
    make_role(session, WORKER, policy(bucket, None))
    allow_spot(session)
    make_group(session, ssh_from)
    found_image = session.client("ssm").get_parameter(Name=image)["Parameter"]["Value"]
    found = session.client("ec2").describe_availability_zones(
        Filters=[{"Name": "zone-type", "Values": ["availability-zone"]}]
    )["AvailabilityZones"]
    zones = tuple(sorted(zone["ZoneName"] for zone in found))
    print(f"image           {found_image}\nzones           {', '.join(zones)}")
    print(f"spot GPU quota  {spot_quota(session)}")
    return Prepared(account=account, bucket=bucket, image=found_image, zones=zones)
