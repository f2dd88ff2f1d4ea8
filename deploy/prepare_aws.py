"""Makes what `ray_cluster.yaml` needs in an AWS account, and writes the values into a copy of that file.

    pip install boto3
    python deploy/prepare_aws.py --region us-west-2 --bucket my-bucket --write my_cluster.yaml
    ray up my_cluster.yaml

Makes what does not exist yet: a private bucket, the roles and instance profiles of head and workers,
and a security group that accepts SSH from this machine's address alone. Only the contents of the
bucket cost money. Reads the spot quota for GPUs and warns if it is too small for one machine. Run it
in the folder of the repository, where the cluster file is. It never starts a machine.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

ROOT = Path(__file__).parents[1]
FILE = ROOT / "ray_cluster.yaml"
GROUP, HEAD, WORKER = "repmtl-ray", "repmtl-ray-head", "repmtl-ray-worker"
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
SPOT_GPU_QUOTA = ("ec2", "L-3819A6DF")  # "All G and VT Spot Instance Requests", in vCPUs
SMALLEST_GPU_MACHINE = 8  # vCPUs of a g5.2xlarge
TAGS = [{"Key": "project", "Value": "repmtl_ray"}]
PLACEHOLDER_IMAGE, PLACEHOLDER_BUCKET = "ami-00000000000000000", "CHANGE-ME"
PLACEHOLDER_REGION = "us-west-2"
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
                f"--bucket {bucket}: {error.response['Error']['Message']}; it belongs to another account, take another name."
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


def make_group(session: boto3.Session, address: str) -> None:
    """All traffic among the machines, SSH from one address, in the account's default network."""
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


def filled(text: str, *, region: str, zones: list[str], image: str, bucket: str) -> str:
    """The cluster file's text with the account's values."""
    text = text.replace(PLACEHOLDER_IMAGE, image).replace(PLACEHOLDER_BUCKET, bucket)
    lines = []
    for line in text.splitlines():
        key = line.strip().partition(":")[0]
        if "# CHANGE" in line and key == "region":
            line = f"  region: {region}"
        elif "# CHANGE" in line and key == "availability_zone":
            line = f"  availability_zone: {','.join(zones)}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def own_address() -> str:
    """This machine's address as AWS sees it, as a network of one."""
    with urllib.request.urlopen("https://checkip.amazonaws.com", timeout=10) as answer:
        return f"{answer.read().decode().strip()}/32"


def prepare(arguments: argparse.Namespace) -> None:
    session = boto3.Session(region_name=arguments.region)
    account = session.client("sts").get_caller_identity()["Account"]
    print(f"account         {account}, region {arguments.region}")
    address = str(ipaddress.ip_network(arguments.ssh_from or own_address()))
    make_bucket(session, arguments.bucket)
    make_role(session, HEAD, policy(arguments.bucket, account))
    make_role(session, WORKER, policy(arguments.bucket, None))
    allow_spot(session)
    make_group(session, address)
    image = session.client("ssm").get_parameter(Name=IMAGE)["Parameter"]["Value"]
    found = session.client("ec2").describe_availability_zones(
        Filters=[{"Name": "zone-type", "Values": ["availability-zone"]}]
    )["AvailabilityZones"]
    zones = sorted(zone["ZoneName"] for zone in found)
    print(f"image           {image}\nzones           {', '.join(zones)}")
    print(f"spot GPU quota  {spot_quota(session)}")
    if arguments.write:
        text = filled(
            FILE.read_text(),
            region=arguments.region,
            zones=zones,
            image=image,
            bucket=arguments.bucket,
        )
        Path(arguments.write).write_text(text)
        print(f"cluster file    {arguments.write}; now, in {ROOT}: ray up {arguments.write}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--region", default=PLACEHOLDER_REGION, help="default: %(default)s")
    parser.add_argument("--bucket", required=True, help="for results; a name of your own")
    parser.add_argument("--write", metavar="FILE", help="the cluster file, filled in")
    parser.add_argument(
        "--ssh-from",
        metavar="CIDR",
        help="addresses that SSH is open to (default: this machine's alone)",
    )
    arguments = parser.parse_args()
    try:
        prepare(arguments)
    except (ValueError, OSError) as error:
        _end(str(error))
    except BotoCoreError as error:
        hint = HINTS["no credentials"] if "redential" in str(error) else "check --region."
        _end(f"{error}; {hint}")
    except ClientError as error:
        _end(f"{error}; {HINTS['denied']}")


def _end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
