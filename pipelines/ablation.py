"""The paper's table 4 with fair credit.

`python pipelines/ablation.py --help` explains it.

The same as `repmtl-ray ablation` of an installed package (repmtl_ray/cli/commands/ablation.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("ablation")
