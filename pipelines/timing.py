"""Time per epoch of methods as a ratio to EW.

`python pipelines/timing.py --help` explains it.

The same as `repmtl-ray timing` of an installed package (repmtl_ray/cli/commands/timing.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("timing")
