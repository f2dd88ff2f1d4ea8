"""What Rep-MTL's penalties do to a small run.

`python pipelines/diagnose.py --help` explains it.

The same as `repmtl-ray diagnose` of an installed package (repmtl_ray/cli/commands/diagnose.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("diagnose")
