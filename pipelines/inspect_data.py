"""Shows what a shard store holds.

`python pipelines/inspect_data.py --help` explains it.

The same as `repmtl-ray inspect` of an installed package (repmtl_ray/cli/commands/inspect.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("inspect")
