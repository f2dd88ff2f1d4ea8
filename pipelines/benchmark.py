"""Compares methods over seeds by one published protocol.

`python pipelines/benchmark.py --help` explains it.

The same as `repmtl-ray benchmark` of an installed package (repmtl_ray/cli/commands/benchmark.py).
"""

from repmtl_ray import cli

if __name__ == "__main__":
    cli.main("benchmark")
