"""Which scheduler of Ray Tune a search has.

Owns the names that users give them and the settings that follow from an experiment's epochs.
"""

from __future__ import annotations

from typing import Any

NAMES = ("none", "asha", "hyperband", "pbt")


def scheduler_of(name: str, epochs: int, directory: str) -> Any:
    """A scheduler of Ray Tune that stops runs early, or None. That of "pbt" is made of a population
    (`pbt.py`).

    Args:
        name: "asha", successive halving from a quarter of the epochs on; "hyperband", asynchronous
            Hyperband: brackets that begin to halve after 1, 3, 9, ... epochs; "none".
        epochs: of every run.
        directory: path or URI of the search, where what the scheduler decided is kept.
    """
    if name == "none":
        return None
    from repmtl_ray.search.asha import RUNGS_FILE, ResumableASHA

    settings: dict[str, Any] = {"grace_period": max(1, epochs // 4), "reduction_factor": 2}
    if name == "hyperband":
        settings = {"grace_period": 1, "reduction_factor": 3, "brackets": 1}
        while 3 ** settings["brackets"] <= epochs:
            settings["brackets"] += 1
    # Beyond the last epoch, so that a trial which gets there ends by itself and is not stopped at
    # its end.
    location = f"{directory}/{RUNGS_FILE}"
    return ResumableASHA(location, time_attr="epoch", max_t=epochs + 1, **settings)
