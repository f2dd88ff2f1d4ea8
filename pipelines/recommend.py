"""Which method for this problem, within a budget.

`python pipelines/recommend.py --help` explains it.

The same as `repmtl-ray recommend` of an installed package (repmtl_ray/cli/commands/recommend.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("recommend")
