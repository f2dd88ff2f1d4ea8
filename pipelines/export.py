"""Writes the model of a checkpoint as one file.

`python pipelines/export.py --help` explains it.

The same as `repmtl-ray export` of an installed package (repmtl_ray/cli/commands/export.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("export")
