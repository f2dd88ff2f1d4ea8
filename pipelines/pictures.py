"""Pictures of a checkpoint's model on a few images.

`python pipelines/pictures.py --help` explains it.

The same as `repmtl-ray pictures` of an installed package (repmtl_ray/cli/commands/pictures.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("pictures")
