"""Which scheduler of Ray Tune a search has.

Owns the names that users give them and the settings that follow from an experiment's epochs.
"""

from __future__ import annotations

from typing import Any

NAMES = ("none", "asha", "hyperband", "pbt")


def halving_settings(name: str, epochs: int) -> dict[str, int]:
    """Epochs before the first decision, one in how many runs passes each rung, and the number of
    brackets, of "asha" or "hyperband"; all others stop no run early."""
    if name == "asha":
        return {"grace_period": max(1, epochs // 4), "reduction_factor": 2, "brackets": 1}
    if name != "hyperband":
        return {}
    brackets = 1
    while 3**brackets <= epochs:
        brackets += 1
    return {"grace_period": 1, "reduction_factor": 3, "brackets": brackets}


def interval_of(epochs: int) -> int:
    """After how many epochs a population is compared: about eight times in a run."""
    return max(1, epochs // 8)


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

    settings: dict[str, Any] = {**halving_settings(name, epochs)}
    # Beyond the last epoch, so that a trial which gets there ends by itself and is not stopped at
    # its end.
    location = f"{directory}/{RUNGS_FILE}"
    return ResumableASHA(location, time_attr="epoch", max_t=epochs + 1, **settings)
