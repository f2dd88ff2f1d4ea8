"""Which tests `make test-fast` leaves out: those that took longer than 0.12 s.

    PYTEST_ADDOPTS="--junitxml=times.xml" make test
    python -m tests.long_tests times.xml        # writes tests/long_tests.txt

The file holds options of pytest, one per line. Write it anew when `make test-fast` takes longer than
two minutes. A test that is not in the file runs.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

LONG_S = 0.12
STORED = Path(__file__).with_suffix(".txt")


def options(times: Path) -> list[str]:
    """The options that leave out the long tests of a report of pytest (JUnit's XML).

    A function is left out whole where most of its cases are long.
    """
    cases: dict[str, dict[str, float]] = defaultdict(dict)
    for case in ElementTree.parse(times).iter("testcase"):
        file = case.attrib["classname"].replace(".", "/") + ".py"
        name = case.attrib["name"]
        if file.startswith("tests/unit/"):
            cases[f"{file}::{name.partition('[')[0]}"][name] = float(case.attrib["time"])
    found = []
    for function, seconds in cases.items():
        long = [name for name, taken in seconds.items() if taken > LONG_S]
        if len(seconds) > 1 and 2 * len(long) > len(seconds):
            found.append(f"{function}[")
        else:
            found += [f"{function.partition('::')[0]}::{name}" for name in long]
    return sorted(f"--deselect={test}" for test in found)


if __name__ == "__main__":
    STORED.write_text("\n".join(options(Path(sys.argv[1]))) + "\n")
