"""Searches the same for Office-31, or for Office-Home.

`python pipelines/tune_office31.py --help` explains it.

The same as `repmtl-ray tune office31` of an installed package (repmtl_ray/cli/commands/tune_office31.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("tune office31")
