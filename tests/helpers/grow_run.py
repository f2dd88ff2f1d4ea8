"""A run of the campaign's experiment that grows from one worker to two; prints its history.

python -m tests.helpers.grow_run FOLDER
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

from bench import nodes, survival


def main(storage: Path) -> None:
    survival.set_environment()
    run = functools.partial(survival.trained, storage, "grown")
    print(json.dumps(nodes.arrived(run, storage / "grown", at=2).history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
