"""Checks a data set and converts it to shards.

`python pipelines/prepare_data.py --help` explains it.

The same as `repmtl-ray prepare` of an installed package (repmtl_ray/cli/commands/prepare.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("prepare")
