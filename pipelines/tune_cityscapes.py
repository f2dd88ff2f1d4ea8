"""Searches Rep-MTL's coefficients, temperature and policy on street images.

`python pipelines/tune_cityscapes.py --help` explains it.

The same as `repmtl-ray tune cityscapes` of an installed package (repmtl_ray/cli/commands/tune_cityscapes.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("tune cityscapes")
