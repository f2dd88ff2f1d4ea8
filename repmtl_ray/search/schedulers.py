"""Which scheduler of Ray Tune a search has.

Owns the names that users give them and the settings that follow from an experiment's epochs.
"""

from __future__ import annotations

from typing import Any


def scheduler_of(name: str, epochs: int, directory: str) -> Any:
    """A scheduler of Ray Tune, or None.

    Args:
        name: "none" or "asha".
        epochs: of every run.
        directory: path or URI of the search, where what the scheduler decided is kept.
    """
    if name == "none":
        return None
    from repmtl_ray.search.asha import RUNGS_FILE, ResumableASHA

    # Beyond the last epoch, so that a trial which gets there ends by itself and is not stopped at
    # its end.
    return ResumableASHA(
        f"{directory}/{RUNGS_FILE}",
        time_attr="epoch",
        max_t=epochs + 1,
        grace_period=max(1, epochs // 4),
        reduction_factor=2,
    )
