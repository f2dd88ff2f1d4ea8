"""Ray's AWS, with an account that is prepared at `ray up`: the provider of `ray_cluster.yaml`.

Ray's cluster launcher loads this class by the name in the file. At `ray up` it makes what the account
lacks (`aws_account.py`), puts the account's values into the configuration, and hands everything on to
Ray's own AWS provider, which is the provider of the cluster from then on.
"""

from __future__ import annotations

import copy
from typing import Any

from repmtl_ray import aws_account
from repmtl_ray.ray_compat import aws_provider_class

AWS = aws_provider_class()


class PreparedAWS(AWS):  # type: ignore[misc, valid-type]  # a class of Ray without types
    """Prepares the account when a cluster is brought up; else Ray's own."""

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The configuration with this account's image, bucket, roles and security group.

        Args:
            cluster_config: the cluster file's content.

        Returns:
            As Ray's AWS provider makes it, with "aws" as its provider.

        Raises:
            ValueError: as `aws_account.prepare`.
        """
        config = copy.deepcopy(cluster_config)
        provider = {name: value for name, value in config["provider"].items() if name != "module"}
        config["provider"] = {**provider, "type": "aws"}
        prepared = aws_account.prepare(provider["region"])
        config = aws_account.filled(config, prepared)
        return AWS.bootstrap_config(config)
