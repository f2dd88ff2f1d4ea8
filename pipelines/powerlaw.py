"""Power-law exponents of a checkpoint's layers.

`python pipelines/powerlaw.py --help` explains it.

The same as `repmtl-ray powerlaw` of an installed package (repmtl_ray/cli/commands/powerlaw.py).
"""

import sys
from pathlib import Path

from repmtl_ray import cli

if __name__ == "__main__":
    # Where weightwatcher would take this file for the library powerlaw.
    sys.path.remove(str(Path(__file__).resolve().parent))
    cli.main("powerlaw")
