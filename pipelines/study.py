"""Is the direction of Rep-MTL's penalties worth anything? A study with controls.

`python pipelines/study.py --help` explains it.

The same as `repmtl-ray study` of an installed package (repmtl_ray/cli/commands/study.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("study")
