"""Trains one experiment from its file.

`python pipelines/train.py --help` explains it.

The same as `repmtl-ray train` of an installed package (repmtl_ray/cli/commands/train.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("train")
