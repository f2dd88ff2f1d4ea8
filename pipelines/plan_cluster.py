"""What a search will take on a cluster.

`python pipelines/plan_cluster.py --help` explains it.

The same as `repmtl-ray plan` of an installed package (repmtl_ray/cli/commands/plan.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("plan")
