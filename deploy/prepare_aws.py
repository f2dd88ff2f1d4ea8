"""Makes what `ray_cluster.yaml` needs in an AWS account, and writes the values into a copy of that file.

    python deploy/prepare_aws.py --region us-west-2 --bucket my-bucket --write my_cluster.yaml
    ray up my_cluster.yaml

`ray up ray_cluster.yaml` does the same by itself. This is for another region or bucket, and for
accounts in which somebody with more rights prepares what others use: the written file asks for no right
to make roles or buckets. Makes what does not exist yet (repmtl_ray/aws_account.py), and starts no machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from repmtl_ray import aws_account

FILE = Path(__file__).parents[1] / "ray_cluster.yaml"


def prepare(arguments: argparse.Namespace) -> None:
    """Prepares the account, and writes the file."""
    prepared = aws_account.prepare(
        arguments.region, bucket=arguments.bucket, ssh_from=arguments.ssh_from
    )
    if arguments.write:
        text = aws_account.filled(FILE.read_text(), prepared)
        lines = []
        for line in text.splitlines():
            key = line.strip().partition(":")[0]
            if line.startswith("  region:"):
                line = f"  region: {arguments.region}"
            elif key == "availability_zone":
                line = f"  availability_zone: {','.join(prepared.zones)}"
            elif line.startswith("  type: external"):
                line = "  type: aws"
            elif line.startswith("  module: "):
                continue
            lines.append(line)
        Path(arguments.write).write_text("\n".join(lines) + "\n")
        print(f"cluster file    {arguments.write}; now, in {FILE.parent}: ray up {arguments.write}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--region", default="us-west-2", help="default: %(default)s")
    parser.add_argument("--bucket", help="for results (default: a name from the account's number)")
    parser.add_argument("--write", metavar="FILE", help="the cluster file, filled in")
    parser.add_argument(
        "--ssh-from",
        metavar="CIDR",
        help="addresses that SSH is open to (default: this machine's alone)",
    )
    try:
        prepare(parser.parse_args())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
