"""How Rep-MTL depends on its coefficients and the learning rate.

`python pipelines/sensitivity.py --help` explains it.

The same as `repmtl-ray sensitivity` of an installed package (repmtl_ray/cli/commands/sensitivity.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("sensitivity")
